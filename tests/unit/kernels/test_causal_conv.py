from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.qwen3_next import modeling_qwen3_next as hf

from lockstep.kernels.causal_conv import causal_conv, causal_conv_reference, causal_conv_step
from lockstep.kernels.gated_delta_rule import DeltaLayout

CPU = torch.device("cpu")
CHANNELS = 5


def draw(lengths: list[int], taps: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, weight, earlier inputs."""
    generator = torch.Generator().manual_seed(len(lengths))
    shapes = [(sum(lengths), CHANNELS), (CHANNELS, taps), (len(lengths), CHANNELS, taps - 1)]
    x, weight, state = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return x, weight, state


def one_by_one(x: Tensor, weight: Tensor, lengths: list[int], state: Tensor) -> tuple[Tensor, Tensor]:
    """One document, token, channel and tap at a time."""
    past, rows, states, start = weight.shape[1] - 1, [], [], 0
    for document, length in enumerate(lengths):
        seen = [list(row) for row in state[document].tolist()]
        for t in range(start, start + length):
            row = []
            for channel in range(CHANNELS):
                seen[channel].append(float(x[t, channel]))
                total = sum(float(weight[channel, w]) * seen[channel][-past - 1 + w] for w in range(past + 1))
                row.append(total / (1 + torch.tensor(-total, dtype=torch.float64).exp().item()))
            rows.append(row)
        states.append([channel[len(channel) - past :] for channel in seen])
        start += length
    return (
        torch.tensor(rows, dtype=torch.float64).view(-1, CHANNELS),
        torch.tensor(states, dtype=torch.float64).view(len(lengths), CHANNELS, past),
    )


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[7, 1, 0, 2, 12], [0], [3]])
def test_every_token_sums_the_last_taps_of_its_document(taps: int, lengths: list[int]) -> None:
    x, weight, state = draw(lengths, taps)
    wanted = one_by_one(x, weight, lengths, state)
    torch.testing.assert_close(causal_conv(x, weight, DeltaLayout(lengths, CPU), state), wanted)
    torch.testing.assert_close(causal_conv_reference(x, weight, lengths, state), wanted)
    from_zeros = one_by_one(x, weight, lengths, torch.zeros_like(state))
    torch.testing.assert_close(causal_conv(x, weight, DeltaLayout(lengths, CPU)), from_zeros)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=7))
def test_outputs_states_and_gradients_are_those_of_the_specification(lengths: list[int]) -> None:
    def run(kernel, documents) -> list[Tensor]:  # type: ignore[no-untyped-def]
        leaves = [t.requires_grad_() for t in draw(lengths)]
        out, state = kernel(leaves[0], leaves[1], documents, leaves[2])
        loss = out.square().sum() + (state * torch.arange(1.0, 4.0, dtype=torch.float64)).sum()
        return [out, state, *torch.autograd.grad(loss, leaves)]

    torch.testing.assert_close(run(causal_conv, DeltaLayout(lengths, CPU)), run(causal_conv_reference, lengths))


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_a_document_in_two_passes_equals_one(cut: int) -> None:
    x, weight, state = draw([8])
    whole = causal_conv(x, weight, DeltaLayout([8], CPU), state)
    first, between = causal_conv(x[:cut], weight, DeltaLayout([cut], CPU), state)
    rest, last = causal_conv(x[cut:], weight, DeltaLayout([8 - cut], CPU), between)
    torch.testing.assert_close((torch.cat([first, rest]), last), whole)


def test_decoding_token_by_token_equals_one_pass_and_touches_only_its_slots() -> None:
    x, weight, state = draw([6, 6])
    wanted, last = causal_conv(x, weight, DeltaLayout([6, 6], CPU), state)
    slots = torch.tensor([2, 0])
    pool = torch.full((4, CHANNELS, 3), 7.0, dtype=torch.float64)
    pool[slots] = state
    out = torch.stack([causal_conv_step(x.view(2, 6, -1)[:, t], weight, pool, slots) for t in range(6)], 1)
    torch.testing.assert_close(out.flatten(0, 1), wanted)
    torch.testing.assert_close(pool[slots], last)
    assert (pool[[1, 3]] == 7.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_convolution_is_the_one_of_transformers(dtype: torch.dtype) -> None:
    """fp32: equal to 1e-6. bf16: our error against fp64 is at most that of transformers, which rounds twice."""
    x, weight, _ = draw([50], dtype=dtype)
    exact, _ = causal_conv(x.double(), weight.double(), DeltaLayout([50], CPU))
    theirs = hf.causal_conv1d_fn(x.T[None], weight, activation="silu")[0].T
    ours, _ = causal_conv(x, weight, DeltaLayout([50], CPU))
    assert ours.dtype == theirs.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    else:
        assert (ours - exact).norm() <= (theirs - exact).norm()
