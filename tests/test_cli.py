"""The command line: flags, exit statuses, one-line errors, JSON."""

from __future__ import annotations

import argparse
import ast
import errno
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from blip2edge import __version__
from blip2edge.bundle.bundle import Bundle
from blip2edge.cli import interrupt, main
from blip2edge.cli.messages import error_line, flag
from blip2edge.cli.parser import build_parser
from blip2edge.errors import BundleError, UsageError, option
from blip2edge.limits import Limits

COMMANDS = (
    "export",
    "caption",
    "ask",
    "match",
    "embed",
    "explain",
    "inspect",
    "sign",
    "verify",
    "certify",
    "push",
    "doctor",
    "completion",
    "build",
    "demo",
    "train",
    "eval",
    "calibrate",
    "optimize",
    "bulk",
    "capfilt",
    "watch",
    "serve",
    "triton",
    "bench",
    "plan",
)
ROOT = Path(__file__).resolve().parent.parent
JSON_KEYS = [
    "image",
    "prompt",
    "text",
    "tokens",
    "finish_reason",
    "timings_ms",
    "tokens_per_s",
    "logprob",
    "confidence",
    "queries",
    "token_logprobs",
]


def test_a_key_of_the_environment_is_not_in_the_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BLIP2EDGE_API_KEY", "s3cret")
    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve", "--help"])
    assert "s3cret" not in capsys.readouterr().out


@dataclass
class FakeResult:
    """Looks like a CaptionResult."""

    image: str
    prompt: str | None
    text: str = " a red circle"
    finish_reason: str = "eos"

    def to_json(self) -> dict[str, Any]:
        values = (
            self.image,
            self.prompt,
            self.text,
            [5, 2],
            self.finish_reason,
            {"total": 1.0},
            2.0,
            -0.1,
            None,
            8,
            [-0.1, 0],
        )
        return dict(zip(JSON_KEYS, values, strict=True))


@dataclass
class FakeCaptioner:
    """Records what the command line asks for."""

    loaded: list[tuple[str, str, int | None]] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    error: BaseException | None = None
    bundle: Any = None
    prompts: Any = field(
        default_factory=lambda: SimpleNamespace(question=lambda question: f"Question: {question} Answer:")
    )

    def __call__(
        self, bundle: SimpleNamespace, backend: str, threads: int | None, draft: str, limits: Limits
    ) -> FakeCaptioner:
        self.bundle = bundle
        if self.error is not None:
            raise self.error
        self.loaded.append((str(bundle.path), backend, threads))
        return self

    def options(self, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(num_beams=2, sampling=True)  # so that no option is without effect

    def caption_many(
        self,
        images: Sequence[str],
        *,
        prompts: Sequence[str] | None = None,
        batch_size: int = 1,
        return_exceptions: bool = False,
        **options: Any,
    ) -> Iterator[FakeResult]:
        assert return_exceptions
        self.calls.append({"batch_size": batch_size, **options})
        for index, image in enumerate(images):
            yield FakeResult(image, None if prompts is None else prompts[index])

    def stream(self, image: str, *, prompt: str | None = None, **options: Any) -> Iterator[str]:
        self.calls.append(options)
        yield from ("a", " red", " circle")
        yield "" if prompt is None else f" ({prompt})"


@pytest.fixture
def captioner(monkeypatch: pytest.MonkeyPatch) -> FakeCaptioner:
    fake = FakeCaptioner()
    module = ModuleType("blip2edge.runtime.captioning.captioner")
    module.Captioner = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "blip2edge.runtime.captioning.captioner", module)

    def opened(path: Path, require_signature: Path | None = None) -> SimpleNamespace:
        return SimpleNamespace(path=path, manifest=SimpleNamespace(prompt=None), unsigned=[])

    monkeypatch.setattr(Bundle, "open", opened)
    monkeypatch.setattr("blip2edge.bundle.bundle.load_whole", lambda path, load, **_: load(opened(path)))
    return fake


def one_error_line(text: str) -> str:
    lines = text.splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"usage: blip2edge {command}" in capsys.readouterr().out


def test_help_lists_what_works_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = re.findall(r"^    ([a-z]+)\b", capsys.readouterr().out, re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"blip2edge {__version__}\n"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["bake"],
        ["export", "checkpoint"],
        ["export", "checkpoint", "-o", "b", "--precision", "fp8"],
        ["export", "checkpoint", "-o", "b", "--merge-tokens", "-1"],
        ["export", "checkpoint", "-o", "b", "--merge-tokens", "half"],
        ["caption", "-b", "bundle"],
        ["caption", "a.png"],
        ["caption", "a.png", "-b", "b", "--max-new-tokens", "0"],
        ["caption", "a.png", "-b", "b", "--max-new-tokens", "many"],
        ["caption", "a.png", "-b", "b", "--top-p", "1.5"],
        ["caption", "a.png", "-b", "b", "--temperature", "nan"],
        ["caption", "a.png", "-b", "b", "--temperature", "-1"],
        ["caption", "a.png", "-b", "b", "--repetition-penalty", "0"],
        ["caption", "a.png", "-b", "b", "--backend", "tpu"],
        ["caption", "a.png", "-b", "b", "--json", "--stream"],
        ["caption", "a.png", "-b", "b", "--num-beam", "3"],
        ["caption", "a.png", "-b", "b", "--stream", "--num-beams", "3"],
        ["caption", "a.png", "-b", "b", "--min-new-tokens", "9", "--max-new-tokens", "3"],
        ["serve"],
        ["serve", "b", "-b", "b"],
        ["ask", "a.png", "-b", "b"],
        ["train", "stage9", "-c", "f", "-o", "d"],
        ["eval", "somewhere", "--count", "1"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines()[-1].startswith("error: ")


def test_caption_prints_text_and_passes_only_the_flags_given(
    captioner: FakeCaptioner, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["caption", "a.png", "-b", "bundle"]) == 0
    assert main(["caption", "a.png", "b.png", "-b", "bundle", "--backend", "cpu", "--threads", "2"]) == 0
    flags = "--max-new-tokens 9 --min-new-tokens 1 --num-beams 3 --length-penalty -1 --repetition-penalty 1.2"
    more = "--temperature 0.5 --top-p 0.9 --top-k 5 --seed 0 --batch-size 4"
    assert main(["caption", "a.png", "-b", "bundle", *flags.split(), *more.split()]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "a red circle",
        "a.png: a red circle",
        "b.png: a red circle",
        "a red circle",
    ]
    assert captioner.loaded[:2] == [("bundle", "auto", None), ("bundle", "cpu", 2)]
    assert captioner.calls == [
        {"batch_size": 1},
        {"batch_size": 1},
        {
            "batch_size": 4,
            "max_new_tokens": 9,
            "min_new_tokens": 1,
            "num_beams": 3,
            "length_penalty": -1.0,
            "repetition_penalty": 1.2,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 5,
            "seed": 0,
        },
    ]


def test_caption_json_is_one_object_a_line(captioner: FakeCaptioner, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["caption", "a.png", "b.png", "-b", "x", "--json", "--prompt", "one", "--prompt", "two"]) == 0
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [list(each) for each in objects] == [JSON_KEYS, JSON_KEYS]
    assert [each["prompt"] for each in objects] == ["one", "two"]


def test_one_prompt_serves_all_pictures(captioner: FakeCaptioner, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["caption", "a.png", "b.png", "-b", "x", "--json", "--prompt", "one"]) == 0
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == ["one", "one"]


def test_number_of_prompts_must_be_one_or_that_of_the_pictures(
    captioner: FakeCaptioner, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["caption", "a.png", "b.png", "c.png", "-b", "x", "--prompt", "one", "--prompt", "two"]) == 2
    assert "expected one --prompt for all pictures or one for each, got 2" in capsys.readouterr().err
    assert captioner.loaded == []  # found before the graphs are loaded


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["captoin", "a.png"], "caption"),
        (["captoin", "a.png", "--bundle", "b"], "caption"),
        (["captoin", "a.png", "-b", "b", "--json"], "caption"),
        (["--verison"], "--version"),
        (["caption", "a.png", "--bundel", "b"], "--bundle"),
        (["caption", "a.png", "-b", "b", "--max-new-token=3"], "--max-new-tokens"),
        (["caption", "a.png", "-b", "b", "--backend", "openvno"], "openvino"),
        (["serve", "b", "--prot", "1"], "--port"),
        (["train", "stge2", "-c", "f"], "stage2"),
    ],
)
def test_did_you_mean(words: list[str], meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert f"; did you mean {meant}?; see blip2edge" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("score", "metric"),
    [
        *[(score, "captions") for score in ("cider", "CIDEr", "cider-d", "bleu", "bleu_4", "rouge", "rouge_l")],
        *[("vqa_accuracy", "vqa"), ("exact_match", "exact"), ("clipscore", "clip"), ("recall", "retrieval")],
        ("chari", "chair"),
    ],
)
def test_the_name_of_a_score_suggests_its_metric(score: str, metric: str, capsys: pytest.CaptureFixture[str]) -> None:
    """CHAIR is the name most similar to CIDEr, and has nothing to do with it."""
    assert main(["eval", "model", "--metrics", score]) == 2
    assert f"did you mean {metric}?" in capsys.readouterr().err


def test_scores_that_are_not_computed_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    for score in ("meteor", "SPICE"):
        assert main(["eval", "model", "--metrics", score]) == 2
        assert f"{score} is not computed, because it needs Java; did you mean captions?" in capsys.readouterr().err


def test_a_model_or_data_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = Path(__file__).parents[1] / "examples" / "checkpoint"
    (tmp_path / "file").touch()
    for words, said in (
        (["nowhere"], "there is no directory nowhere; give a bundle, hub:ORG/NAME, or a checkpoint directory"),
        ([str(tmp_path / "file")], "file is not a directory; give a bundle"),
        ([str(tmp_path)], "is neither a bundle (no bundle.json) nor a checkpoint (no config.json)"),
        ([str(checkpoint), "--data", "nowhere"], "there is no file or folder nowhere; check the path"),
        ([str(checkpoint), "--data", str(tmp_path / "file")], "expected COCO's JSON"),
    ):
        assert main(["eval", *words]) == 1
        assert said in capsys.readouterr().err


def test_no_suggestion_without_a_similar_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["caption", "a.png", "-b", "b", "--zzz"]) == 2
    assert "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize("given", [["b"], ["-b", "b"], ["-bb"], ["--bundle", "b"], ["--bundle=b"]], ids=" ".join)
@pytest.mark.parametrize(
    ("command", "rest"),
    [
        ("calibrate", ["-o", "x", "--images", "y"]),
        ("optimize", ["--backend", "cpu"]),
        ("serve", []),
        ("inspect", []),
        ("build", []),
        ("bench", []),
        ("eval", []),
    ],
)
def test_bundle_by_its_place_or_by_the_flag(command: str, rest: list[str], given: list[str]) -> None:
    for words in ([command, *rest, *given], [command, *given, *rest]):
        options = build_parser(words).parse_args(words)
        assert str(options.model if command == "eval" else options.bundle) == "b"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["serve"], "the following arguments are required: BUNDLE (or -b BUNDLE)"),
        (["inspect", "a", "-b", "b"], "unrecognized arguments: a; BUNDLE is given by -b"),
    ],
)
def test_bundle_missing_or_given_twice(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["bulk", "{}", "-o", "out", "-b", "bundle"],
        ["bulk", "-o", "out", "-b", "bundle", "{}"],
        ["calibrate", "bundle", "-o", "out", "--images", "{}"],
        ["watch", "{}", "-b", "bundle"],
    ],
)
def test_a_pattern_that_the_shell_replaced(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(tmp_path / f"{number}.png") for number in range(6)]
    for file in files:
        Path(file).touch()
    assert main([part for word in words for part in (files if word == "{}" else [word])]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: unrecognized arguments: {' '.join(files[1:4])} … (5 in all); if the shell replaced")
    assert main(["bulk", files[0], "no-file", "-o", "out", "-b", "bundle"]) == 2
    assert "replaced" not in capsys.readouterr().err


def test_a_bundle_named_by_a_dot(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_bundle)
    for name in (".", f"../{tiny_bundle.name}/.", "./"):
        assert main(["inspect", "--verify", name]) == 0


def test_every_command_that_reads_a_bundle_takes_the_flag() -> None:
    parsers: dict[str, argparse.ArgumentParser] = {}
    for action in build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers.update(action.choices)
    without = {name for name, parser in parsers.items() if "--bundle" not in parser._option_string_actions}
    assert without == {
        *("export", "doctor", "completion", "demo", "train"),
        "capfilt",  # --captioner and --matcher
    }


def test_stream_writes_the_pieces_of_a_caption(captioner: FakeCaptioner, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["caption", "a.png", "b.png", "-b", "x", "--stream", "--seed", "3"]) == 0
    assert capsys.readouterr().out == "a.png: a red circle\nb.png: a red circle\n"
    assert captioner.calls == [{"seed": 3}, {"seed": 3}]


def test_ask(captioner: FakeCaptioner, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", "a.png", "is it red?", "-b", "x", "--num-beams", "2"]) == 0
    assert capsys.readouterr().out == "a red circle\n"
    assert captioner.calls == [{"batch_size": 1, "num_beams": 2}]


def test_ask_streams_with_the_question_template(captioner: FakeCaptioner, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", "a.png", "is it red?", "-b", "x", "--stream"]) == 0
    assert capsys.readouterr().out == "a red circle (Question: is it red? Answer:)\n"


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (BundleError("x is no bundle", "export it"), 1, "error: x is no bundle; export it"),
        (UsageError("top_p is 2"), 2, "error: top_p is 2"),
        (KeyError("a\nb"), 1, r"error: unexpected KeyError: 'a\nb'; run the command with --debug"),
        (OSError(errno.ENOSPC, "No space left on device", "out/decoder.onnx"), 1, "error: the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 1, "error: out: Permission denied"),
        (ModuleNotFoundError("no", name="onnxruntime"), 1, "pip install 'blip2edge[cpu]'"),
        (MemoryError(), 1, "error: memory ran out"),
    ],
)
def test_errors_are_one_line(
    error: Exception, status: int, told: str, captioner: FakeCaptioner, capsys: pytest.CaptureFixture[str]
) -> None:
    captioner.error = error
    assert main(["caption", "a.png", "-b", "x"]) == status
    assert told in one_error_line(capsys.readouterr().err)


@pytest.mark.parametrize("words", [["--debug", "caption"], ["caption", "--debug"]])
def test_debug_shows_the_traceback(
    words: list[str], captioner: FakeCaptioner, capsys: pytest.CaptureFixture[str]
) -> None:
    captioner.error = BundleError("x is no bundle")
    assert main([*words, "a.png", "-b", "x"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert shown.splitlines()[-1] == "error: x is no bundle"


def test_interrupt_is_one_line_and_130(captioner: FakeCaptioner, capsys: pytest.CaptureFixture[str]) -> None:
    captioner.error = KeyboardInterrupt()
    assert main(["caption", "a.png", "-b", "x"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_exception_that_a_swallowed_signal_left_behind(
    captioner: FakeCaptioner, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when SIGTERM comes inside an extension, which then fails with an error of its own."""
    monkeypatch.setattr(interrupt, "_received", [])
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def swallowing(*_: Any, **__: Any) -> Any:
        try:
            signal.raise_signal(signal.SIGTERM)
        except interrupt.Interrupted as error:
            raise ValueError("could not determine the shape") from error

    monkeypatch.setattr(FakeCaptioner, "caption_many", swallowing)
    try:
        interrupt.install()
        assert main(["caption", "a.png", "-b", "bundle"]) == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "interrupted\n"


def test_inspect_of_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "none")]) == 1
    one_error_line(capsys.readouterr().err)
    assert main(["eval", str(tmp_path)]) == 1
    assert "neither a bundle" in one_error_line(capsys.readouterr().err)


def test_broken_pipe_is_quiet() -> None:
    reader = "import sys; sys.exit(0)"  # goes away without reading a byte
    command = f"{sys.executable} -m blip2edge doctor; echo status $? >&2"
    done = subprocess.run(
        ["bash", "-c", f"( {command} ) | {sys.executable} -c '{reader}'"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == "status 141\n"


def test_process_status_and_streams(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "blip2edge", "inspect", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in one_error_line(done.stderr)


def test_explain_names_the_extra() -> None:
    told = error_line(ModuleNotFoundError("No module named 'torch'", name="torch.nn"))
    assert told == "the package 'torch' is not installed; install it: pip install 'blip2edge[export]'"


HELP = """
import io, sys
from contextlib import redirect_stdout
from blip2edge.cli import main
from blip2edge.cli.parser import COMMANDS, build_parser

with redirect_stdout(io.StringIO()):
    assert main(["--help"]) == 0
imported = {name.rpartition(".")[2] for name in sys.modules if name.startswith("blip2edge.cli.")}
assert not imported & set(COMMANDS), imported
build_parser()
assert set(COMMANDS) <= {name.rpartition(".")[2] for name in sys.modules if name.startswith("blip2edge.cli.")}
print([name for name in ("numpy", "PIL", "torch", "onnx", "onnxruntime") if name in sys.modules])
"""


def test_help_waits_for_no_heavy_package() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_errors_name_flags(captioner: FakeCaptioner, capsys: pytest.CaptureFixture[str]) -> None:
    captioner.error = UsageError(f"expected {option('max_new_tokens')} of at least 1", field="max_new_tokens")
    assert main(["caption", "a.png", "-b", "x"]) == 2
    assert capsys.readouterr().err == "error: expected --max-new-tokens of at least 1\n"


def test_options_in_errors_are_flags() -> None:
    """A text that names an option by :func:`option` reads as a flag of some command."""
    flags: set[str] = set()
    for action in build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            flags.update(name for parser in action.choices.values() for name in parser._option_string_actions)
    named = {
        call.args[0].value
        for folder in (
            "blip2edge",
            "bulk",
            "calibration",
            "engine",
            "export",
            "model",
            "optimization",
            "runtime",
            "training",
        )
        for path in (ROOT / folder).rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "option"
        if isinstance(call.args[0], ast.Constant)
    }
    assert len(named) > 30
    assert {name for name in named if flag(str(name), True) not in flags} == set()
