"""The Triton kernel of `lockstep.kernels.adamw`. Import it only where there is a GPU.

A program updates a few blocks of 128 numbers along the last dimension. Multiplications and additions are not fused
and roots and quotients are rounded correctly, so the bits are those of the specification. The kernel still waits for
memory, not for arithmetic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lockstep.kernels.adamw import BLOCK, SMALLEST_SCALE, AdamWStep, State, as_int32, num_blocks

_BLOCKS_PER_PROGRAM = 4
_NUM_WARPS = 4
_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 2}


def adamw_fused(weight_RD: Tensor, grad_RD: Tensor, state: State, step: AdamWStep, first_element: int) -> None:
    """As `lockstep.kernels.adamw.adamw`, for fewer than 2^31 numbers."""
    rows, width = weight_RD.shape
    assert all(t.is_contiguous() for t in (weight_RD, grad_RD, *state.values())), "the kernel walks flat memory"
    assert weight_RD.numel() < 2**31, "the kernel counts numbers in 32 bits"
    blocks = rows * num_blocks(width)
    if blocks == 0:
        return
    has_remainder = "remainder" in state
    _adamw_kernel[(triton.cdiv(blocks, _BLOCKS_PER_PROGRAM),)](
        weight_RD.view(torch.int16) if has_remainder else weight_RD,
        state.get("remainder", weight_RD),
        grad_RD,
        state["exp_avg"],
        state.get("exp_avg_scale", weight_RD),
        state["exp_avg_sq"],
        state.get("exp_avg_sq_scale", weight_RD),
        blocks,
        width,
        num_blocks(width),
        step.grad_scale,
        step.beta1,
        1.0 - step.beta1,
        step.beta2,
        1.0 - step.beta2,
        step.root_scale,
        step.eps,
        step.decay,
        step.step_size,
        as_int32(step.seed),
        as_int32(first_element),
        HAS_REMAINDER=has_remainder,
        EXP_AVG=_FORMATS[state["exp_avg"].dtype],
        EXP_AVG_SQ=_FORMATS[state["exp_avg_sq"].dtype],
        EVEN=width % BLOCK == 0,
        BLOCKS=_BLOCKS_PER_PROGRAM,
        BLOCK=BLOCK,
        SMALLEST_SCALE=SMALLEST_SCALE,
        num_warps=_NUM_WARPS,
        enable_fp_fusion=False,
    )


@triton.jit(do_not_specialize=["num_blocks", "width", "blocks_per_row", "seed", "first_element"])  # type: ignore[untyped-decorator]
def _adamw_kernel(  # type: ignore[no-untyped-def]
    weight, remainder, grad, exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale,
    num_blocks, width, blocks_per_row,
    grad_scale, beta1, rest1, beta2, rest2, root_scale, eps, decay, step_size, seed, first_element,
    HAS_REMAINDER: tl.constexpr, EXP_AVG: tl.constexpr, EXP_AVG_SQ: tl.constexpr,
    EVEN: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, SMALLEST_SCALE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    in_block = tl.arange(0, BLOCK)
    exists = block < num_blocks
    if EVEN:
        at = block[:, None] * BLOCK + in_block[None, :]
        inside = exists[:, None] & (in_block[None, :] < BLOCK)
    else:
        column = (block % blocks_per_row)[:, None] * BLOCK + in_block[None, :]
        at = (block // blocks_per_row)[:, None] * width + column
        inside = exists[:, None] & (column < width)

    if HAS_REMAINDER:
        high = tl.load(weight + at, mask=inside, other=0).to(tl.int32) << 16
        low = tl.load(remainder + at, mask=inside, other=0).to(tl.int32)
        master = (high + low).to(tl.float32, bitcast=True)
    else:
        master = tl.load(weight + at, mask=inside, other=0.0)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * grad_scale
    m = tl.load(exp_avg + at, mask=inside, other=0).to(tl.float32)
    if EXP_AVG == 2:
        root = m * (1 / 127)
        m = root * tl.abs(root) * tl.load(exp_avg_scale + block, mask=exists, other=0.0)[:, None]
    v = tl.load(exp_avg_sq + at, mask=inside, other=0).to(tl.float32)
    if EXP_AVG_SQ == 2:
        root = v * (1 / 255)
        root = root * root
        v = root * root * tl.load(exp_avg_sq_scale + block, mask=exists, other=0.0)[:, None]

    m = m * beta1 + g * rest1
    v = v * beta2 + g * g * rest2
    denominator = tl.sqrt_rn(v) * root_scale + eps
    master = master * decay - tl.div_rn(m * step_size, denominator)

    bits = _random_bits(at, seed, first_element)
    _store_moment(exp_avg, exp_avg_scale, at, inside, block, exists, m, bits & 0xFFFF, EXP_AVG, False, SMALLEST_SCALE)
    _store_moment(
        exp_avg_sq, exp_avg_sq_scale, at, inside, block, exists, v, bits >> 16, EXP_AVG_SQ, True, SMALLEST_SCALE
    )
    if HAS_REMAINDER:
        word = master.to(tl.int32, bitcast=True)
        tl.store(weight + at, ((word + 0x8000) >> 16).to(tl.int16), mask=inside)
        tl.store(remainder + at, word.to(tl.int16), mask=inside)
    else:
        tl.store(weight + at, master, mask=inside)


@triton.jit
def _random_bits(at, seed, first_element):  # type: ignore[no-untyped-def]
    x = ((at + first_element) ^ seed).to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit  # type: ignore[untyped-decorator]
def _store_moment(  # type: ignore[no-untyped-def]
    stored, scales, at, inside, block, exists, x, bits16,
    FORMAT: tl.constexpr, SQUARED: tl.constexpr, SMALLEST_SCALE: tl.constexpr,
):  # fmt: skip
    if FORMAT == 0:
        tl.store(stored + at, x, mask=inside)
    elif FORMAT == 1:
        word = x.to(tl.int32, bitcast=True) + bits16.to(tl.int32)
        tl.store(stored + at, (word >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        size = tl.abs(x)
        scale = tl.maximum(tl.max(tl.where(inside, size, 0.0), axis=1), SMALLEST_SCALE)
        share = size * tl.div_rn(1.0, scale)[:, None]
        chance = bits16.to(tl.float32) * (1 / 65536)
        if SQUARED:
            code = tl.minimum(tl.floor(tl.sqrt_rn(tl.sqrt_rn(share)) * 255.0), 254.0)
            low = code * (1 / 255)
            high = (code + 1.0) * (1 / 255)
            low = low * low
            high = high * high
            low = low * low
            high = high * high
            code = tl.where(share - low > chance * (high - low), code + 1.0, code)
            code = tl.where((x > 0) & (code == 0), 1.0, code)
            tl.store(stored + at, code.to(tl.uint8), mask=inside)
        else:
            code = tl.minimum(tl.floor(tl.sqrt_rn(share) * 127.0), 126.0)
            low = code * (1 / 127)
            high = (code + 1.0) * (1 / 127)
            low = low * low
            high = high * high
            code = tl.where(share - low > chance * (high - low), code + 1.0, code)
            tl.store(stored + at, tl.where(x < 0, -code, code).to(tl.int8), mask=inside)
        tl.store(scales + block, scale, mask=exists)
