"""The dense feed-forward layer."""

from __future__ import annotations

from torch import Tensor, nn

from lockstep.kernels.swiglu import swiglu


class GatedMLP(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))` (arXiv:2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        projected: Tensor = self.down_proj(self.activate(x_TD))
        return projected

    def activate(self, x_TD: Tensor) -> Tensor:
        """`silu(gate(x)) * up(x)`, `[T, intermediate]`."""
        return swiglu(self.gate_proj(x_TD), self.up_proj(x_TD))
