"""``--format``: number formats of graphs and of single matrices."""

from __future__ import annotations

import pytest

pytest.importorskip("onnx_ir", reason="graphs are changed with onnx_ir")

from blip2edge.calibration.formats import (
    FormatRule,
    GraphFormat,
    NumberFormat,
    check_inputs,
    check_matches,
    choose_graph_formats,
)
from blip2edge.calibration.weights.blocks import BlockFormat
from blip2edge.errors import UsageError

GRAPHS = ("vision_encoder", "bridge", "decoder", "draft")


@pytest.mark.parametrize("text", ["float", "fp16", "w8a8", "int8", "int4", "int8/32", "int4/128"])
def test_a_format_is_written_as_it_is_read(text: str) -> None:
    assert str(NumberFormat.parse(text)) == text


@pytest.mark.parametrize("text", ["int5", "float/32", "int8/128", "int4/", "int4/33", ""])
def test_a_format_that_does_not_exist(text: str) -> None:
    with pytest.raises(UsageError, match=r"expected one of float, fp16, w8a8, int8, int4, int8/64"):
        NumberFormat.parse(text)


@pytest.mark.parametrize("text", ["decoder=int4/32", "decoder:*.layers.0.*=int8"])
def test_a_rule_is_written_as_it_is_read(text: str) -> None:
    assert str(FormatRule.parse(text)) == text


@pytest.mark.parametrize("text", ["decoder", "=int8", "decoder:=int8", "decoder=int8=int4"])
def test_a_rule_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UsageError, match="GRAPH=FORMAT or GRAPH:PATTERN=FORMAT"):
        FormatRule.parse(text)


@pytest.mark.parametrize(("text", "width", "block"), [("int4", 576, 64), ("int4/32", 512, 32), ("int8/64", 96, 32)])
def test_a_block_is_the_largest_that_divides_the_width(text: str, width: int, block: int) -> None:
    form = NumberFormat.parse(text)
    assert form.for_width(width) == BlockFormat(form.bits or 0, block)
    assert form.for_width(100) is None


def formats(*rules: str, weights: str | None = "int8") -> dict[str, str]:
    parsed = [FormatRule.parse(rule) for rule in rules]
    chosen = choose_graph_formats(GRAPHS, ("vision_encoder", "bridge"), weights, parsed)
    return {name: str(form) for name, form in chosen.items()}


def test_the_formats_of_plain_flags() -> None:
    assert formats() == {"vision_encoder": "w8a8", "bridge": "w8a8", "decoder": "int8", "draft": "int8"}
    assert formats(weights=None)["decoder"] == "float"


def test_a_rule_comes_before_the_plain_flags() -> None:
    assert formats("bridge=float", "decoder=int4", "decoder=int4/32") == {
        "vision_encoder": "w8a8", "bridge": "float", "decoder": "int4/32", "draft": "int8",
    }  # fmt: skip


def test_the_last_pattern_that_matches_counts() -> None:
    form = GraphFormat(
        NumberFormat("int4"), (("*.layers.1.*", NumberFormat("int8")), ("*.fc1*", NumberFormat("float")))
    )
    names = ("a.layers.0.fc2", "a.layers.1.fc2", "a.layers.10.fc2", "a.layers.1.fc1")
    assert [str(form.of(name)) for name in names] == ["int4", "int8", "int4", "float"]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("vision=float", "expected one of the graphs vision_encoder, bridge, decoder, draft, got vision"),
        ("bridge:*=int8", r"bridge is in w8a8, so its matrices \* cannot be in int8"),
        ("decoder:*=w8a8", r"decoder is in int8, so its matrices \* cannot be in w8a8"),
    ],
)
def test_formats_that_do_not_fit(rule: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        formats(rule)


WEIGHTS = ("model.layers.0.fc1.weight", "model.layers.0.fc2.weight", "lm_head.weight")


def test_a_pattern_that_matches_no_matrix() -> None:
    check_matches([FormatRule.parse("decoder:*.fc1.*=float"), FormatRule.parse("draft=int8")], lambda graph: WEIGHTS)
    with pytest.raises(UsageError, match=r"layers.0.fc3\* matches no matrix of decoder; .*are model.layers.0.fc"):
        check_matches([FormatRule.parse("decoder:model.layers.0.fc3*=float")], lambda graph: WEIGHTS)
    with pytest.raises(UsageError, match="decoder has no such matrices"):
        check_matches([FormatRule.parse("decoder:*=float")], lambda graph: ())


@pytest.mark.parametrize("rule", ["draft=int4/32", "draft=w8a8", "draft:*.fc1=int4"])
def test_a_rule_that_needs_inputs(rule: str) -> None:
    with pytest.raises(UsageError, match=r"needs recorded inputs of the graph draft, which does not run"):
        check_inputs([FormatRule.parse(rule)], lambda graph: graph != "draft")


def test_rules_that_need_no_inputs_hold() -> None:
    rules = [FormatRule.parse(rule) for rule in ("draft=int8/32", "draft:*.fc1=float", "decoder=int4")]
    check_inputs(rules, lambda graph: graph != "draft")
    form = GraphFormat(NumberFormat("int8", 32), (("*.fc1", NumberFormat("float")),))
    assert form.without_inputs() == form
    assert str(GraphFormat(NumberFormat("int4")).without_inputs()) == "int8"
