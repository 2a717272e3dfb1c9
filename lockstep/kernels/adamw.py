"""One AdamW update in a single pass: gradient, moments and master weight in, moments and weight out.

`adamw_reference` is the specification, in torch, for any device. `adamw` runs the Triton kernel of
`lockstep.kernels.adamw_triton` on a GPU; the two agree bit for bit, because both round after every operation.

**Master weights.** A bf16 weight is the fp32 master rounded to the nearest, ties away from zero. Rounding so is adding
half a unit to the bits, hence `master bits = (weight bits << 16) + remainder` with the signed low half as remainder:
two bytes in place of four, and no bit is lost. An fp32 weight is its own master.

**Moments** are fp32, bf16, or 8-bit codes with one fp32 scale per block of 128 numbers along the last dimension, their
largest size. Of a number `x` with scale `s`

    exp_avg      int8    x = sign(c) (c / 127)^2 s
    exp_avg_sq   uint8   x = (c / 255)^4 s

The powers were chosen on the moments of a training run (`benchmarks/results/optimizer-convergence.md`). A second moment
above 0 never gets code 0: a denominator that collapses would turn a small gradient into a huge step.

**Rounding of moments is random and unbiased**, by the fraction of the way to the next representable number. Rounded to
the nearest, a second moment with beta2 near 1 stands still: one step moves it by less than half its spacing. The random
bits are a hash of (seed, element), so the same step of the same run always rounds alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

MomentDtype = Literal["fp32", "bf16", "8bit"]

BLOCK = 128
"""Numbers that share the scale of an 8-bit moment. It divides the widths of Qwen3's matrices and of most shards."""

SMALLEST_SCALE = 2.0**-100
"""Lower bound of a scale, which keeps quotients by it finite; 1e-15 squared lies above its smallest code."""

State = dict[str, Tensor]
"""The optimizer's tensors of one weight `[R, D]`, by the names that `state_layout` gives."""

_CHUNK = 2**20
"""Numbers that the specification updates at once, which bounds its temporaries."""


@dataclass(frozen=True)
class AdamWStep:
    """The numbers of one update. Decay is decoupled; `step` counts from 1; gradients are multiplied by `grad_scale`."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    grad_scale: float
    seed: int
    """32 bits that differ between steps and weights, for random rounding."""

    @property
    def decay(self) -> float:
        return 1.0 - self.lr * self.weight_decay

    @property
    def step_size(self) -> float:
        return self.lr / (1.0 - self.beta1**self.step)

    @property
    def root_scale(self) -> float:
        """Factor of the root of the second moment that corrects its bias towards 0."""
        return float((1.0 - self.beta2**self.step) ** -0.5)


def state_layout(
    shape: torch.Size, dtype: torch.dtype, exp_avg: MomentDtype, exp_avg_sq: MomentDtype
) -> Iterator[tuple[str, torch.Size, torch.dtype]]:
    """Name, shape and type of every state tensor of a weight of this shape and type, all zero before the first step."""
    if dtype == torch.bfloat16:
        yield "remainder", shape, torch.int16
    for name, stored, code in (("exp_avg", exp_avg, torch.int8), ("exp_avg_sq", exp_avg_sq, torch.uint8)):
        yield name, shape, {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": code}[stored]
        if stored == "8bit":
            yield f"{name}_scale", torch.Size((*shape[:-1], num_blocks(shape[-1]))), torch.float32


def num_blocks(width: int) -> int:
    return -(-width // BLOCK)


def adamw(weight_RD: Tensor, grad_RD: Tensor, state: State, step: AdamWStep, *, first_element: int = 0) -> None:
    """Update weight and state in place, with the fastest implementation that the device has.

    Args:
        weight_RD: fp32 or bf16, contiguous.
        grad_RD: fp32 or bf16, contiguous; not changed.
        state: contiguous tensors as in `state_layout`, on the weight's device.
        first_element: index of the first number within its whole weight, when these rows are a part of it.
    """
    if weight_RD.is_cuda and find_spec("triton") is not None:
        from lockstep.kernels.adamw_triton import adamw_fused

        adamw_fused(weight_RD, grad_RD, state, step, first_element)
    else:
        adamw_reference(weight_RD, grad_RD, state, step, first_element=first_element)


@torch.no_grad()
def adamw_reference(
    weight_RD: Tensor, grad_RD: Tensor, state: State, step: AdamWStep, *, first_element: int = 0
) -> None:
    """As `adamw`. Source: Loshchilov and Hutter, arXiv:1711.05101, with Adam's bias corrections."""
    width = weight_RD.shape[1]
    rows = max(1, _CHUNK // max(1, width))
    for start in range(0, weight_RD.shape[0], rows):
        part = slice(start, start + rows)
        _update_rows(
            weight_RD[part],
            grad_RD[part],
            {name: tensor[part] for name, tensor in state.items()},
            step,
            first_element + start * width,
        )


def _update_rows(weight_RD: Tensor, grad_RD: Tensor, state: State, step: AdamWStep, first_element: int) -> None:
    master = join_master(weight_RD, state["remainder"]) if "remainder" in state else weight_RD
    grad = grad_RD.float() * step.grad_scale
    exp_avg = decode_exp_avg(state["exp_avg"], state.get("exp_avg_scale"))
    exp_avg = exp_avg * step.beta1 + grad * (1.0 - step.beta1)
    exp_avg_sq = decode_exp_avg_sq(state["exp_avg_sq"], state.get("exp_avg_sq_scale"))
    exp_avg_sq = exp_avg_sq * step.beta2 + grad * grad * (1.0 - step.beta2)
    denominator = _root(exp_avg_sq) * step.root_scale + step.eps
    master = master * step.decay - exp_avg * step.step_size / denominator

    bits = random_bits(step.seed, first_element, weight_RD) if _rounds(state) else None
    _store(state, "exp_avg", exp_avg, None if bits is None else bits & 0xFFFF)
    _store(state, "exp_avg_sq", exp_avg_sq, None if bits is None else (bits >> 16) & 0xFFFF)
    if "remainder" in state:
        weight, remainder = split_master(master)
        weight_RD.copy_(weight)
        state["remainder"].copy_(remainder)
    else:
        weight_RD.copy_(master)


def _root(x: Tensor) -> Tensor:
    """Correctly rounded, as IEEE 754 and the GPU have it; torch's fp32 root on the CPU is not."""
    return x.double().sqrt().float()


def _rounds(state: State) -> bool:
    return any(state[name].dtype != torch.float32 for name in ("exp_avg", "exp_avg_sq"))


def _store(state: State, name: str, value: Tensor, bits16: Tensor | None) -> None:
    stored = state[name]
    if stored.dtype == torch.float32:
        stored.copy_(value)
        return
    assert bits16 is not None
    if stored.dtype == torch.bfloat16:
        stored.copy_(round_to_bf16(value, bits16))
        return
    codes, scales = (encode_exp_avg if name == "exp_avg" else encode_exp_avg_sq)(value, bits16)
    stored.copy_(codes)
    state[f"{name}_scale"].copy_(scales)


# Master weights


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """An fp32 master as bf16 weight (nearest, ties away from zero) and signed 16-bit remainder."""
    bits = master.view(torch.int32)
    weight = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    return weight, bits.to(torch.int16)


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 master that `split_master` took apart, every bit of it."""
    high = weight.view(torch.int16).to(torch.int32) << 16
    return (high + remainder.to(torch.int32)).view(torch.float32)


# Random rounding


def random_bits(seed: int, first_element: int, like_RD: Tensor) -> Tensor:
    """32 random bits for each number, as int32: a hash of the seed and of the number's index.

    Source: the finalizer of MurmurHash3 (Austin Appleby, public domain).
    """
    index = torch.arange(like_RD.numel(), dtype=torch.int32, device=like_RD.device) + as_int32(first_element)
    x = index.view(like_RD.shape) ^ as_int32(seed)
    x = (x ^ _shifted_right(x, 16)) * as_int32(0x85EBCA6B)
    x = (x ^ _shifted_right(x, 13)) * as_int32(0xC2B2AE35)
    return x ^ _shifted_right(x, 16)


def _shifted_right(x: Tensor, by: int) -> Tensor:
    """Without copies of the sign bit."""
    return (x >> by) & ((1 << (32 - by)) - 1)


def as_int32(value: int) -> int:
    """The integer with the same low 32 bits that int32 can hold."""
    return (value + 2**31) % 2**32 - 2**31


def round_to_bf16(x: Tensor, bits16: Tensor) -> Tensor:
    """fp32 as one of the two bf16 neighbours, the nearer one more often: the mean over random bits is `x`."""
    return ((x.view(torch.int32) + bits16) >> 16).to(torch.int16).view(torch.bfloat16)


# 8-bit moments


def encode_exp_avg(x_RD: Tensor, bits16: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 numbers as signed codes and the scales of their blocks, `[R, ceil(D / 128)]`."""
    share_RD, scale_RB = _shares(x_RD)
    code_RD = (_root(share_RD) * 127.0).floor().clamp(max=126.0)
    low, high = (code_RD * (1 / 127)).square(), ((code_RD + 1.0) * (1 / 127)).square()
    code_RD = code_RD + (share_RD - low > bits16 * 2.0**-16 * (high - low))
    return torch.where(x_RD < 0, -code_RD, code_RD).to(torch.int8), scale_RB


def decode_exp_avg(stored_RD: Tensor, scale_RB: Tensor | None) -> Tensor:
    if scale_RB is None:
        return stored_RD.float()
    root = stored_RD.float() * (1 / 127)
    return root * root.abs() * _per_number(scale_RB, stored_RD.shape[1])


def encode_exp_avg_sq(x_RD: Tensor, bits16: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers from 0 up, in fp32, as codes and the scales of their blocks; what is above 0 gets code 1 or more."""
    share_RD, scale_RB = _shares(x_RD)
    code_RD = (_root(_root(share_RD)) * 255.0).floor().clamp(max=254.0)
    low, high = (code_RD * (1 / 255)).square().square(), ((code_RD + 1.0) * (1 / 255)).square().square()
    code_RD = code_RD + (share_RD - low > bits16 * 2.0**-16 * (high - low))
    return code_RD.clamp(min=(x_RD > 0).float()).to(torch.uint8), scale_RB


def decode_exp_avg_sq(stored_RD: Tensor, scale_RB: Tensor | None) -> Tensor:
    if scale_RB is None:
        return stored_RD.float()
    root = stored_RD.float() * (1 / 255)
    return root.square().square() * _per_number(scale_RB, stored_RD.shape[1])


def _shares(x_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Sizes as shares of the largest in their block, to one rounding, and these largest."""
    width = x_RD.shape[1]
    size_RD = x_RD.abs()
    padded = F.pad(size_RD, (0, num_blocks(width) * BLOCK - width))
    scale_RB = padded.unflatten(1, (-1, BLOCK)).amax(-1).clamp(min=SMALLEST_SCALE)
    return size_RD * _per_number(1.0 / scale_RB, width), scale_RB


def _per_number(scale_RB: Tensor, width: int) -> Tensor:
    return scale_RB.repeat_interleave(BLOCK, dim=1)[:, :width]
