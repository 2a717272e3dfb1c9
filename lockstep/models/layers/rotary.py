"""Rotary position embedding in the half-split layout of HF's Llama and Qwen models.

T packed tokens, N heads, H head dim, R <= H leading dims of a head that are turned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Yarn:
    """Context extension by stretching slow frequencies only (YaRN, arXiv:2309.00071); names and defaults are HF's."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @property
    def table_scale(self) -> float:
        """Factor on cosine and sine, so that scores grow with the context as the paper found best."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._score_growth(self.mscale) / self._score_growth(self.mscale_all_dim)
        return self._score_growth(1.0)

    def frequencies(self, wavelengths: Tensor, theta: float) -> Tensor:
        """Slow frequencies divided by `factor`, fast ones as they are, a linear ramp between."""
        count = len(wavelengths)
        low, high = (
            count * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(theta)
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * count - 1)
        places = torch.arange(count, dtype=torch.float32, device=wavelengths.device)
        keep = 1 - ((places - low) / (high - low if high != low else 0.001)).clamp(0, 1)
        return 1.0 / (self.factor * wavelengths) * (1 - keep) + 1.0 / wavelengths * keep

    def _score_growth(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclass(frozen=True)
class Rope:
    """What a model turns its heads by."""

    theta: float
    rotary_dim: int
    yarn: Yarn | None = None


def rotary_tables(positions_T: Tensor, rope: Rope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of every position, `[T, 1, R]` each, computed in fp32 as HF does.

    Source: RoFormer, arXiv:2104.09864, with the two halves of a head rotated against each other; the first half of
    the sine carries the minus of that rotation.
    """
    dim = rope.rotary_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=positions_T.device) / dim
    # HF's own order of operations: far from the start, a frequency rounded otherwise is another angle.
    wavelengths = rope.theta**exponents
    if rope.yarn is None:
        frequencies, scale = 1.0 / wavelengths, 1.0
    else:
        frequencies, scale = rope.yarn.frequencies(wavelengths, rope.theta), rope.yarn.table_scale
    angles = positions_T.float()[:, None] * frequencies
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat((cos, cos), dim=-1)[:, None].to(dtype), torch.cat((-sin, sin), dim=-1)[:, None].to(dtype)
