"""Text that is shown as tokens come is the text of the whole response."""

from __future__ import annotations

import random

import pytest

from lockstep.rollout.endpoint.text import TextStream, whole_text


def as_bytes(token_ids: list[int]) -> str:
    """A tokenizer whose tokens are single bytes."""
    return bytes(token_ids).decode("utf-8", errors="replace")


def shown(text: str, stop: tuple[str, ...] = ()) -> list[str]:
    """What appears with each byte, and at the end."""
    stream = TextStream(as_bytes, stop)
    return [stream.push(byte) for byte in text.encode()] + [stream.close()]


def test_a_character_appears_when_its_last_byte_has_come() -> None:
    assert shown("aΩ😀b") == ["a", "", "Ω", "", "", "", "😀", "b", ""]


def test_half_a_character_at_the_end_is_shown_as_what_it_is() -> None:
    stream = TextStream(as_bytes, ())
    assert [stream.push(byte) for byte in "a😀".encode()[:-1]] == ["a", "", "", ""]
    assert stream.close() == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("one STOP", ("STOP",), ["o", "n", "e", " ", "", "", "", "", ""]),
        ("aSTa", ("STOP",), ["a", "", "", "STa", ""]),
        ("aST", ("STOP",), ["a", "", "", "ST"]),
        ("xSSTOPy", ("STOP",), ["x", "", "S", "", "", "", "", ""]),
        ("abcd", ("cd", "bcx"), ["a", "", "", "b", ""]),
    ],
)
def test_what_may_begin_a_stop_string_is_held_back(text: str, stop: tuple[str, ...], wanted: list[str]) -> None:
    assert shown(text, stop) == wanted


@pytest.mark.parametrize("seed", range(20))
def test_pieces_make_the_whole_whatever_the_text(seed: int) -> None:
    draw = random.Random(seed)
    text = "".join(draw.choice("aabΩ😀é") for _ in range(40))
    stop = tuple("".join(draw.choice("abΩ") for _ in range(draw.randrange(1, 4))) for _ in range(draw.randrange(3)))
    tokens = list(text.encode())
    wanted = whole_text(as_bytes, stop, tokens)
    assert "".join(shown(text, stop)) == wanted
    assert not any(s in wanted for s in stop)
    assert text.startswith(wanted)
