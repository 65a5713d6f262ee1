"""Text from the bytes of tokens: whole characters, stop strings across borders, each token once."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacancel.engine.text import TextAssembler


def assemble(parts: list[bytes], stop: tuple[str, ...] = ()) -> tuple[list[str], list[int], str | None]:
    """The pieces, the numbers of the parts that were given with them, and the stop string."""
    assembler: TextAssembler[int] = TextAssembler(stop)
    pieces, items = [], []
    for i, part in enumerate(parts):
        text, completed = assembler.feed(part, i)
        pieces.append(text)
        items += completed
        if assembler.stopped is not None:
            break
    text, completed = assembler.finish()
    return [*pieces, text], items + completed, assembler.stopped


def cut_up(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def test_text_is_given_out_as_soon_as_it_is_there() -> None:
    pieces, items, stopped = assemble([b"Hello", b" ", b"world"])
    assert pieces == ["Hello", " ", "world", ""]
    assert items == [0, 1, 2]
    assert stopped is None


def test_part_of_a_character_waits_for_the_rest() -> None:
    pieces, items, _ = assemble([b"a\xe4", b"\xbd", b"\xa0b"])
    assert pieces == ["a", "", "你b", ""]
    assert items == [0, 1, 2]


def test_a_token_is_told_when_its_last_character_is_complete() -> None:
    assembler: TextAssembler[str] = TextAssembler()
    assert assembler.feed(b"a\xf0\x9f", "first") == ("a", [])
    assert assembler.feed(b"\x98\x80", "second") == ("😀", ["first", "second"])


def test_a_character_that_never_ends_becomes_a_replacement_at_the_end_only() -> None:
    assert assemble([b"ab\xe4", b"\xbd"]) == (["ab", "", "\ufffd"], [0, 1], None)


def test_bytes_that_are_no_utf_8_become_replacements_at_once() -> None:
    assert assemble([b"a\xffb", b"c"])[0] == ["a\ufffdb", "c", ""]


def test_a_token_without_text_is_told_with_what_comes() -> None:
    assert assemble([b"a", b"", b"b"])[1] == [0, 1, 2]


@pytest.mark.parametrize(
    ("parts", "stop", "text", "items", "found"),
    [
        ([b"one STOP two"], ("STOP",), "one ", [0], "STOP"),
        ([b"one S", b"TO", b"P two"], ("STOP",), "one ", [0], "STOP"),
        ([b"one S", b"TO", b"X two"], ("STOP",), "one STOX two", [0, 1, 2], None),
        ([b"a", b"ST", b"OP"], ("STOP",), "a", [0], "STOP"),
        ([b"STOP"], ("STOP",), "", [], "STOP"),
        ([b"aab", b"aac"], ("aac",), "aab", [0], "aac"),
        ([b"aa", b"aac"], ("aac",), "aa", [0], "aac"),
        ([b"x first second"], ("second", "first"), "x ", [0], "first"),
        ([b"abcd"], ("abcd", "abc"), "", [], "abc"),
        ([b"abcd"], ("bc", "abc"), "", [], "abc"),
        ([b"abcd"], ("abcd", "bc"), "a", [0], "bc"),
        ([b"wait\n", b"\n", b"more"], ("\n\n",), "wait", [0], "\n\n"),
        ([b"end S", b"TO"], ("STOP",), "end STO", [0, 1], None),
        ([b"a\xe4", b"\xbd\xa0b"], ("你",), "a", [0], "你"),
        ([b"ab\xe4"], ("\ufffd",), "ab", [0], "\ufffd"),
    ],
)
def test_a_stop_string_ends_the_text_before_it(
    parts: list[bytes], stop: tuple[str, ...], text: str, items: list[int], found: str | None
) -> None:
    pieces, told, stopped = assemble(parts, stop)
    assert "".join(pieces) == text
    assert told == items
    assert stopped == found


def test_what_may_become_a_stop_string_is_held_back_and_no_more() -> None:
    assembler: TextAssembler[int] = TextAssembler(["\n\nUser:", "END"])
    assert assembler.feed(b"well.\n", 0) == ("well.", [])
    assert assembler.feed(b"\nU", 1) == ("", [])
    assert assembler.feed(b"ncle E", 2) == ("\n\nUncle ", [0, 1])
    assert assembler.finish() == ("E", [2])


@given(st.text(max_size=40), st.lists(st.integers(0, 200), max_size=12))
def test_text_comes_out_as_it_went_in_wherever_it_was_cut(text: str, places: list[int]) -> None:
    parts = cut_up(text.encode("utf-8", "surrogatepass").decode("utf-8", "replace").encode(), places)
    pieces, items, stopped = assemble(parts)
    assert "".join(pieces) == b"".join(parts).decode()
    assert items == list(range(len(parts)))
    assert stopped is None


@given(st.binary(max_size=40), st.lists(st.integers(0, 200), max_size=12))
def test_any_bytes_come_out_as_one_decode_gives_them_wherever_they_were_cut(data: bytes, places: list[int]) -> None:
    parts = cut_up(data, places)
    pieces, items, _ = assemble(parts)
    assert "".join(pieces) == data.decode("utf-8", "replace")
    assert items == list(range(len(parts)))


@given(
    st.text("abé", max_size=30),
    st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(0, 200), max_size=12),
)
def test_the_first_stop_string_is_found_wherever_the_text_was_cut(
    text: str, stops: list[str], places: list[int]
) -> None:
    pieces, items, stopped = assemble(cut_up(text.encode(), places), tuple(stops))
    end = min((text.index(stop) + len(stop) for stop in stops if stop in text), default=None)
    if end is None:
        assert ("".join(pieces), stopped) == (text, None)
    else:
        longest = max((stop for stop in stops if text[:end].endswith(stop)), key=len)
        assert ("".join(pieces), stopped) == (text[: end - len(longest)], longest)
    assert items == list(range(len(items)))


@given(st.text("ab", max_size=30), st.lists(st.integers(0, 200), max_size=12))
def test_each_piece_was_final_when_it_was_given(text: str, places: list[int]) -> None:
    assembler: TextAssembler[int] = TextAssembler(["aab", "bb"])
    given = ""
    for i, part in enumerate(cut_up(text.encode(), places)):
        given += assembler.feed(part, i)[0]
        if assembler.stopped:
            break
    whole = "".join(assemble([text.encode()], ("aab", "bb"))[0])
    assert whole.startswith(given)
