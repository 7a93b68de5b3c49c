"""Writes the tables of a Markdown page from ``benchmarks/results/*.json``.

    python benchmarks/tables.py README.md docs/speed.md [--check]

A table is between ``<!-- table: NAME -->`` and ``<!-- end -->``, where NAME is a key of :data:`TABLES`. The numbers
come from a file that a benchmark wrote. A table whose file is missing is not changed. ``--check`` writes nothing, and
fails if a page would change.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reporting import RESULTS, parser_of

from blip2edge.cli import run_script

MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def captions(document: dict[str, Any]) -> list[str]:
    """Returns the table that compares whole captions (`peers.py`)."""
    head = ["| | CPU ms a caption | times transformers eager | ids as transformers |", "|---|---:|---:|---:|"]
    batch = document.get("batch", 1)
    rows = [
        f"| {row['name']} | {row['cpu_seconds'] / batch * 1e3:.0f} | {row['speedup']:.2f} | {row['same_ids']:.0%} |"
        for row in document["results"]
    ]
    return [*head, *rows, "", f"{_where(document)}, batch {batch}, {document['tokens']} tokens."]


def vision(document: dict[str, Any]) -> list[str]:
    """Returns the table that compares vision encoders (`peers_vision.py`)."""
    head = ["| ViT-B/16, 224 pixels | CPU ms | times fp32 in ONNX Runtime |", "|---|---:|---:|"]
    rows = [
        f"| {row['name']} | {row['run']['cpu_ms']:.0f} | {row['run']['times']:.2f} |" for row in document["results"]
    ]
    return [*head, *rows, "", f"{_where(document)}, batch 1."]


def language(document: dict[str, Any]) -> list[str]:
    """Returns the table that compares decoders (`peers_language.py`)."""
    prompt, tokens = document["prompt"], document["tokens"]
    base = document["results"][0]["name"]
    head = [
        f"| SmolLM2-135M | prefill of {prompt}, CPU ms | times {base} | {tokens} tokens, CPU ms | times {base} |",
        "|---|---:|---:|---:|---:|",
    ]
    rows = [
        "| " + " | ".join([row["name"], *(f"{row[task][key]:{form}}" for task in ("prefill", "decode")
                                          for key, form in (("cpu_ms", ".0f"), ("times", ".2f")))]) + " |"
        for row in document["results"]
    ]  # fmt: skip
    return [*head, *rows, "", f"{_where(document)}, batch 1."]


def first_caption(document: dict[str, Any]) -> list[str]:
    """Returns the table of seconds, memory and bytes of the first commands in README.md (`first_caption.py`)."""
    head = ["| | seconds | peak memory | bundle |", "|---|---:|---:|---:|"]
    rows = [
        f"| {step['command']} | {step['seconds']:.0f} | {step['peak_bytes'] / 1e9:.1f} GB | "
        + (f"{step['bundle_bytes'] / 1e6:.0f} MB |" if "bundle_bytes" in step else "|")
        for step in document["steps"]
        if step["command"] != "caption again"
    ]
    machine = document["machine"]
    weights, pictures = document["weight_bytes"] / 1e6, document["pictures"]
    where = f"{machine['cpu']}, {machine['cores']} cores"
    return [*head, *rows, "", f"Checkpoint of {weights:.0f} MB in fp32, {pictures} pictures. {where}."]


def stages(document: dict[str, Any]) -> list[str]:
    """Returns the table of the stages in the output of ``blip2edge bench --json``."""
    head = ["| stage | p50 ms | CPU ms | share of the roofline |", "|---|---:|---:|---:|"]
    rows = []
    for name, stage in document["stages"].items():
        share = "" if stage["share"] is None else f"{stage['share']:.0%} ({stage['bound']})"
        rows.append(f"| {name} | {stage['ms']['p50']:.1f} | {stage['cpu_ms']:.1f} | {share} |")
    roof, machine = document["roofline"], document["machine"]
    limits = (
        f"One core reads {roof['gigabytes_per_s']} GB/s and multiplies {roof['gigaflops_fp32']} GFLOP/s in fp32, "
        f"{roof['gigaops_int8']} GOP/s in int8."
    )
    return [*head, *rows, "", f"{machine['processor']}, threads: {machine['threads'] or 'all'}. {limits}"]


def reuse(document: dict[str, Any]) -> list[str]:
    """Returns the table of the time saved and the captions changed by ``watch --reuse-below``."""
    head = [
        "| `--reuse-below` | frames not encoded | same words as encoding all | CPU ms a frame |",
        "|---:|---:|---:|---:|",
    ]
    rows = [
        f"| {row['below']:g} | {row['reused']:.0%} | {row['same_words']:.1%} | {row['cpu_ms']:.1f} |"
        for row in document["results"]
    ]
    film = f"{document['frames']} frames of {document['scenes']} scenes, noise of {document['noise']:g}/255"
    return [*head, *rows, "", f"{film}. {_where(document)}."]


def reuse_auto(document: dict[str, Any]) -> list[str]:
    """Returns the table of ``watch --reuse-below auto``: the changes that it misses, and the time that it saves."""
    head = [
        "| film | fitted on | stated | missed / reused | of all | overlooked | no vision | no decoding | CPU ms |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    rows = [
        f"| {row['film']} | {row['fitted_on']} | {row['stated']:.0%} | {row['missed']} / {row['reused']} = "
        f"{row['rate']:.1%} | {row['rate_of_all_frames']:.1%} | {row['changes_never_shown']} of {row['changes']} | "
        f"{row['vision_saved']:.0%} | {row['decoding_saved']:.0%} | {row['cpu_ms_full']:.1f} → {row['cpu_ms']:.1f} |"
        for row in document["results"]
    ]
    film = f"{document['results'][0]['frames']} frames of each film; CPU ms of a frame, encoded in full → with auto"
    return [*head, *rows, "", f"{film}. {_where(document)}."]


def opening(document: dict[str, Any]) -> list[str]:
    """Returns the table of the times to open each graph, from the ``optimized.json`` of a copy for OpenVINO."""
    head = [
        "| graph | compiled when opened, CPU ms | from the copy, CPU ms | times |",
        "|---|---:|---:|---:|",
    ]
    rows = []
    for name, graph in document["graphs"].items():
        before, after = graph["milliseconds"]
        rows.append(f"| {name} | {before:.0f} | {after:.0f} | {before / after:.2f} |")
    size = sum(file["size"] for file in document["files"].values()) / 1e6
    where = f"{document['machine']}, one thread, OpenVINO {document['versions']['openvino']}"
    return [*head, *rows, "", f"The copy takes {size:.0f} MB. {where}."]


def token_merging(document: dict[str, Any]) -> list[str]:
    """Returns the table of the time saved and the captions changed by token merging."""
    head = [
        (
            "| R | the miniature: embeddings | captions that match exactly | same caption as without merging "
            "| vision, CPU ms | times |"
        ),
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in document["results"]["miniature"]:
        right, same = f"{row['exact_match']:.1%}", f"{row['as_without_merging']:.1%}"
        head.append(
            f"| {row['merge_tokens']} | {row['embeds']} | {right} | {same} "
            f"| {row['run']['cpu_ms']:.2f} | {row['run']['times']:.2f} |"
        )
    head += ["", "| R | ViT-B/16, 224 pixels: embeddings | CPU ms | times |", "|---:|---:|---:|---:|"]
    head += [
        f"| {row['merge_tokens']} | {row['embeds']} | {row['run']['cpu_ms']:.0f} | {row['run']['times']:.2f} |"
        for row in document["results"]["vit-b"]
    ]
    return [*head, "", f"{_where(document)}, batch 1; {document['heldout_scenes']:,} held-out scenes."]


def elastic_scenes(document: dict[str, Any]) -> list[str]:
    """Returns the table of the share of right captions at each number of queries."""
    found = document["scenes"]
    rows = [f"| {row['queries']} | {row['exact_match']:.1%} |" for row in found["exact_match"]]
    rows.append(f"| the shipped miniature, all 8 | {found['shipped_exact_match']:.1%} |")
    equal = (
        f"With all queries, the ids of {found['ids_equal_to_plain_at_full']:,} of {found['scenes']:,} captions equal"
    )
    return ["| queries | captions that match exactly |", "|---|---:|", *rows, "", f"{equal} those of the plain bundle."]


def elastic_video(document: dict[str, Any]) -> list[str]:
    """Returns the table of time, tokens and KV-cache bytes of a video at each number of queries."""
    lines = [
        (
            "| sizes of | queries | prompt, tokens | KV cache, MiB | prefill, CPU ms | times | after vision "
            "| times | whole caption, CPU ms | times |"
        ),
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in document["video"].items():
        for row in found["rows"]:
            times = " | ".join(
                f"{row[stage]['cpu_ms']:,.0f} | {row[stage]['times_faster']:.2f}"
                for stage in ("prefill", "after_vision", "whole")
            )
            lines.append(f"| {name} | {row['queries']} | {row['prompt_tokens']:,} | {row['kv_mib']:.1f} | {times} |")
    return [*lines, "", f"{_where(document)}, fp32."]


def streaming(document: dict[str, Any]) -> list[str]:
    """Returns the table of the speed of matrix multiplications and convolutions with weights larger than the caches."""
    lines = [
        "| rows x inner → columns | product | on huge pages | convolution | on huge pages |",
        "|---|---:|---:|---:|---:|",
    ]
    found = {(*row["shape"], row["rows"], row["kind"], row["huge_pages"]): row for row in document["results"]}
    for inner, columns, rows in dict.fromkeys(key[:3] for key in found):
        unit, key = ("GB/s", "gigabytes_per_s") if rows == 1 else ("GFLOP/s", "gigaflops")
        cells = (
            f"{found[inner, columns, rows, kind, huge][key]:.0f} {unit}"
            for kind in ("product", "convolution")
            for huge in (False, True)
        )
        lines.append(f"| {rows} x {inner} → {columns} | {' | '.join(cells)} |")
    return [*lines, "", f"{_where(document)}, ONNX Runtime {document['versions']['onnxruntime']}."]


def scheduling(document: dict[str, Any]) -> list[str]:
    """Returns the tables of the scheduler's gain, for pictures one after another and for random arrivals."""
    row = document["overlap"]
    ways = {
        "one_by_one": "one by one, all cores",
        "overlapped": "encoding in parallel with decoding, half of the cores each",
        "in_turn": "encoding and decoding in turn, all cores",
    }
    lines = [
        f"| {row['pictures']} pictures of {row['tokens']} tokens | seconds | speed relative to one by one |",
        "|---|---:|---:|",
    ]
    for name, said in ways.items():
        times = row.get(f"{name}_throughput", 1.0)
        lines.append(f"| {said} | {statistics.median(row['seconds'][name]):.2f} | {times:.2f} |")
    lines += [
        "",
        "| rows decoded together | most captions a second within the time limit | 99 % are ready within |",
        "|---:|---:|---:|",
    ]
    for served in document["arrivals"]:
        kept = served["sustained"]
        least = served["seen"][0]
        said = f"{kept['captions_per_s']:.2f}" if kept else f"less than {least['captions_per_s']:.2f}"
        said += f" | {(kept or least)['p99_s']:.2f} s"
        lines.append(f"| {served['max_batch']} | {said} |")
    bound = f"Random arrivals, captions of {document['lengths'][0]} to {document['lengths'][1]} tokens"
    return [
        *lines,
        "",
        f"{bound}; the time limit is {document['bound_s']:.1f} s. {document['cpu']}, {document['cores']} cores.",
    ]


def startup(document: dict[str, Any]) -> list[str]:
    """Returns the table of the seconds to the first word, and of the memory over many captions."""
    found = document["results"]
    text, resident = found["text"], [value / 1e6 for value in found["resident_bytes"]]
    most = 1.3 * found["bundle_bytes"] / 1e6 + 120
    return [
        "| | |", "|---|---:|",
        f"| `Captioner.load`, the miniature | {found['load_s']:.2f} s |",
        f"| from the start of the process to the first word of a picture | {found['first_word_s']:.2f} s |",
        (f"| SmolLM2-135M at 8 bits, from the start of the process to a text prompt's first token "
        f"| {text['first_token_s']:.2f} s |"),
        f"| the same in llama.cpp, Q8_0 | {text['llama_first_token_s']:.2f} s |",
        (f"| ratio of blip2edge to llama.cpp, median of rounds: wall time, CPU time "
        f"| {text['wall_ratio']:.2f}, {text['cpu_ratio']:.2f} |"),
        f"| memory of the miniature after 50 captions (limit: {most:.0f} MB) | {resident[0]:.0f} MB |",
        f"| after {document['captions']:,} captions | {resident[-1]:.0f} MB |",
        "", f"{_where(document)}.",
    ]  # fmt: skip


def loading(document: dict[str, Any]) -> list[str]:
    """Returns the table of the seconds that large bundles take to load (`loading.py`)."""
    rows = ["| bundle | backend | size | load | then to huge pages, in the background |", "|---|---|---:|---:|---:|"]
    for each in document["results"]:
        after = f"{each['after_s']:.2f} s" if each["backend"] == "cpu" else ""
        rows.append(
            f"| {each['bundle']} | {each['backend']} | {each['bytes'] / 1e6:.0f} MB "
            f"| {each['load_s']:.2f} s | {after} |"
        )
    return [*rows, "", f"{_where(document)}; the files are in the page cache; median of {document['rounds']}."]


def training_memory(document: dict[str, Any]) -> list[str]:
    """Returns the table of the memory of a training step (`training_memory.py`)."""
    heads = ("", "weights", "gradients, AdamW", "activations", "step", "a tenth: predicted", "measured", "losses apart")
    rows = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * 7]
    for each in document["models"]:
        rows.append(f"| **{each['model']}** | | | | | | | |")
        for row in each["rows"]:
            full = row["predicted"]
            held = full["frozen"] + full["trained"] + full["gathered"]
            moments, kept = full["gradients"] + full["optimizer"], full["activations"] + full["working"]
            sizes = [held, moments, kept, full["step"], row["small"]["step"]]
            shown = " | ".join(f"{size / (1 << 30):.2f}" for size in sizes)
            rows.append(f"| {row['choice']} | {shown} | {_measured(row, each['rows'][0])} |")
    where = f"{document['machine']['cpu']}, one thread for each process"
    batch = f"{document['batch']} samples of {document['tokens']} tokens; at a tenth {document['small_batch']} samples"
    return [*rows, "", f"GiB for each process; {batch}. {where}."]


def _measured(row: dict[str, Any], first: dict[str, Any]) -> str:
    """Returns two cells: the measured peak, and how far the losses are from those of the first row (relative)."""
    run, plain = row["measured"], first["measured"]
    if run is None or plain is None:
        return "not measured | "
    apart = max(abs(own / other - 1) for own, other in zip(run["losses"], plain["losses"], strict=True))
    return f"{run['peak'] / (1 << 30):.2f} ({row['error']:+.0%}) | {apart:.1e}"


def _where(document: dict[str, Any]) -> str:
    return f"{document['machine']['cpu']}, one thread"


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], list[str]]]] = {
    "training-memory": ("training-memory.json", training_memory),
    "first-caption": ("first_caption.json", first_caption),
    "captions": ("peers-cpu.json", captions),
    "captions-batch": ("peers-batch-cpu.json", captions),
    "captions-zen5": ("peers-zen5.json", captions),
    "captions-batch-zen5": ("peers-batch-zen5.json", captions),
    "vision": ("peers-vision-cpu.json", vision),
    "language": ("peers-language-cpu.json", language),
    "token-merging": ("token-merging.json", token_merging),
    "stages-fp32": ("bench-fp32-cpu.json", stages),
    "stages-int8": ("bench-int8-cpu.json", stages),
    "openvino-opening": ("openvino-opening.json", opening),
    "watch-reuse": ("watch-reuse.json", reuse),
    "watch-reuse-auto": ("watch-reuse-auto.json", reuse_auto),
    "elastic-scenes": ("elastic.json", elastic_scenes),
    "elastic-video": ("elastic.json", elastic_video),
    "streaming": ("streaming.json", streaming),
    "scheduling": ("scheduling.json", scheduling),
    "startup": ("startup.json", startup),
    "loading": ("loading.json", loading),
}
"""The result file of each table, and the function that formats it."""


def filled(text: str) -> str:
    """Returns the page with the current results in its tables.

    Raises:
        KeyError: The page has a table whose name is not in :data:`TABLES`.
    """

    def fill(match: re.Match[str]) -> str:
        file, lay_out = TABLES[match["name"]]
        path = RESULTS / file
        if not path.exists():
            return match[0]
        lines = lay_out(json.loads(path.read_text(encoding="utf-8")))
        return f"{match[1]}\n{chr(10).join(lines)}\n\n{match[3]}"

    return MARKED.sub(fill, text)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("pages", type=Path, nargs="+")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    for page in options.pages:
        text = page.read_text(encoding="utf-8")
        new = filled(text)
        if options.check and new != text:
            sys.exit(f"{page} does not match benchmarks/results; run: python benchmarks/tables.py {page}")
        if not options.check:
            page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
