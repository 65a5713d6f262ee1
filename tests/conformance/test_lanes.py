"""The picture holds what was seen, at its place, and is well-formed SVG."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from llamacancel.conformance.lanes import KINDS, MARKS, Band, Lane, draw

SVG = "{http://www.w3.org/2000/svg}"

BAND = Band(
    "queued-hang-up",
    [
        Lane("active <1>", [("prefill", 0.0, 0.5), ("streaming", 0.5, 4.0)], [("answered", 4.0, "")]),
        Lane("queued & gone", [("queued", 1.0, 2.0)], [("hang-up", 2.0, "hung up")]),
    ],
    "A note.",
    "passed",
)


def bars(picture: str) -> dict[str, tuple[float, float]]:
    """Where each span is drawn: (left, right), by its tooltip."""
    found = {}
    for rect in ElementTree.fromstring(picture).iter(f"{SVG}rect"):
        title = rect.find(f"{SVG}title")
        if title is not None:
            left = float(rect.attrib["x"])
            found[str(title.text)] = (left, left + float(rect.attrib["width"]))
    return found


def texts(picture: str) -> list[str]:
    return [str(text.text) for text in ElementTree.fromstring(picture).iter(f"{SVG}text")]


def test_titles_names_notes_and_labels_are_there_whatever_characters_they_have() -> None:
    found = texts(draw([BAND], title="Who & what", note="All of it."))
    for words in ("Who & what", "All of it.", "queued-hang-up", "A note.", "passed", "active <1>", "queued & gone"):
        assert words in found


def test_spans_are_to_scale() -> None:
    found = bars(draw([BAND]))
    prefill, streaming, queued = (
        next(at for title, at in found.items() if words in title)
        for words in ("until the first", "streaming", "queued,")
    )
    second = (streaming[1] - prefill[0]) / 4
    assert prefill[1] == pytest.approx(streaming[0], abs=0.2)
    assert streaming[0] - prefill[0] == pytest.approx(0.5 * second, abs=0.3)
    assert (queued[0] - prefill[0], queued[1] - prefill[0]) == pytest.approx((second, 2 * second), abs=0.3)


def test_the_legend_shows_what_occurs_and_nothing_else() -> None:
    found = texts(draw([BAND]))
    occurring = {"queued", "prefill", "streaming", "answered", "hang-up"}
    for name, description in {**KINDS, **MARKS}.items():
        assert (description.label in found) == (name in occurring), name


def test_every_kind_and_mark_can_be_drawn() -> None:
    lane = Lane("all", [(kind, i, i + 1) for i, kind in enumerate(KINDS)], [(mark, 1.0, mark) for mark in MARKS])
    picture = draw([Band("all", [lane])])
    assert len(bars(picture)) == len(KINDS)
    assert set(MARKS) <= set(texts(picture))


@pytest.mark.parametrize("last", [0.0, 1e-5, 0.003, 0.7, 1.0, 12.0, 59.0, 3600.0])
def test_the_axis_has_a_few_round_ticks_and_reaches_the_end(last: float) -> None:
    picture = draw([Band("b", [Lane("l", [("prefill", 0.0, last)])])])
    root = ElementTree.fromstring(picture)
    ticks = [
        float(str(text.text).removesuffix(" s")) for text in root.iter(f"{SVG}text") if "small" in text.get("class", "")
    ]
    assert 3 <= len(ticks) <= 10
    assert ticks == sorted(ticks)
    assert ticks[-1] >= last * 0.999


def test_everything_lies_within_the_picture() -> None:
    long = Lane("a name that is much longer than anybody would give to a lane in a picture of this width", [])
    root = ElementTree.fromstring(draw([Band("b", [long, *BAND.lanes]), BAND], width=700))
    height = float(root.attrib["height"])
    for rect in root.iter(f"{SVG}rect"):
        assert float(rect.get("x", 0)) >= 0
        assert float(rect.get("x", 0)) + float(rect.attrib["width"]) <= 700
        assert float(rect.get("y", 0)) + float(rect.attrib["height"]) <= height


def test_a_kind_that_is_not_described_is_refused() -> None:
    with pytest.raises(KeyError):
        draw([Band("b", [Lane("l", [("nonsense", 0.0, 1.0)])])])


def test_a_picture_of_nothing_is_a_picture() -> None:
    assert ElementTree.fromstring(draw([], title="Nothing")).tag == f"{SVG}svg"


def test_colours_differ_for_people_who_see_them_differently() -> None:
    looks = [(kind.colour, kind.fill) for kind in KINDS.values()]
    assert len(set(looks)) == len(looks)
    assert len({(mark.colour, mark.shape) for mark in MARKS.values()}) == len(MARKS)
