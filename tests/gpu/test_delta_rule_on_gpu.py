"""The gated delta rule and its convolution on a GPU, against their specifications in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lockstep.kernels.causal_conv import causal_conv, causal_conv_reference, causal_conv_step
from lockstep.kernels.delta_rule_choice import fla_fault, installed
from lockstep.kernels.gated_delta_rule import (
    DeltaLayout,
    _by_fla,
    gated_delta_rule,
    gated_delta_rule_reference,
    gated_delta_step,
    gated_delta_step_reference,
    kernels_on,
)

LENGTHS = [300, 0, 1, 130, 64, 513, 0]
GPU = torch.device("cuda", 0)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm())


def draw(key_heads: int, value_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, log-decay, beta, states: decays as Qwen3-Next starts with, from almost none to -10 per token."""
    torch.manual_seed(0)
    total = sum(LENGTHS)
    log_decay = -torch.empty(value_heads).uniform_(0.01, 16) * torch.rand(total, value_heads)
    inputs = [
        torch.randn(total, key_heads, key_dim), torch.randn(total, key_heads, key_dim),
        torch.randn(total, value_heads, value_dim), log_decay, torch.rand(total, value_heads),
        torch.randn(len(LENGTHS), value_heads, key_dim, value_dim),
    ]  # fmt: skip
    kinds = [dtype, dtype, dtype, torch.float32, torch.float32, torch.float32]
    return [x.to(GPU, kind) for x, kind in zip(inputs, kinds, strict=True)]


def run(kernel, inputs: list[Tensor], layout) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Outputs, final states, and the gradients of a random weighted sum of both."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = kernel(*leaves[:5], layout, leaves[5])
    generator = torch.Generator(GPU).manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, device=GPU) for x in results]
    gradients = torch.autograd.grad(results, leaves, [u.to(x.dtype) for u, x in zip(upstream, results, strict=True)])
    return [*(x.detach() for x in results), *gradients]


SHAPES = [(2, 4, 128, 128), (4, 4, 64, 64)]
NAMES = ["out", "state", "q", "k", "v", "log_decay", "beta", "first state"]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_delta_rule_in_fp32_is_the_specification(shape: tuple[int, int, int, int]) -> None:
    """As on the CPU: 1e-5 in norm, gradients too."""
    inputs = draw(*shape, torch.float32)
    wanted = run(gated_delta_rule_reference, [x.double() for x in inputs], LENGTHS)
    got = run(gated_delta_rule, inputs, DeltaLayout(LENGTHS, GPU))
    errors = {name: relative_error(x, want) for name, x, want in zip(NAMES, got, wanted, strict=True)}
    print("fp32", errors)
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_the_delta_rule_in_bf16_is_right_to_bf16(shape: tuple[int, int, int, int]) -> None:
    """bf16 has 8 bits. What passes from kernel to kernel is rounded to bf16, so errors stay under 1e-2, not 2e-3."""
    inputs = draw(*shape, torch.bfloat16)
    assert kernels_on(0, shape[0], shape[2], shape[1], shape[3]) == "triton"
    wanted = run(gated_delta_rule_reference, [x.double() for x in inputs], LENGTHS)
    got = run(gated_delta_rule, inputs, DeltaLayout(LENGTHS, GPU))
    errors = {name: relative_error(x, want) for name, x, want in zip(NAMES, got, wanted, strict=True)}
    print("bf16", errors)
    assert [x.dtype for x in got] == [torch.bfloat16, torch.float32, *(x.dtype for x in inputs)]
    assert max(errors.values()) < 1e-2


@pytest.mark.skipif(installed("fla-core") is None, reason="fla-core is the second choice, and optional")
def test_fla_is_right_to_bf16_where_it_may_be_used() -> None:
    """Its forward everywhere, its backward where nothing is known against it."""
    inputs, layout = draw(2, 4, 128, 128, torch.bfloat16), DeltaLayout(LENGTHS, GPU)
    wanted = run(gated_delta_rule_reference, [x.double() for x in inputs], LENGTHS)
    if fla_fault(installed("fla-core"), installed("triton"), torch.cuda.get_device_capability()) is None:
        got = run(lambda *rows: _by_fla(rows[5], *rows[:5], rows[6]), inputs, layout)
    else:
        with torch.no_grad():
            got = list(_by_fla(layout, *inputs))
    assert max(relative_error(x, want) for x, want in zip(got, wanted, strict=False)) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_delta_rule_repeats_bit_for_bit(dtype: torch.dtype) -> None:
    inputs = draw(2, 4, 128, 128, dtype)
    layout = DeltaLayout(LENGTHS, GPU)
    once, twice = run(gated_delta_rule, inputs, layout), run(gated_delta_rule, inputs, layout)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packs_without_tokens_return_the_states_they_got(dtype: torch.dtype) -> None:
    inputs = [x[:0] for x in draw(2, 4, 128, 128, dtype)[:5]]
    state = torch.randn(2, 4, 128, 128, device=GPU)
    out, final = gated_delta_rule(*inputs, DeltaLayout([0, 0], GPU), state)
    assert out.shape == (0, 4, 128)
    assert torch.equal(final, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 4, 24, 40)])
def test_a_decode_step_updates_its_slots_alone(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Against fp64 on the same inputs; the state in fp32 to 1e-6, the output to the rounding of its type."""
    inputs = [x[:3] for x in draw(*shape, dtype)[:5]]
    slots = torch.tensor([4, 0, 2], device=GPU)
    pool = torch.randn(6, shape[1], *shape[2:], device=GPU)
    exact_pool, untouched = pool.double(), pool[[1, 3, 5]].clone()
    wanted = gated_delta_step_reference(*(x.double() for x in inputs), exact_pool, slots)
    got = gated_delta_step(*inputs, pool, slots)
    assert relative_error(pool[slots], exact_pool[slots]) < 1e-6
    assert relative_error(got, wanted) < (1e-6 if dtype == torch.float32 else 4e-3)
    assert torch.equal(pool[[1, 3, 5]], untouched)


def test_decoding_goes_on_from_the_state_of_a_prefill() -> None:
    """Prefill of all but the last token and one step, in bf16, against the whole document in fp64."""
    inputs = draw(2, 4, 128, 128, torch.bfloat16)
    q, k, v, log_decay, beta, _ = (x[:300] for x in inputs)
    wanted, state = gated_delta_rule_reference(*(x.double() for x in (q, k, v, log_decay, beta)), [300])
    rows = (q, k, v, log_decay, beta)
    _, pool = gated_delta_rule(*(x[:299] for x in rows), DeltaLayout([299], GPU))
    out = gated_delta_step(*(x[299:] for x in rows), pool, torch.zeros(1, dtype=torch.int64, device=GPU))
    assert relative_error(out[0], wanted[299]) < 1e-2
    assert relative_error(pool, state) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_convolution_is_the_specification(dtype: torch.dtype) -> None:
    """Against fp64; in bf16 errors stay under twice those of the specification in bf16."""
    torch.manual_seed(0)
    inputs = [torch.randn(sum(LENGTHS), 768), torch.randn(768, 4) / 2, torch.randn(len(LENGTHS), 768, 3)]
    inputs = [x.to(GPU, dtype) for x in inputs]

    def gradients(kernel, documents, kind: torch.dtype) -> list[Tensor]:  # type: ignore[no-untyped-def]
        leaves = [x.to(kind).requires_grad_() for x in inputs]
        out, state = kernel(leaves[0], leaves[1], documents, leaves[2])
        return [out, state, *torch.autograd.grad(out.float().square().sum() + state.float().sum(), leaves)]

    wanted = gradients(causal_conv_reference, LENGTHS, torch.float64)
    plain = gradients(causal_conv_reference, LENGTHS, dtype)
    got = gradients(causal_conv, DeltaLayout(LENGTHS, GPU), dtype)
    again = gradients(causal_conv, DeltaLayout(LENGTHS, GPU), dtype)
    print(dtype, [relative_error(x, want) for x, want in zip(got, wanted, strict=True)])
    assert torch.equal(got[1].double(), wanted[1])
    for x, twice, naive, want in zip(got, again, plain, wanted, strict=True):
        assert relative_error(x, want) < 2 * relative_error(naive, want) + 1e-6
        assert torch.equal(x, twice)


def test_convolving_token_by_token_equals_one_pass() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(12, 768, device=GPU).bfloat16(), torch.randn(768, 4, device=GPU).bfloat16()
    wanted, last = causal_conv(x, weight, DeltaLayout([12], GPU))
    pool, slots = torch.zeros(3, 768, 3, device=GPU, dtype=torch.bfloat16), torch.ones(1, dtype=torch.int64, device=GPU)
    out = torch.cat([causal_conv_step(row[None], weight, pool, slots) for row in x])
    assert relative_error(out, wanted) < 4e-3
    assert torch.equal(pool[1:2], last)
