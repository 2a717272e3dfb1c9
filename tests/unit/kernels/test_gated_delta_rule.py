from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.qwen3_next import modeling_qwen3_next as hf

from lockstep.kernels.delta_rule_choice import fla_fault
from lockstep.kernels.gated_delta_rule import (
    CHUNK,
    DeltaLayout,
    _Chunks,
    _GatedDeltaRule,
    gated_delta_rule,
    gated_delta_rule_reference,
    gated_delta_step,
)

CPU = torch.device("cpu")
LENGTHS = [130, 0, 64, 1, 65, 200, 0]
DECAYS = [0.05, 1.0, 20.0]
"""Log-decays are drawn between 0 and minus this; -20 makes sums below -1000 in a chunk of 64."""


def draw(
    lengths: list[int], *, decay: float = 1.0, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, ...]:
    """q, k, v, log-decay, beta, initial states: 2 key heads, 4 value heads, head dims 8 and 12."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    inputs = (
        normal(total, 2, 8), normal(total, 2, 8), normal(total, 4, 12), -decay * uniform(total, 4), uniform(total, 4),
        normal(len(lengths), 4, 8, 12),
    )  # fmt: skip
    return tuple(x.to(dtype) for x in inputs)


def in_numpy(inputs: tuple[Tensor, ...], lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """One document, head and token at a time, with the update written as a matrix: S = (I - b k k^T) a S + b k v^T."""
    q, k, v, log_decay, beta, states = (x.numpy() for x in inputs)
    out, states, start = np.zeros_like(v), states.copy(), 0
    for document, length in enumerate(lengths):
        for head in range(v.shape[1]):
            state = states[document, head]
            for t in range(start, start + length):
                key = k[t, head // 2] / np.sqrt((k[t, head // 2] ** 2).sum() + 1e-6)
                query = q[t, head // 2] / np.sqrt((q[t, head // 2] ** 2).sum() + 1e-6) / np.sqrt(q.shape[2])
                erase = np.eye(len(key)) - beta[t, head] * np.outer(key, key)
                state = erase @ (np.exp(log_decay[t, head]) * state) + beta[t, head] * np.outer(key, v[t, head])
                out[t, head] = query @ state
            states[document, head] = state
        start += length
    return out, states


def run(kernel, inputs: tuple[Tensor, ...], layout, *, with_state: bool = True) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Outputs, final states, and the gradients of a random weighted sum of both."""
    leaves = [x.detach().clone().requires_grad_() for x in (inputs if with_state else inputs[:5])]
    results = kernel(*leaves[:5], layout, *leaves[5:])
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in results]
    return [*(x.detach() for x in results), *torch.autograd.grad(results, leaves, upstream)]


def largest_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


@pytest.mark.parametrize("decay", DECAYS)
def test_the_specification_is_the_recurrence(decay: float) -> None:
    lengths = [9, 0, 1, 30]
    inputs = draw(lengths, decay=decay)
    out, states = in_numpy(inputs, lengths)
    got_out, got_states = gated_delta_rule_reference(*inputs[:5], lengths, inputs[5])
    np.testing.assert_allclose(got_out, out, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got_states, states, rtol=1e-12, atol=1e-12)


def plain_on_a_gpu(*arguments) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """What a GPU runs where no kernel fits, here on the CPU."""
    *inputs, layout = arguments[:6]
    state = arguments[6] if len(arguments) > 6 else inputs[2].new_zeros(len(layout.lengths), 4, 8, 12)
    return _GatedDeltaRule.apply(_Chunks, layout, *inputs, state)


RULES = {"cpu": gated_delta_rule, "plain on a gpu": plain_on_a_gpu}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("with_state", [True, False])
def test_chunks_give_the_specification_and_its_gradients(rule: str, decay: float, with_state: bool) -> None:
    """In fp64 to 1e-11. In fp32 a product of a chunk's matrices rounds at 6e-8 some ten times: 5e-6 is asked for.

    On a CPU, decays are summed in fp32 as in transformers, so sums of -1000 are off by 6e-5.
    """
    fp32_bound = 5e-4 if rule == "cpu" and decay == DECAYS[-1] else 5e-6
    wanted = run(gated_delta_rule_reference, draw(LENGTHS, decay=decay), LENGTHS, with_state=with_state)
    layout = DeltaLayout(LENGTHS, CPU)
    for dtype, bound in [(torch.float64, 1e-11), (torch.float32, fp32_bound)]:
        got = run(RULES[rule], draw(LENGTHS, decay=decay, dtype=dtype), layout, with_state=with_state)
        assert [x.dtype for x in got] == [dtype] * len(got)
        errors = [largest_error(x, want) for x, want in zip(got, wanted, strict=True)]
        assert max(errors) < bound, errors


def test_repeated_keys_with_full_strength_and_no_decay_stay_accurate() -> None:
    """The hardest system: every token of a chunk overwrites the same key, so its matrix is full of ones."""
    lengths = [100]
    q, k, v, log_decay, beta, state = draw(lengths)
    inputs = (q, k[:1].expand_as(k), v, torch.zeros_like(log_decay), torch.ones_like(beta), state)
    wanted = run(gated_delta_rule_reference, inputs, lengths)
    got = run(gated_delta_rule, tuple(x.float() for x in inputs), DeltaLayout(lengths, CPU))
    # The keys' gradient is what is left of sums that cancel: two digits less.
    bounds = [5e-6] * 3 + [5e-4] + [5e-6] * 4
    errors = [largest_error(x, want) for x, want in zip(got, wanted, strict=True)]
    assert all(error < bound for error, bound in zip(errors, bounds, strict=True)), errors


def test_a_small_decay_after_a_sum_of_minus_1000_keeps_its_digits() -> None:
    """fp32 sums of -1000 are off by 6e-5; the decay between two late tokens must not be."""
    lengths = [CHUNK]
    inputs = [x.float() for x in draw(lengths, decay=1e-3)]
    inputs[3][:50] = -20.0
    want, _ = gated_delta_rule_reference(*(x.double() for x in inputs[:5]), lengths)
    got, _ = plain_on_a_gpu(*inputs[:5], DeltaLayout(lengths, CPU))
    assert largest_error(got, want) < 1e-6


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 3 * CHUNK), min_size=1, max_size=6))
def test_a_pack_of_any_lengths_equals_its_documents_alone(lengths: list[int]) -> None:
    inputs = draw(lengths, seed=len(lengths))
    out, states = gated_delta_rule(*inputs[:5], DeltaLayout(lengths, CPU), inputs[5])
    parts = zip(*(x.split(lengths) for x in inputs[:5]), inputs[5].split(1), strict=True)
    alone = [gated_delta_rule(*p[:5], DeltaLayout([n], CPU), p[5]) for p, n in zip(parts, lengths, strict=True)]
    torch.testing.assert_close(out, torch.cat([x for x, _ in alone]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(states, torch.cat([x for _, x in alone]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_packs_without_tokens_return_the_states_they_got(lengths: list[int]) -> None:
    *inputs, state = draw(lengths)
    out, final = gated_delta_rule(*inputs, DeltaLayout(lengths, CPU), state)
    assert out.shape == (0, 4, 12)
    torch.testing.assert_close(final, state, rtol=0, atol=0)


@pytest.mark.parametrize("cut", [1, 64, 77, 129])
def test_a_document_in_two_passes_equals_one(cut: int) -> None:
    inputs = draw([130])
    whole = gated_delta_rule(*inputs[:5], DeltaLayout([130], CPU), inputs[5])
    first, state = gated_delta_rule(*(x[:cut] for x in inputs[:5]), DeltaLayout([cut], CPU), inputs[5])
    rest, state = gated_delta_rule(*(x[cut:] for x in inputs[:5]), DeltaLayout([130 - cut], CPU), state)
    torch.testing.assert_close((torch.cat([first, rest]), state), whole, rtol=1e-12, atol=1e-12)


def test_decoding_token_by_token_equals_chunks_and_touches_only_its_slots() -> None:
    """Two sequences of 70 tokens in slots 3 and 1 of a pool in fp32; 5e-6 as for chunks in fp32."""
    inputs = draw([70, 70], dtype=torch.float32)
    wanted, states = gated_delta_rule(*inputs[:5], DeltaLayout([70, 70], CPU), inputs[5])
    slots = torch.tensor([3, 1])
    pool = torch.full((5, 4, 8, 12), 7.0)
    pool[slots] = inputs[5]
    steps = [x.view(2, 70, *x.shape[1:]) for x in inputs[:5]]
    out = torch.stack([gated_delta_step(*(x[:, t] for x in steps), pool, slots) for t in range(70)], 1)
    assert largest_error(out.flatten(0, 1), wanted) < 5e-6
    assert largest_error(pool[slots], states) < 5e-6
    assert (pool[[0, 2, 4]] == 7.0).all()


@pytest.mark.parametrize("function", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
def test_the_rule_is_the_one_of_transformers(function: str) -> None:
    """Both in fp32 (transformers computes in nothing wider), so 1e-5 for two roundings."""
    q, k, v, log_decay, beta, state = draw([150], dtype=torch.float32)
    got = gated_delta_rule(q, k, v, log_decay, beta, DeltaLayout([150], CPU), state)
    rows = [x[None] for x in (q.repeat_interleave(2, 1), k.repeat_interleave(2, 1), v)]
    want, want_state = getattr(hf, function)(
        *rows, g=log_decay[None], beta=beta[None], initial_state=state, output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    assert largest_error(got[0], want[0]) < 1e-5
    assert largest_error(got[1], want_state) < 1e-5


def test_bf16_inputs_are_computed_in_fp32_and_rounded_once() -> None:
    inputs = [x.bfloat16() for x in draw(LENGTHS)[:5]]
    want, want_states = gated_delta_rule(*(x.float() for x in inputs), DeltaLayout(LENGTHS, CPU))
    got, states = gated_delta_rule(*inputs, DeltaLayout(LENGTHS, CPU))
    assert torch.equal(got, want.bfloat16())
    assert torch.equal(states, want_states)


HOPPER, AMPERE, BLACKWELL, TURING = (9, 0), (8, 0), (10, 0), (7, 5)


@pytest.mark.parametrize(
    ("fla", "triton", "capability", "fault"),
    [
        (None, "3.7.1", HOPPER, "not installed"),
        ("0.5.1", "3.7.1", AMPERE, "older than 0.6"),
        ("0.5.1", "3.7.1", BLACKWELL, "older than 0.6"),
        ("0.6.0", None, HOPPER, "Triton is not installed"),
        ("0.6.0", "3.2.0", HOPPER, "older than 3.3"),
        ("0.6.0", "3.3.1", HOPPER, None),
        ("0.6.0", "3.4.0", HOPPER, "miscompiles"),
        ("0.6.0", "3.6.0+git1234", HOPPER, "miscompiles"),
        ("0.6.0", "3.7.0", HOPPER, "miscompiles"),
        ("0.6.0", "3.7.1", HOPPER, None),
        ("0.10.0", "3.10.0", HOPPER, None),
        ("0.6.0", "3.6.0", AMPERE, None),
        ("0.6.0", "3.6.0", BLACKWELL, None),
        ("0.6.0", "3.7.1", TURING, "below 8.0"),
    ],
)
def test_fla_is_used_only_where_it_is_right(
    fla: str | None, triton: str | None, capability: tuple[int, int], fault: str | None
) -> None:
    found = fla_fault(fla, triton, capability)
    assert found is None if fault is None else fault in (found or "")
