"""Reading fields: every fault is told, with its pointer."""

import re
import sys
from collections.abc import Callable
from unicodedata import bidirectional, category

import pytest

from rdev.domain.errors import ErrorCode, Fault, RdevError
from rdev.domain.fields import Characters, Fields, text_fault

LONE = "\ud800"


def _fault(read: Callable[[Fields], object], value: object) -> str | None:
    """What is wrong with the field `it`; None when it was read."""
    fields = Fields({"it": value})
    found = read(fields)
    if not fields.faults:
        return None
    assert found is None
    [fault] = fields.faults
    assert fault.pointer == "/it"
    return fault.message


@pytest.mark.parametrize("value", ["a", "äöü", "x" * 8, None])
def test_a_text_is_read(value: str | None) -> None:
    fields = Fields({"it": value})
    assert fields.text("it", max_bytes=8) == value
    fields.finish()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1, "must be a string"),
        ("", "must not be empty"),
        ("x" * 9, "must be at most 8 bytes (it has 9)"),
        ("äääää", "must be at most 8 bytes (it has 10)"),
        ("a\0b", "must not contain control characters (it has U+0000)"),
        ("a\u202eb", "must not contain control characters (it has U+202E)"),
        (LONE, "must be valid Unicode (it has a lone surrogate)"),
    ],
)
def test_a_text_that_cannot_be_used_is_a_fault(value: object, message: str) -> None:
    assert _fault(lambda fields: fields.text("it", max_bytes=8), value) == message


ALL = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF]


def test_a_line_has_every_character_but_those_that_control() -> None:
    """Unicode's own tables say which: category Cc, the separators, the property Bidi_Control."""
    refused = {one for one in ALL if text_fault(one, Characters.LINE) is not None}
    controls = {one for one in ALL if category(one) in ("Cc", "Zl", "Zp")}
    # What turns the direction has a bidirectional class of its own, but for the three marks.
    turning = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    marks = set("\u061c\u200e\u200f")
    assert refused == controls | marks | {one for one in ALL if bidirectional(one) in turning}


def test_a_wider_text_has_what_its_rule_names() -> None:
    every = "".join(ALL[1:])
    assert text_fault(every, Characters.NO_NUL) is None
    assert text_fault("a\0b", Characters.NO_NUL) == "must not contain NUL"
    assert text_fault("\0" + every, Characters.ANY) is None
    for characters in Characters:
        assert text_fault(LONE, characters) == "must be valid Unicode (it has a lone surrogate)"
    body = {"it": "a\0b"}
    assert Fields(body).text("it", max_bytes=8, characters=Characters.ANY) == "a\0b"


def test_a_text_must_match_its_pattern_as_a_whole() -> None:
    pattern = re.compile("[a-z]+")
    assert Fields({"it": "abc"}).text("it", max_bytes=8, pattern=pattern) == "abc"
    free = Characters.NO_NUL
    message = _fault(
        lambda fields: fields.text("it", max_bytes=8, pattern=pattern, characters=free), "abc\n"
    )
    assert message == "must match [a-z]+"


@pytest.mark.parametrize("body", [{}, {"it": None}])
def test_a_required_field_is_missed(body: dict[str, object]) -> None:
    fields = Fields(body)
    assert fields.text("it", max_bytes=8, required=True) is None
    assert fields.texts("it", max_items=1, max_bytes=8, required=True) is None
    assert fields.faults == [Fault(pointer="/it", message="is required")] * 2


@pytest.mark.parametrize("value", [1, 7, None])
def test_a_number_is_read(value: int | None) -> None:
    assert Fields({"it": value}).integer("it", least=1, most=7) == value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("1", "must be a whole number"),
        (1.5, "must be a whole number"),
        (True, "must be a whole number"),
        (0, "must be from 1 to 7"),
        (8, "must be from 1 to 7"),
    ],
)
def test_a_number_that_cannot_be_used_is_a_fault(value: object, message: str) -> None:
    assert _fault(lambda fields: fields.integer("it", least=1, most=7), value) == message


def test_a_whole_number_may_be_written_with_a_point() -> None:
    assert Fields({"it": 2.0}).integer("it", least=1, most=7) == 2


def test_a_choice_is_one_of_a_list() -> None:
    assert Fields({"it": "a"}).choice("it", ["a", "b"]) == "a"
    assert Fields({}).choice("it", ["a", "b"]) is None
    for value in ("c", 1, ["a"]):
        message = _fault(lambda fields: fields.choice("it", ["a", "b"]), value)
        assert message == "must be one of a, b"


def test_texts_are_read_and_may_be_empty() -> None:
    assert Fields({"it": ["a", ""]}).texts("it", max_items=2, max_bytes=3) == ("a", "")
    assert Fields({}).texts("it", max_items=2, max_bytes=3) is None


def test_texts_that_are_no_list_or_too_many_are_a_fault() -> None:
    def read(fields: Fields) -> object:
        return fields.texts("it", max_items=2, max_bytes=3)

    assert _fault(read, "abc") == "must be a list of strings"
    assert _fault(read, ["a", "b", "c"]) == "must have at most 2 items"


def test_every_wrong_item_is_told() -> None:
    fields = Fields({"it": ["ok", 1, "long", "\0"]})
    assert fields.texts("it", max_items=4, max_bytes=3) is None
    assert [fault.pointer for fault in fields.faults] == ["/it/1", "/it/2", "/it/3"]


def test_a_mapping_is_an_object() -> None:
    assert Fields({"it": {"a": 1}}).mapping("it") == {"a": 1}
    assert Fields({}).mapping("it") is None
    assert _fault(lambda fields: fields.mapping("it"), []) == "must be an object"


def test_pointers_are_escaped_and_relative_to_the_body() -> None:
    fields = Fields({}, pointer="/items/0")
    fields.fault("a/b~c", "is wrong", within="~/")
    assert fields.faults == [Fault(pointer="/items/0/a~1b~0c/~0~1", message="is wrong")]


def test_a_fault_of_size_names_its_limit() -> None:
    fields = Fields({"it": "x" * 9, "many": ["a", "b"], "items": ["long"]})
    fields.text("it", max_bytes=8)
    fields.texts("many", max_items=1, max_bytes=8)
    fields.texts("items", max_items=1, max_bytes=3)
    fields.text("absent", max_bytes=1, required=True)
    assert [fault.limit for fault in fields.faults] == ["it", "many", "items", None]


def test_unknown_fields_and_all_faults_are_raised_together() -> None:
    fields = Fields({"it": 1, "other": 2, "known": 3})
    fields.text("it", max_bytes=8)
    fields.ignore("known")
    with pytest.raises(RdevError) as caught:
        fields.finish()
    assert caught.value.code is ErrorCode.BAD_REQUEST
    assert [(one.pointer, one.message) for one in caught.value.faults] == [
        ("/it", "must be a string"),
        ("/other", "is not a known field"),
    ]
