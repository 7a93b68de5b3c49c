"""Renders ``explain.html``: one page without scripts and without external resources."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from blip2edge.charts import html_page, html_table

QUALITY = 82  # of the JPEG copies in the page; the PNG files beside it are exact
WHOLE = 'style="max-width:100%;height:auto"'


def picture_tag(picture: Image.Image, text: str) -> str:
    """Makes an ``img`` element that contains the picture as a JPEG; ``text`` describes the picture."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img {WHOLE} alt="{escape(text)}" src="data:image/jpeg;base64,{data}">'


def explanation_page(document: Mapping[str, Any], title: str, images: Mapping[str, str]) -> str:
    """Renders the page.

    Args:
        document: The object of ``explain.json``.
        title: The bundle's name.
        images: The ``img`` element of each picture file, by its name.
    """
    body = _head(document, title)
    if document["similarity"] is not None:
        body += _similarity(document["similarity"], images)
    if document["gates"]:
        body += _gates(document["gates"], images)
    body += "".join(_picture(picture, images) for picture in document["pictures"] if picture["shown"])
    if document["broken"]:
        body += _broken(document["broken"], len(document["pictures"]))
    return html_page(f"{title}: queries", body)


def _head(document: Mapping[str, Any], title: str) -> str:
    if document["grid"] is None:
        return (
            f"<header><h1>{escape(title)}</h1><p>The model has no bridge with queries: its gated layers attend to the "
            "patches themselves, so only the gates are shown.</p></header>"
        )
    grid, layers = document["grid"], ", ".join(map(str, document["layers"]))
    facts = [(str(document["queries"]), "queries"), (f"{grid['rows']} × {grid['columns']}", "patches")]
    similarity = document["similarity"]
    if similarity["mean"] is not None:
        facts.append((f"{similarity['mean']:.2f}", "mean cosine of two queries"))
    tiles = "".join(f"<div><b>{escape(figure)}</b><span>{escape(text)}</span></div>" for figure, text in facts)
    prompt = f" The instruction is “{escape(document['prompt'])}”." if document["prompt"] is not None else ""
    return (
        f"<header><h1>{escape(title)}</h1><p>Attention of the queries to the patches in layers {layers} of the bridge "
        f"({escape(document['precision'])}), averaged over {document['heads']} heads.{prompt}</p>"
        f"<div class=tiles>{tiles}</div></header>"
    )


def _similarity(similarity: Mapping[str, Any], images: Mapping[str, str]) -> str:
    pictures, between = similarity["pictures"], similarity["between_pictures"]
    text = (
        f"<p>Cosine of the visual tokens of two queries, averaged over {pictures} "
        f"picture{'' if pictures == 1 else 's'}. Two queries with a cosine of 1 give the same visual token.</p>"
    )
    pair = similarity["most_alike"]
    if pair is not None:
        one, other = pair["queries"]
        text += f"<p>Most alike: queries {one} and {other}, with {pair['cosine']:.3f}.</p>"
    table = ""
    if between is not None:
        rows = [[str(number), f"{value:.3f}"] for number, value in enumerate(between)]
        table = (
            "<details><summary>One query in two pictures</summary><p class=note>Cosine of the visual tokens of one "
            "query in two different pictures, averaged over all pairs. Near 1, the query hardly depends on the "
            f"picture.</p>{html_table(('query', 'cosine'), 'lr', rows)}</details>"
        )
    return f"<section><h2>How alike the queries are</h2>{text}{images[similarity['file']]}{table}</section>"


def _gates(gates: Sequence[Mapping[str, Any]], images: Mapping[str, str]) -> str:
    channels = gates[0]["channels"]
    more = f" Each layer has {channels} gates; shown is the mean of |tanh|." if channels > 1 else ""
    return (
        "<section><h2>Gates of the gated layers</h2><p>tanh(alpha) multiplies what a gated layer adds to the text: at "
        f"0 the layer adds nothing, at 1 or -1 all.{more}</p>{images['gates.png']}</section>"
    )


def _picture(picture: Mapping[str, Any], images: Mapping[str, str]) -> str:
    parts = []
    for layer in picture["layers"]:
        queries = layer["queries"]
        spread = sorted(query["spread"] for query in queries)[len(queries) // 2]
        others = [f"a query looks at {spread:.1f} patches (median)"]
        for key, text in (("before", "on the tokens before the patches"), ("queries", "on the queries themselves")):
            share = sum(query[key] for query in queries) / len(queries)
            if share > 0:
                others.append(f"{share:.0%} of the weight {text}")
        parts.append(f"<h3>Layer {layer['layer']} <span>{'; '.join(others)}</span></h3>{images[layer['file']]}")
    note = (
        "<p class=note>The picture, the mean over all queries, then each query with the weight of its strongest patch. "
        "Every map has its own scale. The dark parts are not part of the model's input.</p>"
    )
    return f"<section><h2>{escape(picture['image'])}</h2>{note}{''.join(parts)}</section>"


def _broken(broken: Sequence[Mapping[str, str]], usable: int) -> str:
    rows = [[escape(picture["image"]), escape(picture["error"])] for picture in broken]
    return (
        f"<section><h2>Skipped pictures</h2><p>{len(broken)} of {len(broken) + usable} pictures could not be read. "
        f"They are in none of the figures.</p>{html_table(('picture', 'reason'), 'll', rows)}</section>"
    )
