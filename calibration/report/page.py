"""Renders ``report.html``, one page without scripts and without external resources.

The page shows the object of ``report.json`` (``document.py``) and thumbnails of the pictures.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from blip2edge.calibration.activations.headroom import FP16_MAX, MIN_HEADROOM
from blip2edge.calibration.report.front import search_section
from blip2edge.charts import Bar, bars, grid, histogram, html_page, html_table, spread

SHOWN = 24  # pictures shown with their captions
SIDE = 112  # px of a thumbnail
ROWS = 12  # rows of a chart that shows the worst layers

BANDWIDTHS = {"Jetson Orin Nano": 68, "Orin Nano Super, Orin NX": 102, "AGX Orin": 205, "Thor": 273}
"""Memory bandwidth in GB/s, by NVIDIA's data sheets; it limits the speed of decoding."""

FITS_CACHE = 32 << 20
"""If decoding a token reads fewer bytes, a CPU cache may hold all of them, and memory bandwidth may not be the limit.
"""

WEIGHT = re.compile(r"^(?P<path>.*?\.)(?P<layer>\d+)\.(?P<kind>.*?)(\.weight)?(\.T)?$")
"""Splits the name of a layer's initializer into path, number of the layer, and kind of matrix."""

Graphs = Mapping[str, Mapping[str, Any]]


def thumbnail(picture: Image.Image) -> str:
    """Makes a small JPEG of a picture; returns it as a data URI."""
    small = picture.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def shown_pictures(captions: Sequence[Mapping[str, str]]) -> list[int]:
    """Returns the indices of the pictures that the page shows; pictures with different captions come first."""
    order = sorted(range(len(captions)), key=lambda at: captions[at]["parent"] == captions[at]["ours"])
    return order[:SHOWN]


def report_page(document: Mapping[str, Any], title: str, thumbnails: Mapping[int, str]) -> str:
    """Renders the calibration report as an HTML page.

    Args:
        document: The object of ``report.json``.
        title: The bundle's name.
        thumbnails: Data URIs of the pictures, by the index in ``document["captions"]``.
    """
    sections: list[tuple[str, Callable[[], str]]] = [
        ("Search", lambda: search_section(document.get("search"))),
        ("Size", lambda: _sizes(document)),
        ("Captions compared with the original bundle's", lambda: _captions(document, thumbnails)),
        ("Cosine to the original bundle, by graph", lambda: _stages(document)),
        ("Error of each layer by rounding", lambda: _layers(document["graphs"])),
        ("Ranges of the activations", lambda: _ranges(document["graphs"])),
        ("Sensitivity", lambda: _sensitivity(document["calibration"].get("sensitivity"))),
        ("Kept in floating point", lambda: _kept_float(document["graphs"])),
        ("FP16 headroom", lambda: _headroom(document["graphs"])),
    ]
    body = "".join(
        f"<section><h2>{escape(name)}</h2>{content}</section>"
        for name, content in ((name, make()) for name, make in sections)
        if content
    )
    return html_page(f"{title}: calibration", _head(document, title) + body)


def _head(document: Mapping[str, Any], title: str) -> str:
    record, graphs = document["calibration"], document["graphs"]
    now = sum(graph["bytes"] for graph in graphs.values()) + document["token_table"]["bytes"]
    before = sum(graph["parent_bytes"] for graph in graphs.values()) + document["token_table"]["parent_bytes"]
    tiles = [(_size(now), f"{now / before:.0%} of the original bundle's {_size(before)}")]
    if record["captions"]:
        tiles.append(
            (
                f"{record['captions']['same']:.1%}",
                f"of {record['captions']['pictures']} captions are the same as the original bundle's",
            )
        )
    lowest = [value["mean"] for outputs in record["cosine"].values() for value in outputs.values()]
    if lowest:
        tiles.append((f"{min(lowest):.5f}", "lowest mean cosine of a graph's output"))
    decode = document.get("decode")
    if decode:
        share = decode["bytes"] / decode["parent_bytes"]
        tiles.append((_size(decode["bytes"]), f"read per token, {share:.0%} of {_size(decode['parent_bytes'])}"))
    cards = "".join(f"<div><b>{escape(figure)}</b><span>{escape(text)}</span></div>" for figure, text in tiles)
    kinds = ", ".join(f"{name} {graph['precision']}" for name, graph in graphs.items())
    return (
        f"<header><h1>{escape(title)}</h1><p>Calibrated by <i>{escape(record['method'])}</i> on "
        f"{record['pictures']} pictures. {escape(kinds)}.</p><div class=tiles>{cards}</div></header>"
    )


def _sizes(document: Mapping[str, Any]) -> str:
    rows = []
    table = {"token table": {"precision": "", **document["token_table"]}}
    for name, graph in {**document["graphs"], **table}.items():
        if not graph["parent_bytes"]:
            continue
        now, before = graph["bytes"], graph["parent_bytes"]
        rows.append(Bar(name, "before", before, _size(before)))
        rows.append(Bar(graph["precision"], "now", now, f"{_size(now)} · {now / before:.2f}"))
    text = "<p>Grey bars: the original bundle. A head that shares the token table's file is counted with the table.</p>"
    return text + bars(rows) + _decode(document.get("decode"))


def _decode(decode: Mapping[str, Any] | None) -> str:
    if not decode:
        return ""
    text = (
        f"<p>Each new token reads the decoder's weights ({_size(decode['weight_bytes'])}) and the KV cache "
        f"({_size(decode['cache_bytes_per_position'])} per position, here at {decode['positions']} positions)."
    )
    if decode["bytes"] < FITS_CACHE:
        return text + " A processor's cache may hold all of it.</p>"
    limits = html_table(
        ("device", "memory", "original bundle, at most", "this bundle, at most"),
        "lrrr",
        (
            (
                device,
                f"{speed} GB/s",
                *(f"{speed * 1e9 / decode[key]:.0f}" for key in ("parent_bytes", "bytes")),
            )
            for device, speed in BANDWIDTHS.items()
        ),
    )
    return (
        f"{text} The table shows the tokens per second that the memory bandwidth allows at most. Nothing was run on "
        f"these devices.</p>{limits}"
    )


def _captions(document: Mapping[str, Any], thumbnails: Mapping[int, str]) -> str:
    captions = document["captions"]
    if not captions:
        return ""
    cards = []
    for at in shown_pictures(captions):
        pair = captions[at]
        same = pair["parent"] == pair["ours"]
        source = thumbnails.get(at)
        image = f'<img src="{source}" alt="">' if source else ""
        text = (
            f"<p>{escape(pair['ours'])}</p>"
            if same
            else f"<p class=was>{escape(pair['parent'])}</p><p class=is>{escape(pair['ours'])}</p>"
        )
        cards.append(
            f"<figure class={'same' if same else 'differs'}>{image}<figcaption><small>{escape(pair['picture'])}"
            f"</small>{text}</figcaption></figure>"
        )
    differ = sum(pair["parent"] != pair["ours"] for pair in captions)
    what = (
        f"{differ} of {len(captions)} captions differ. They come first; the original caption is struck through."
        if differ
        else f"All {len(captions)} captions are the same as the original bundle's."
    )
    more = f" {len(cards)} pictures are shown." if len(cards) < len(captions) else ""
    return f"<p>{what}{more}</p><div class=captions>{''.join(cards)}</div>"


def _stages(document: Mapping[str, Any]) -> str:
    rows = [
        (escape(name), escape(output), *(f"{value[key]:.6f}" for key in ("mean", "lowest", "lowest_token")))
        for name, outputs in document["calibration"]["cosine"].items()
        for output, value in outputs.items()
    ]
    if not rows:
        return ""
    table = html_table(("graph", "output", "mean", "lowest picture", "lowest token"), "llrrr", rows)
    text = "Cosine of each output to that of the original bundle. Both get the inputs of the original bundle."
    return f"<p>{text}</p>{table}"


def _layers(graphs: Graphs) -> str:
    parts = []
    for name, graph in graphs.items():
        changes = {
            weight: math.sqrt(max(detail["change"], 0.0))
            for detail in graph["activations"]
            for weight in detail["products"]
        }
        plain = {}
        for weight, matrix in graph["weights"].items():
            if matrix["error"] is not None:
                changes[weight], plain[weight] = matrix["error"], matrix["plain_error"]
        if changes:
            parts.append(f"<h3>{escape(name)} <span>{escape(graph['precision'])}</span></h3>")
            parts.append(_grids(changes))
            parts.append(_worst(changes, plain))
    if not parts:
        return ""
    text = (
        "<p>Relative change of each product's output by rounding, on the recorded activations: root mean square of the "
        "difference over that of the output. Darker squares are larger; hover over a square to see its value.</p>"
    )
    return text + "".join(parts)


def _grids(changes: Mapping[str, float]) -> str:
    stacks: dict[str, dict[tuple[str, int], float]] = {}
    for weight, value in changes.items():
        match = WEIGHT.match(weight)
        if match:
            stacks.setdefault(match["path"], {})[match["kind"], int(match["layer"])] = value
    return "".join(f"<div class=wide>{grid(cells, 'changed')}</div>" for cells in stacks.values())


def _worst(changes: Mapping[str, float], plain: Mapping[str, float]) -> str:
    worst = sorted(changes, key=lambda weight: -changes[weight])[:5]
    named = " · ".join(f"{escape(_short(weight))} {changes[weight]:.1%}" for weight in worst)
    text = f"<p class=note>Largest: {named}.</p>"
    if plain:
        ours = sum(changes[weight] for weight in plain) / len(plain)
        nearest = sum(plain.values()) / len(plain)
        text += (
            f"<p class=note>Mean over {len(plain)} matrices: {ours:.2%}. Rounding to nearest in the same format gives "
            f"{nearest:.2%}.</p>"
        )
    return text


def _ranges(graphs: Graphs) -> str:
    parts = []
    for name, graph in graphs.items():
        rows = [_range(detail) for detail in graph["activations"]]
        if rows:
            header = ("read by", "values", "largest", "range", "widest channel", "error", "division")
            table = html_table(header, "llrrrrl", rows)
            parts.append(f"<details><summary>{escape(name)}: {len(rows)} activations</summary>{table}</details>")
    if not parts:
        return ""
    text = (
        "<p>Histograms of |x| of the INT8 activations, on a logarithmic scale; values beyond the red line saturate. "
        "Where smoothing divides the channels, the histogram shows the values before the division, and the numbers "
        "those after it. The widest channel is given as a multiple of the median channel.</p>"
    )
    return text + "".join(parts)


def _range(detail: Mapping[str, Any]) -> tuple[str, ...]:
    middle = detail["median_channel"]
    ratio = f"{detail['largest_channel'] / middle:.1f}×" if middle else ""
    names = ", ".join(map(_short, detail["products"]))
    line = detail["threshold"] if detail["division"] == "none" else None
    return (
        escape(names),
        histogram(detail["histogram"], detail["histogram_end"], line),
        f"{detail['maximum']:.3g}",
        f"{detail['threshold']:.3g}",
        ratio,
        f"{math.sqrt(max(detail['change'], 0.0)):.2%}",
        escape(detail["division"]),
    )


def _sensitivity(record: Mapping[str, Any] | None) -> str:
    if not record:
        return ""
    kept = {(item["graph"], item["layer"]) for item in record["left"]}
    rows = [
        Bar(
            _short(item["layer"]),
            "bad" if (item["graph"], item["layer"]) in kept else "now",
            item["loss"],
            f"{item['loss']:.2g} nats",
        )
        for item in record["layers"][: max(ROWS, len(kept))]
    ]
    counted = "% of the captions differ" if record["measure"] == "captions" else "points of CIDEr are lost"
    tried = ", ".join(f"{count} kept: {drop:.1f}" for count, drop in record["tried"].items())
    return (
        "<p>Change of the next token by each layer alone (Kullback-Leibler divergence from the original bundle, nats "
        f"per token): the worst {len(rows)} of {len(record['layers'])}. With every layer quantized, "
        f"{record['drop_with_all_quantised']:.1f} {counted}; the limit is {record['limit']:g}. "
        f"{len(kept)} layers are kept in floating point (red); then {record['drop']:.1f} {counted}.</p>{bars(rows)}"
        f"<p class=note>Tried numbers of kept layers: {tried}.</p>"
    )


def _kept_float(graphs: Graphs) -> str:
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, graph in graphs.items():
        for node, reason in graph["left"].items():
            reasons.setdefault((name, reason), []).append(node)
    if not reasons:
        return ""
    rows = []
    for (name, reason), nodes in reasons.items():
        first = escape(", ".join(map(_short, nodes[:4]))) + (" …" if len(nodes) > 4 else "")
        rows.append((escape(name), str(len(nodes)), escape(reason), f"<small>{first}</small>"))
    return html_table(("graph", "products", "reason", "products kept"), "lrll", rows)


def _headroom(graphs: Graphs) -> str:
    parts = []
    for name, graph in graphs.items():
        found = graph["headroom"]
        if not found or not found["tensors"]:
            continue
        values = [tensor["headroom"] for tensor in found["tensors"] if tensor["headroom"] is not None]
        least = found["tensors"][0]
        verdict = (
            f"{len(found['keep_fp32'])} tensors have a headroom below {MIN_HEADROOM:g} and should be kept in FP32."
            if found["keep_fp32"]
            else "FP16 is safe on these pictures."
        )
        parts.append(
            f"<h3>{escape(name)}</h3><p class=note>Least headroom: {escape(least['tensor'])} "
            f"({escape(least['op_type'])}) reaches {least['largest']:.4g}, {_times(least['headroom'])}. {verdict}</p>"
            f"<div class=wide>{spread(values, 1.0, MIN_HEADROOM)}</div>"
        )
    if not parts:
        return ""
    text = (
        f"<p>Headroom is {FP16_MAX:.0f}, the largest FP16 number, over a tensor's largest value on the pictures. "
        "The bars count tensors. Tensors left of the red line overflow; those left of the grey line "
        f"({MIN_HEADROOM:g} times) may overflow on other pictures. "
        "A run on a CPU would not show this, because a CPU computes FP16 graphs in FP32.</p>"
    )
    return text + "".join(parts)


def _times(headroom: float | None) -> str:
    if headroom is None:
        return "always zero"
    times, side = (headroom, "below") if headroom >= 1 else (1 / headroom, "above")
    return f"{times:,.0f} times {side} the limit" if times >= 100 else f"{times:.3g} times {side} the limit"


def _short(weight: str) -> str:
    """Returns an initializer's name without the endings ``.weight`` and ``.T``."""
    return re.sub(r"(\.weight)?(\.T)?$", "", weight)


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
