"""From tokens, one after the other, to text that may be shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Turns tokens into text as they come, whole characters at a time; a stop string and what follows is never shown.

    Args:
        decode: turns token ids into text.
        stop: texts that end the response.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str]) -> None:
        self._decode = decode
        self._stop = stop
        self._tokens: list[int] = []
        self._begin = self._read = 0
        """Tokens whose text is out end at `_read`; decoding begins before them, as some tokens look back."""
        self._held = ""
        self._has_stopped = False

    def push(self, token: int) -> str:
        """The text that the token completes; it may be empty."""
        self._tokens.append(token)
        return self._show(self._decoded(), is_last=False)

    def close(self) -> str:
        """What was held back as the possible beginning of a character or of a stop string."""
        before = self._decode(self._tokens[self._begin : self._read])
        rest = self._decode(self._tokens[self._begin :])[len(before) :]
        self._begin = self._read = len(self._tokens)
        return self._show(rest, is_last=True)

    def _decoded(self) -> str:
        before = self._decode(self._tokens[self._begin : self._read])
        now = self._decode(self._tokens[self._begin :])
        if now.endswith(_UNFINISHED) or len(now) <= len(before):
            return ""
        self._begin, self._read = self._read, len(self._tokens)
        return now[len(before) :]

    def _show(self, text: str, *, is_last: bool) -> str:
        if self._has_stopped:
            return ""
        text, self._held = self._held + text, ""
        places = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if places:
            self._has_stopped = True
            return text[: min(places)]
        if not is_last:
            shown = len(text) - _possible_beginning(text, self._stop)
            text, self._held = text[:shown], text[shown:]
        return text


def _possible_beginning(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` with which a stop string begins."""
    lengths = [n for s in stop for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n])]
    return max(lengths, default=0)


def whole_text(decode: Callable[[list[int]], str], stop: Sequence[str], token_ids: Sequence[int]) -> str:
    """The text of a whole response, cut before its stop string."""
    text = decode(list(token_ids))
    return text[: min((place for place in (text.find(s) for s in stop) if place >= 0), default=len(text))]
