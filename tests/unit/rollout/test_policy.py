from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from lockstep.rollout.policy import Policy
from lockstep.rollout.scripted import ScriptedEngine
from lockstep.types import Sample


class _Letters:
    """A tokenizer of which only decoding is used."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(chr(ord("a") + token) for token in token_ids)


class _Streams(list[tuple[int, ...]]):
    """The random streams that were asked for, in order; every answer is one token."""

    def __call__(self, input_ids: Sequence[int], stream: tuple[int, ...]) -> list[int]:
        self.append(stream)
        return [len(self)]


@pytest.fixture
def streams() -> _Streams:
    return _Streams()


@pytest.fixture
def policy(streams: _Streams) -> Policy:
    tokenizer: Any = _Letters()
    everything = Policy(ScriptedEngine(streams), tokenizer, stop_token_ids=(), max_context_len=20)
    return everything.for_stream(0, 7)


def extend(policy: Policy, *samples: Sample) -> None:
    async def one_after_the_other() -> None:
        for sample in samples:
            await policy.extend(sample, {"max_new_tokens": 4})

    asyncio.run(one_after_the_other())


def test_the_turns_of_a_sample_follow_its_own_stream(policy: Policy, streams: _Streams) -> None:
    sample = Sample(group_index=3, index=12, tokens=[1, 2])
    extend(policy, sample, sample)
    assert streams == [(0, 7, 3, 12)] * 2
    assert (sample.tokens, sample.response, sample.response_length) == ([1, 2, 1, 2], "bc", 2)


def test_the_prefix_cache_is_counted_against_the_tokens_of_all_turns(policy: Policy, streams: _Streams) -> None:
    sample = Sample(group_index=3, index=12, tokens=[1, 2])
    extend(policy, sample, sample)
    assert sample.metadata["given_tokens"] == 2 + 3


def test_branches_of_one_sample_draw_numbers_of_their_own(policy: Policy, streams: _Streams) -> None:
    """They would all be the same response otherwise."""
    sample = Sample(group_index=3, index=12, tokens=[1, 2])
    extend(policy, *(replace(sample) for _ in range(3)))
    assert streams == [(0, 7, 3, 12), (0, 7, 3, 12, 1), (0, 7, 3, 12, 2)]


def test_the_next_rollout_counts_branches_anew(policy: Policy, streams: _Streams) -> None:
    sample = Sample(group_index=3, index=12, tokens=[1, 2])
    extend(policy, replace(sample))
    extend(policy.for_stream(0, 8), replace(sample))
    assert streams == [(0, 7, 3, 12), (0, 8, 3, 12)]


def test_a_full_context_ends_a_sample_without_asking_the_engine(policy: Policy, streams: _Streams) -> None:
    sample = Sample(index=0, tokens=list(range(20)))
    extend(policy, sample)
    assert sample.status is Sample.Status.TRUNCATED
    assert streams == []
