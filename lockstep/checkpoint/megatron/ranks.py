"""The processes that share a conversion: one, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from lockstep.checkpoint.atomic import atomic_directory

_Result = TypeVar("_Result")
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Ranks:
    """This process among `size` of them."""

    rank: int = 0
    size: int = 1

    def together(self, work: Callable[[], _Result]) -> list[_Result]:
        """Every process does its work; all get all results by rank, or all get the first error."""
        if self.size == 1:
            return [work()]
        outcome: _Result | Exception
        try:
            outcome = work()
        except Exception as error:
            outcome = error
        outcomes = [outcome] * self.size
        dist.all_gather_object(outcomes, outcome)
        results: list[_Result] = []
        for found in outcomes:
            if isinstance(found, Exception):
                raise found
            results.append(found)
        return results

    def first(self, work: Callable[[], _Result]) -> _Result:
        """Rank 0 does the work; all get its result or its error."""
        return self.together(lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def share(self, items: Sequence[_Item], size_of: Callable[[_Item], int]) -> list[_Item]:
        """The items of this process: neighbours, and about as many bytes for each process."""
        total, before, mine = sum(size_of(item) for item in items) or 1, 0, []
        for item in items:
            if before * self.size // total == self.rank:
                mine.append(item)
            before += size_of(item)
        return mine

    @contextmanager
    def atomic_directory(self, path: Path) -> Iterator[Path]:
        """A directory that all processes fill; it is there when all of them did, and not at all otherwise."""
        stack = ExitStack()
        folder = self.first(lambda: stack.enter_context(atomic_directory(path)))
        try:
            yield folder
        except BaseException as error:
            stack.__exit__(type(error), error, error.__traceback__)
            raise
        self.first(stack.close)


@contextmanager
def ranks_of_torchrun() -> Iterator[Ranks]:
    """Join the other processes, when torchrun says that there are some."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    dist.init_process_group("gloo")
    try:
        yield Ranks(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


ALONE = Ranks()
