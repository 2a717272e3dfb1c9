from __future__ import annotations

import pytest
import torch
from tiny_models import dense_config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding, apply_rotary_pos_emb

from lockstep.models.layers.rotary import rotary_tables, rotate


@pytest.mark.parametrize("theta", [1e4, 1e6, 5e6])
@pytest.mark.parametrize("head_dim", [8, 128])
def test_rotation_is_that_of_transformers_at_any_position(head_dim: int, theta: float) -> None:
    """A frequency that is rounded otherwise is an angle that differs by 1e-3 at position 30000."""
    config = dense_config(head_dim=head_dim, rope_parameters={"rope_type": "default", "rope_theta": theta})
    positions = torch.tensor([0, 1, 17, 4095, 30000, 262143])
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, len(positions), 3, head_dim, generator=draw)

    cos, sin = Qwen3RotaryEmbedding(config)(q, positions[None])
    their_q, their_k = apply_rotary_pos_emb(q.transpose(0, 1), k.transpose(0, 1), cos, sin)
    tables = rotary_tables(positions, head_dim, theta, torch.float32)

    torch.testing.assert_close(rotate(q, tables), their_q[0].transpose(0, 1), rtol=0, atol=1e-6)
    torch.testing.assert_close(rotate(k, tables), their_k[0].transpose(0, 1), rtol=0, atol=1e-6)
