"""Promises of the AdamW update's specification. The GPU's kernel is compared with it in tests/gpu."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lockstep.kernels.adamw import (
    BLOCK,
    AdamWStep,
    MomentDtype,
    State,
    adamw,
    adamw_reference,
    decode_exp_avg,
    decode_exp_avg_sq,
    encode_exp_avg,
    encode_exp_avg_sq,
    join_master,
    random_bits,
    round_to_bf16,
    split_master,
    state_layout,
)

FORMATS: list[MomentDtype] = ["fp32", "bf16", "8bit"]


def step(number: int = 1, **changes: Any) -> AdamWStep:
    numbers: dict[str, Any] = {
        "lr": 0.01, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1, "step": number, "grad_scale": 1.0,
        "seed": 7919 * number,
    }  # fmt: skip
    return AdamWStep(**(numbers | changes))


def fresh_state(weight: Tensor, exp_avg: MomentDtype = "fp32", exp_avg_sq: MomentDtype = "fp32") -> State:
    return {n: torch.zeros(s, dtype=d) for n, s, d in state_layout(weight.shape, weight.dtype, exp_avg, exp_avg_sq)}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bits_for(x: Tensor, seed: int) -> Tensor:
    return random_bits(seed, 0, x) & 0xFFFF


# Master weights

HIGH_HALVES = [0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x807F, 0x0080, 0x3F80, 0xBF80, 0x4049, 0xC2F7, 0x7F7F, 0xFF7F]
"""Zeros, denormals, the smallest normal, ordinary numbers and the largest, of both signs."""


@pytest.mark.parametrize("high", HIGH_HALVES, ids=hex)
def test_every_low_half_of_a_master_comes_back_and_the_weight_is_the_nearest_ties_away_from_zero(high: int) -> None:
    words = (np.uint32(high) << np.uint32(16)) | np.arange(2**16, dtype=np.uint32)
    master = torch.from_numpy(words.view(np.float32))
    weight, remainder = split_master(master)
    assert (weight.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
    assert np.array_equal(join_master(weight, remainder).numpy().view(np.uint32), words)

    def size_of(upper_half: int) -> float:
        """Of the bf16 number with these bits; the one past the largest counts as 2^128."""
        finite = np.array(upper_half << 16, dtype=np.uint32).view(np.float32)
        return 2.0**128 if upper_half == 0x7F80 else float(finite)

    sizes = np.abs(words.view(np.float32).astype(np.float64))
    below, above = size_of(high & 0x7FFF), size_of((high & 0x7FFF) + 1)
    wanted = np.where(above - sizes <= sizes - below, above, below)
    got = weight.double().abs().numpy()
    assert np.array_equal(np.where(np.isinf(got), 2.0**128, got), wanted)
    assert np.array_equal(np.signbit(weight.float().numpy()), np.full(2**16, high >= 0x8000))


# The update


def exact_adamw(weight: Tensor, grads: list[Tensor], **changes: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loop in fp64, as in the paper: decay, then the step along the corrected moments."""
    w, m, v = weight.double(), torch.zeros_like(weight).double(), torch.zeros_like(weight).double()
    for number, grad in enumerate(grads, 1):
        h = step(number, **changes)
        g = grad.double() * h.grad_scale
        m = h.beta1 * m + (1 - h.beta1) * g
        v = h.beta2 * v + (1 - h.beta2) * g**2
        corrected_m, corrected_v = m / (1 - h.beta1**number), v / (1 - h.beta2**number)
        w = w - h.lr * h.weight_decay * w - h.lr * corrected_m / (corrected_v.sqrt() + h.eps)
    return w, m, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_fp32_moments_the_masters_are_those_of_adamw_in_fp64_to_fp32_rounding(dtype: torch.dtype) -> None:
    """Ten steps of some ten roundings of 2^-24 each: 1e-5 of a number, or of a step for those near 0."""
    weight, grads = randn(6, 200).to(dtype), [randn(6, 200, seed=s).bfloat16() for s in range(1, 11)]
    wanted, wanted_m, wanted_v = exact_adamw(weight.float(), grads, grad_scale=0.3)
    state = fresh_state(weight)
    for number, grad in enumerate(grads, 1):
        adamw(weight, grad, state, step(number, grad_scale=0.3))
    master = join_master(weight, state["remainder"]) if dtype == torch.bfloat16 else weight
    torch.testing.assert_close(master.double(), wanted, rtol=1e-6, atol=1e-5 * 0.01)
    torch.testing.assert_close(state["exp_avg"].double(), wanted_m, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state["exp_avg_sq"].double(), wanted_v, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("exp_avg", "exp_avg_sq"), [("bf16", "bf16"), ("8bit", "8bit"), ("8bit", "fp32")])
def test_one_step_of_small_moments_differs_by_no_more_than_their_spacing(
    exp_avg: MomentDtype, exp_avg_sq: MomentDtype
) -> None:
    """Spacing of a number near the largest of its block: bf16 2^-7, codes 2 / 127 and 4 / 255 of it."""
    weight, grad = randn(4, 256).bfloat16(), randn(4, 256, seed=1)
    exact_m, exact_v = 0.2 * grad, 0.05 * grad**2
    state = fresh_state(weight, exp_avg, exp_avg_sq)
    wanted, *_ = exact_adamw(weight.float(), [grad])
    adamw(weight, grad, state, step())
    m = decode_exp_avg(state["exp_avg"], state.get("exp_avg_scale"))
    v = decode_exp_avg_sq(state["exp_avg_sq"], state.get("exp_avg_sq_scale"))
    top_m = exact_m.unflatten(1, (-1, BLOCK)).abs().amax(-1).repeat_interleave(BLOCK, 1)
    top_v = exact_v.unflatten(1, (-1, BLOCK)).amax(-1).repeat_interleave(BLOCK, 1)
    spacing_m = {"bf16": exact_m.abs() * 2**-7, "8bit": 2.02 / 127 * (exact_m.abs() * top_m).sqrt() + top_m / 127**2}
    spacing_v = {
        "fp32": exact_v * 1e-6,
        "bf16": exact_v * 2**-7,
        "8bit": 4.1 / 255 * (exact_v**3 * top_v) ** 0.25 + 6.2 / 255**2 * (exact_v * top_v).sqrt() + top_v / 255**3,
    }
    assert ((m - exact_m).abs() <= spacing_m[exp_avg]).all()
    assert ((v - exact_v).abs() <= spacing_v[exp_avg_sq]).all()
    # What is stored is rounded; this step itself used the unrounded moments.
    torch.testing.assert_close(join_master(weight, state["remainder"]).double(), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("moments", FORMATS)
def test_a_weight_updated_in_parts_is_the_weight_updated_at_once(moments: MomentDtype) -> None:
    """Rows on their own, each told where it begins; the specification itself works in chunks of 2^20 numbers."""
    weight, grad = randn(9, 300).bfloat16(), randn(9, 300, seed=1).bfloat16()
    whole, parts = weight.clone(), weight.clone()
    of_whole, of_parts = fresh_state(weight, moments, moments), fresh_state(weight, moments, moments)
    for number in (1, 2):
        adamw_reference(whole, grad, of_whole, step(number))
        for rows in (slice(0, 4), slice(4, 9)):
            part = {name: tensor[rows] for name, tensor in of_parts.items()}
            adamw_reference(parts[rows], grad[rows], part, step(number), first_element=rows.start * 300)
    assert torch.equal(whole, parts)
    assert all(torch.equal(of_whole[name], of_parts[name]) for name in of_whole)


# Rounding


def test_random_bits_are_even_and_differ_between_seeds_and_elements() -> None:
    """2^16 draws of each of the 32 bits: their means stay within 5 standard deviations, 5 x 0.5 / 2^8, of a half."""
    some = random_bits(1, 0, torch.empty(256, 256))
    bits = torch.stack([(some >> bit) & 1 for bit in range(32)]).double()
    assert (bits.mean((1, 2)) - 0.5).abs().max() < 0.01
    neighbours = (bits[:, :, 1:] == bits[:, :, :-1]).double().mean((1, 2))
    assert (neighbours - 0.5).abs().max() < 0.01
    other = random_bits(2, 0, torch.empty(256, 256))
    assert (some == other).double().mean() < 1e-3
    assert torch.equal(random_bits(1, 256, torch.empty(255, 256)), some[1:]), "a part continues where it begins"


@pytest.mark.parametrize(
    ("encode", "decode"), [(encode_exp_avg, decode_exp_avg), (encode_exp_avg_sq, decode_exp_avg_sq)]
)
def test_8_bit_codes_are_right_on_average(encode: Any, decode: Any) -> None:
    """4096 roundings of one number: the mean is within 5 standard errors of it, half a spacing over 64 each.

    Numbers that a second moment's smallest code lifts (below 255^-4 of the largest) are left out.
    """
    x = torch.linspace(1e-4, 1.0, BLOCK)[None]
    if encode is encode_exp_avg:
        x = x * torch.tensor([1.0, -1.0]).repeat(BLOCK // 2)
    many = x.expand(4096, BLOCK).contiguous()
    got = decode(*encode(many, bits_for(many, seed=3)))
    spacing = (got.amax(0) - got.amin(0)).clamp(min=1e-7)
    assert (spacing < 0.02).all()
    assert ((got.double().mean(0) - x[0]).abs() <= 5 * 0.5 / 64 * spacing).all()


def test_bf16_rounding_is_right_on_average_and_keeps_what_bf16_can_hold() -> None:
    x = torch.linspace(-3.0, 3.0, 100)
    many = x.expand(4096, 100).contiguous()
    got = round_to_bf16(many, bits_for(many, seed=5)).double()
    assert ((got.mean(0) - x).abs() <= 5 * 0.5 / 64 * 2**-7 * x.abs()).all()
    exact = x.bfloat16().float()
    assert torch.equal(round_to_bf16(exact, bits_for(exact, seed=6)).float(), exact)


@pytest.mark.parametrize("moments", ["bf16", "8bit"])
def test_second_moments_follow_gradients_that_become_small(moments: MomentDtype) -> None:
    """Gradients fall from 1 to 0.1, beta2 is 0.999: after 3000 steps v is 0.01 + 0.99 e^-3 of what it was.

    Rounding to the nearest would leave v where it was, 17 times too high: a step moves it by 0.1 %, less than half the
    spacing. Random rounding scatters single numbers by some 10 %, the mean of 1016 by 0.4 %; 3 % are allowed. One
    number in each block keeps large gradients, and with them the block its scale.
    """
    squares = torch.full((8, BLOCK), 0.01)
    squares[:, 0] = 16.0
    v = squares.clamp(min=1.0)
    for number in range(3000):
        v = v * 0.999 + 0.001 * squares
        bits = bits_for(v, seed=number * 2654435761)
        v = round_to_bf16(v, bits).float() if moments == "bf16" else decode_exp_avg_sq(*encode_exp_avg_sq(v, bits))
    assert float(v[:, 1:].mean()) == pytest.approx(0.01 + 0.99 * 0.999**3000, rel=0.03)


# Blocks


def test_a_second_moment_above_zero_is_never_stored_as_zero() -> None:
    x = torch.tensor([[1.0, 1e-30, 0.0, 1e-12] + [0.0] * 124])
    codes, scales = encode_exp_avg_sq(x, torch.full_like(x, 0xFFFF, dtype=torch.int32))  # these bits round down
    assert codes[0, :4].tolist() == [255, 1, 0, 1]
    assert scales.tolist() == [[1.0]]


def test_moments_of_zero_stay_zero() -> None:
    zeros = torch.zeros(2, 200)
    bits = torch.full((2, 200), 0xFFFF, dtype=torch.int32)
    for encode, decode in ((encode_exp_avg, decode_exp_avg), (encode_exp_avg_sq, decode_exp_avg_sq)):
        assert torch.equal(decode(*encode(zeros, bits)), zeros)


def test_a_block_is_128_numbers_of_one_row_and_no_block_feels_another() -> None:
    x = randn(3, 300).abs()
    spiked = x.clone()
    spiked[1, 130] = 1e6
    bits = bits_for(x, seed=1)
    for encode in (encode_exp_avg, encode_exp_avg_sq):
        (codes, scales), (moved, moved_scales) = encode(x, bits), encode(spiked, bits)
        assert scales.shape == (3, 3)
        wanted = torch.stack([x[:, :128].amax(1), x[:, 128:256].amax(1), x[:, 256:].amax(1)], 1)
        assert torch.equal(scales, wanted)
        assert (scales != moved_scales).nonzero().tolist() == [[1, 1]]
        same = torch.ones_like(x, dtype=torch.bool)
        same[1, 128:256] = False
        assert torch.equal(codes[same], moved[same])


def test_the_layout_has_two_bytes_of_master_and_a_byte_and_a_bit_per_8_bit_moment() -> None:
    layout = list(state_layout(torch.Size((4, 6, 256)), torch.bfloat16, "8bit", "8bit"))
    numbers = 4 * 6 * 256
    assert sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in layout) == numbers * (2 + 2 * (1 + 4 / BLOCK))
    assert [name for name, *_ in state_layout(torch.Size((3,)), torch.float32, "fp32", "bf16")] == [
        "exp_avg", "exp_avg_sq",
    ]  # fmt: skip
