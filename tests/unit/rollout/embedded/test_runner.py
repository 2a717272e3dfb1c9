from __future__ import annotations

from lockstep.rollout.embedded.runner import passes
from lockstep.rollout.embedded.sequence import Sequence
from lockstep.rollout.engine import SamplingParams


def sequence(num_tokens: int, num_computed_tokens: int) -> Sequence:
    made = Sequence(list(range(num_tokens)), SamplingParams(max_new_tokens=1), (0,), 0)
    made.num_computed_tokens = num_computed_tokens
    made.num_scheduled_tokens = num_tokens - num_computed_tokens
    return made


def test_one_long_prompt_does_not_pad_its_whole_group() -> None:
    """Prompts of 1000 tokens, 16 of them cached; the siblings share all but the last 8."""
    first, second = sequence(1000, 16), sequence(1000, 16)
    siblings = [sequence(1000, 992) for _ in range(6)]
    scheduled = [first, *siblings[:3], second, *siblings[3:]]
    together = passes(scheduled, 2**20)
    assert together == [[first], siblings[:3], [second], siblings[3:]]
    assert passes(scheduled, 2**40) == [scheduled]


def test_what_begins_from_nothing_comes_first_because_others_may_share_what_it_computes() -> None:
    fresh, cached, also_fresh = sequence(20, 0), sequence(20, 16), sequence(30, 0)
    assert passes([fresh, cached, also_fresh], 2**20) == [[fresh, also_fresh], [cached]]


def test_decoding_is_one_pass() -> None:
    running = [sequence(500 + i, 499 + i) for i in range(256)]
    assert passes(running, 2**22) == [running]


def test_prompts_are_not_padded_together_with_what_decodes() -> None:
    running = [sequence(50 + i, 49 + i) for i in range(4)]
    prompts = [sequence(60, 32), sequence(33, 32)]
    assert passes([*running, *prompts], 2**22) == [running, prompts]


def test_a_chunk_is_as_wide_as_what_is_scheduled_of_it() -> None:
    """16 of 1000 tokens each: two chunks of 16 x 116 scores fit, three do not."""
    chunks = [sequence(1000, 100) for _ in range(3)]
    for chunk in chunks:
        chunk.num_scheduled_tokens = 16
    assert passes(chunks, 2 * 16 * 116) == [chunks[:2], chunks[2:]]
