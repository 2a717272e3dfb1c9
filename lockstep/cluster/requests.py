"""The sampling of one process: requests that the controller has sent, and the engine that works on them."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep.cluster.worker import Place
from lockstep.parallel.decode import Peers
from lockstep.rollout.embedded import EmbeddedEngine
from lockstep.rollout.embedded.sequence import Sequence
from lockstep.rollout.engine import Generation, SamplingParams

_STEP, _STOP = 1, 2
"""What a rank wants next; 0 is nothing. The largest wish counts."""


@dataclass(frozen=True)
class Request:
    """A response that the controller waits for."""

    number: int
    input_ids: list[int]
    params: SamplingParams
    stream: tuple[int, ...]


class RequestServer:
    """Samples in calls that come back whenever there is news.

    Args:
        peers: the ranks that decode together with this one, if any do.
    """

    def __init__(self, engine: EmbeddedEngine, place: Place, peers: Peers | None) -> None:
        self.engine = engine
        self._place = place
        self._peers = peers
        self._sequences: dict[int, Sequence] = {}

    def advance(self, requests: list[Request], aborted: list[int]) -> list[tuple[int, Generation | Exception]]:
        """Take requests in and let others go; then sample until some are finished, nothing is left, or a poke.

        Ranks that decode together all do so until that happens to one of them.

        Returns:
            What has become of requests, by their number.
        """
        ended: list[tuple[int, Generation | Exception]] = []
        for request in requests:
            sequence = self.engine.sequence(request.input_ids, request.params, request.stream)
            try:
                self.engine.add(sequence)
            except Exception as error:
                ended.append((request.number, error))
            else:
                self._sequences[request.number] = sequence
        for number in aborted:
            if (found := self._sequences.get(number)) is not None:
                found.finish_reason = "abort"
        finished = self.engine.finish_aborted()
        while self._goes_on(has_news=bool(finished or ended)):
            finished = self.engine.step()
            self._place.is_alive()
        self._place.is_poked.clear()  # one that comes later makes the next call come back at once, which does no harm
        return ended + self._results(finished)

    def end_all(self) -> list[tuple[int, Generation]]:
        """End every request with what it has."""
        for sequence in self._sequences.values():
            sequence.finish_reason = "abort"
        return self._results(self.engine.finish_aborted())

    def _results(self, finished: list[Sequence]) -> list[tuple[int, Generation]]:
        number_of = {sequence: number for number, sequence in self._sequences.items()}
        results = []
        for sequence in finished:
            number = number_of[sequence]
            del self._sequences[number]
            assert sequence.generation is not None, "a finished sequence has its result"
            results.append((number, sequence.generation))
        return results

    def _goes_on(self, *, has_news: bool) -> bool:
        """Whether to sample another step, which ranks that decode together answer alike."""
        wish = _STOP if has_news or self._place.is_poked.is_set() else int(self.engine.has_work)
        return (wish if self._peers is None else self._peers.most(wish)[0]) == _STEP


class SamplingProcess:
    """A process that samples, whoever has its weights; `_requests` is there once its engine is open."""

    _requests: RequestServer | None = None

    def advance(self, requests: list[Request], aborted: list[int]) -> list[tuple[int, Generation | Exception]]:
        return self._served.advance(requests, aborted)

    @property
    def _served(self) -> RequestServer:
        assert self._requests is not None, "open_engine comes first"
        return self._requests
