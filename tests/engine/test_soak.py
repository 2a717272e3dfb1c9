"""Ten thousand ragged requests with random aborts: the real scheduler and block manager, driven by the real engine.

The runner is a stand-in that knows what every place of the cache and every state has to hold: the history that led to
it, as one number. So a block or a state that is shared, reused or copied wrongly is seen in the pass that reads it.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from serving import make_engine
from tiny_models import tiny_dense, tiny_next

from lockstep.models import LanguageModel
from lockstep.rollout.embedded import EmbeddedEngine
from lockstep.rollout.embedded.sequence import Sequence
from lockstep.rollout.engine import SamplingParams

NUM_REQUESTS = 10_000
BLOCK_SIZE = 4


def after(history: int, token: int) -> int:
    return hash((history, token))


def history_of(tokens: list[int]) -> int:
    history = 0
    for token in tokens:
        history = after(history, token)
    return history


class HistoryRunner:
    """Keeps histories where keys, values and states would be, and samples a token that follows from the history.

    Args:
        lag: whether the tokens of a pass are handed out one call later, as from a device that the host runs ahead of.
    """

    def __init__(self, *, has_states: bool, lag: bool) -> None:
        self.has_states, self.lag = has_states, lag
        self.places: dict[int, int] = {}
        self.states: dict[int, int] = {}
        self.on_the_way: list[tuple[Sequence, int]] = []
        self.unread: dict[Sequence, list[int]] = {}
        self.num_passes = self.num_late = 0

    def routed_experts_of(self, sequence: Sequence) -> None:
        return None

    def forget_pending(self) -> None:
        self.on_the_way.clear()

    def run(self, sequences: list[Sequence]) -> list[Sequence]:
        self.num_passes += 1
        assert len(set(sequences)) == len(sequences)
        if self.has_states:
            own = [s.state_slot for s in sequences]
            assert len(set(own)) == len(own)
            for s in sequences:
                if s.state_source >= 0:
                    self.states[s.state_slot] = self.states[s.state_source]
                    s.state_source = -1
                elif s.num_computed_tokens == 0:
                    self.states[s.state_slot] = 0
        sampled = []
        for s in sequences:
            assert s.num_scheduled_tokens > 0
            tokens = s.tokens + self.unread.get(s, [])
            end = s.num_computed_tokens + s.num_scheduled_tokens
            if self.has_states:
                assert self.states[s.state_slot] == history_of(tokens[: s.num_computed_tokens])
                self.states[s.state_slot] = history_of(tokens[:end])
            history = history_of(tokens[: s.num_computed_tokens])
            for position in range(s.num_computed_tokens, end):
                history = after(history, tokens[position])
                self.places[self._place(s, position)] = history
            if s.samples_next:
                sampled.append((s, history % 50))
        for s in sequences:
            tokens = s.tokens + self.unread.get(s, [])
            end, history = s.num_computed_tokens + s.num_scheduled_tokens, 0
            for position in range(end):
                history = after(history, tokens[position])
                assert self.places[self._place(s, position)] == history, "a place holds somebody else's past"
            if s.state_copy >= 0:
                self.states[s.state_copy] = self.states[s.state_slot]
                s.state_copy = -1
            s.num_computed_tokens, s.num_scheduled_tokens = end, 0
        return self._hand_out(sampled)

    def _hand_out(self, sampled: list[tuple[Sequence, int]]) -> list[Sequence]:
        arrived, self.on_the_way = (self.on_the_way, sampled) if self.lag else (sampled, [])
        for s, token in self.on_the_way:
            self.unread.setdefault(s, []).append(token)
            s.num_pending_tokens += 1
        wanted = [(s, token) for s, token in arrived if s.generation is None]
        self.num_late += len(arrived) - len(wanted)
        for s, token in wanted:
            if self.lag:
                assert self.unread[s].pop(0) == token
                s.num_pending_tokens -= 1
            s.tokens.append(token)
            s.log_probs.append(-1.0)
        return [s for s, _ in wanted]

    def _place(self, sequence: Sequence, position: int) -> int:
        return sequence.block_table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


def soak(engine: EmbeddedEngine, seed: int) -> list[Sequence]:
    """Requests that come in waves, of which some are let go of while they wait or run."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(5) for _ in range(draw.randrange(1, 40))] for _ in range(200)]
    requests: list[Sequence] = []
    alive: list[Sequence] = []
    while len(requests) < NUM_REQUESTS or engine.has_work:
        if len(requests) < NUM_REQUESTS and len(alive) < 60 and draw.random() < 0.3:
            for _ in range(draw.randrange(1, 40)):
                prompt = draw.choice(prompts)[: draw.randrange(1, 60)]
                params = SamplingParams(
                    max_new_tokens=draw.randrange(1, 40), stop_token_ids=draw.choice([(), (4,), (0, 1, 2)])
                )
                sequence = engine.sequence(prompt, params, (draw.randrange(3), len(requests)))
                engine.add(sequence)
                requests.append(sequence)
                alive.append(sequence)
        if draw.random() < 0.2:
            for sequence in alive:
                if sequence.generation is None and draw.random() < 0.02:
                    sequence.finish_reason = "abort"
            engine.finish_aborted()
        alive = [sequence for sequence in alive if sequence.generation is None]
        engine.step()
        if not alive:
            engine.set_version(engine.version + 1)  # checks that every block and slot is free
    return requests


@pytest.mark.parametrize("lag", [False, True], ids=["at once", "late"])
@pytest.mark.parametrize("model", [tiny_dense(), tiny_next()], ids=["blocks", "blocks and states"])
def test_ten_thousand_requests_leak_no_block_and_no_slot_and_read_their_own_past_only(
    model: LanguageModel, lag: bool
) -> None:
    engine = make_engine(model, block_size=BLOCK_SIZE, num_blocks=60, max_running=24, max_prefill_tokens=48)
    runner: Any = HistoryRunner(has_states=bool(model.config.num_delta_layers), lag=lag)
    engine.runner = runner
    requests = soak(engine, seed=int(lag))
    engine.set_version(engine.version + 1)
    assert engine.scheduler.num_preemptions > 100
    assert (runner.num_late > 100) == lag
    ends = {"stop": 0, "length": 0, "abort": 0}
    for sequence in requests:
        assert sequence.generation is not None
        new, params = sequence.generation.token_ids, sequence.params
        ends[sequence.generation.finish_reason] += 1
        assert len(sequence.generation.weight_versions) == len(sequence.generation.log_probs) == len(new)
        for position, token in enumerate(new):
            assert token == history_of(sequence.prompt + new[:position]) % 50
        is_stopped = bool(new) and new[-1] in params.stop_token_ids
        assert not set(new[:-1]) & set(params.stop_token_ids)
        if sequence.generation.finish_reason != "abort":
            assert (sequence.generation.finish_reason == "stop") == is_stopped
            assert is_stopped or len(new) == params.max_new_tokens
    assert min(ends.values()) > 200, ends
    assert any(sequence.cached_tokens for sequence in requests)
