"""The module that guards all readers, and the description of fields: single cases, and rules for any JSON value."""

from __future__ import annotations

import contextlib
import errno
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="properties are tested with it")

from hypothesis import given, settings
from hypothesis import strategies as st

from blip2edge.bundle import fields
from blip2edge.errors import BundleError, DataError, UsageError
from blip2edge.reading import MAX_DEPTH, checking, parse_json, read_bytes, read_json, read_text, reading, unique_keys

settings.register_profile("offline", derandomize=True, database=None, deadline=None, max_examples=80)
settings.load_profile("offline")

TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=12
)


@pytest.mark.parametrize(
    "fault",
    [
        RecursionError(), OverflowError("int too large"), IndexError("list index"), AssertionError(), TypeError("a"),
        KeyError("key"), MemoryError(), EOFError(), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "why"), OSError("none"),
        ZeroDivisionError(), Warning("a warning"),
    ],
)  # fmt: skip
def test_every_exception_of_a_parser_is_the_declared_error(fault: Exception) -> None:
    told = r"a\.bin cannot be read as a shard \(.+\); copy"
    with pytest.raises(DataError, match=told) as caught, reading("a.bin", "a shard", DataError, "copy it again"):
        raise fault
    assert caught.value.__cause__ is fault
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", [UsageError("ours"), KeyboardInterrupt(), SystemExit(2), GeneratorExit()])
def test_our_errors_and_interrupts_pass(fault: BaseException) -> None:
    with pytest.raises(type(fault)) as caught, reading("a.bin", "a shard", DataError):
        raise fault
    assert caught.value is fault


def test_a_panic_of_a_library_in_rust_is_the_declared_error() -> None:
    class PanicException(BaseException):
        pass

    with pytest.raises(DataError, match="index out of bounds"), reading("a.bin", "a shard", DataError):
        raise PanicException("index out of bounds")


def test_a_fault_of_the_system_is_told_as_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a cannot be read \(Permission denied\)"), reading("a", "a shard", DataError):
        raise OSError(errno.EACCES, "Permission denied")
    with pytest.raises(BundleError, match="missing here"):
        read_json(tmp_path / "none", DataError, missing=BundleError("missing here"))
    with pytest.raises(DataError, match="No such file"):
        read_json(tmp_path / "none", DataError)
    with pytest.raises(DataError, match="Is a directory"):
        read_text(tmp_path, DataError)


def test_a_better_error_of_some_exceptions() -> None:
    def explain(fault: Exception) -> DataError | None:
        return DataError("explained") if isinstance(fault, (KeyError, FileNotFoundError)) else None

    for fault, missing, told in (
        (KeyError("a"), None, "explained"),
        (KeyError("a"), DataError("missing here"), "explained"),
        (FileNotFoundError(2, "none"), None, "explained"),
        (FileNotFoundError(2, "none"), DataError("missing here"), "missing here"),
        (IndexError("a"), None, "cannot be read as a shard"),
    ):
        guard = reading("a", "a shard", DataError, missing=missing, explain=explain)
        with pytest.raises(DataError, match=told), guard:
            raise fault


def test_bytes_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 10)
    assert read_bytes(path, 10) == b"x" * 10
    with pytest.raises(ValueError, match="at most 9 bytes"):
        read_bytes(path, 9)


@given(JSON)
def test_json_is_read_as_it_was_written(value: Any) -> None:
    assert parse_json(json.dumps(value), strict=True) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


@given(st.binary(max_size=40))
def test_any_bytes_are_json_or_a_declared_error(content: bytes) -> None:
    with contextlib.suppress(DataError), reading("a", "JSON", DataError):
        parse_json(content, strict=True)


@pytest.mark.parametrize("depth", [MAX_DEPTH, MAX_DEPTH + 1])
def test_the_depth_of_json(depth: int) -> None:
    text = "[" * depth + "]" * depth
    if depth <= MAX_DEPTH:
        parse_json(text)
    else:
        with pytest.raises(ValueError, match=f"at most {MAX_DEPTH} levels"):
            parse_json(text)


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", "-Infinity", '{"a": 1, "b": 2, "a": 3}'])
def test_what_is_refused_in_files_of_our_own(text: str) -> None:
    parse_json(text)
    with pytest.raises(ValueError, match=r"expected a number|is given twice"):
        parse_json(text, strict=True)


def test_many_keys_are_compared_in_little_time() -> None:
    pairs = [(f"key {number}", 0) for number in range(200_000)]
    assert len(unique_keys(pairs)) == len(pairs)
    with pytest.raises(ValueError, match="the key 'key 199999' is given twice"):
        unique_keys([*pairs, pairs[-1]])


def test_half_a_surrogate_pair_is_refused_and_a_whole_one_is_not() -> None:
    assert parse_json('"\\ud83d\\ude00"') == "😀"
    with pytest.raises(UnicodeEncodeError):
        parse_json('{"a": ["\\ud83d"]}')


def holds(check: fields.Check, value: Any) -> bool:
    try:
        check(value, "here")
    except ValueError:
        return False
    return True


SIMPLE: dict[str, tuple[fields.Check, Callable[[Any], bool]]] = {
    "whole": (fields.whole(-3, 9), lambda value: type(value) is int and -3 <= value <= 9),
    "number": (
        fields.finite_number(0, 2),
        lambda value: type(value) in (int, float) and math.isfinite(value) and 0 <= value <= 2,
    ),
    "flag": (fields.flag, lambda value: value is True or value is False),
    "one of": (fields.one_of_texts("a", "b"), lambda value: value in ("a", "b")),
    "null": (fields.nullable(fields.flag), lambda value: value is None or isinstance(value, bool)),
    "list": (
        fields.list_of(fields.flag, 1, 2),
        lambda value: isinstance(value, list) and 1 <= len(value) <= 2 and all(isinstance(one, bool) for one in value),
    ),
    "object": (
        fields.record({"a": fields.flag}, {"b": fields.flag}, closed=True),
        lambda value: (
            isinstance(value, dict)
            and {"a"} <= set(value) <= {"a", "b"}
            and all(isinstance(one, bool) for one in value.values())
        ),
    ),
}


@pytest.mark.parametrize("name", SIMPLE)
@given(
    value=JSON
    | st.integers(-5, 11)
    | st.lists(st.booleans(), max_size=3)
    | st.dictionaries(st.sampled_from("abc"), st.booleans())
)
def test_a_check_holds_for_its_values_only(name: str, value: Any) -> None:
    check, valid = SIMPLE[name]
    assert holds(check, value) == valid(value)


@pytest.mark.parametrize("value", [True, 1.0, "1", None, 10**400, float("nan"), [], {}])
def test_no_other_type_is_a_whole_number(value: Any) -> None:
    assert not holds(fields.whole(0, 5), value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400, True, "1", None])
def test_no_number_is_finite_but_one(value: Any) -> None:
    assert not holds(fields.finite_number(), value)


@pytest.mark.parametrize("value", ["", ".", "..", "a/b", "a\\b", "a\0", "a\n", "x" * 256, "é" * 128, 3, None])
def test_names_that_are_no_files_of_a_folder(value: Any) -> None:
    assert not holds(fields.file_name, value)
    assert holds(fields.file_name, "model.onnx.data")


def test_the_error_names_the_key_the_value_and_what_was_expected() -> None:
    check = fields.record({"graphs": fields.mapped(fields.text, fields.list_of(fields.whole(1, 3)))})
    with pytest.raises(ValueError, match=r"^graphs\.a\[1\]: expected a whole number from 1 to 3, got -5$"):
        check({"graphs": {"a": [1, -5]}}, "")
    with pytest.raises(ValueError, match=r"^graphs is missing$"):
        check({}, "")
    with pytest.raises(ValueError, match=r"got 'x+…$"):
        check({"graphs": "x" * 1000}, "")


def test_only_a_check_of_a_value_is_taken_for_a_fault_of_the_file() -> None:
    with (
        pytest.raises(DataError, match=r"a cannot be read as JSON \(size: expected 3\)"),
        checking("a", "JSON", DataError),
    ):
        raise ValueError("size: expected 3")
    with pytest.raises(KeyError), checking("a", "JSON", DataError):
        raise KeyError("size")
