from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import dense_config
from transformers import Qwen3NextConfig as HFNext
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen3_next import modeling_qwen3_next as hf_next

from lockstep.kernels.norm_rotary import rotate
from lockstep.models import read_model_config
from lockstep.models.layers.rotary import rotary_tables

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "yarn": YARN,
    "yarn, no original length": {"rope_type": "yarn", "factor": 8.0},
    "yarn, factor given": YARN | {"attention_factor": 1.1},
    "yarn, other ramp": YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False},
    "yarn, mscale": YARN | {"mscale": 0.8, "mscale_all_dim": 0.5},
}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("theta", [1e4, 1e6, 5e6])
@pytest.mark.parametrize("head_dim", [8, 128])
def test_rotation_is_that_of_transformers_at_any_position(head_dim: int, theta: float, scaling: str) -> None:
    """A frequency that is rounded otherwise is an angle that differs by 1e-3 at position 30000."""
    config = dense_config(
        head_dim=head_dim, rope_parameters=SCALINGS[scaling] | {"rope_theta": theta}, max_position_embeddings=131072
    )
    positions = torch.tensor([0, 1, 17, 4095, 30000, 262143])
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, len(positions), 3, head_dim, generator=draw)

    cos, sin = Qwen3RotaryEmbedding(config)(q, positions[None])
    their_q, their_k = apply_rotary_pos_emb(q.transpose(0, 1), k.transpose(0, 1), cos, sin)
    tables = rotary_tables(positions, read_model_config(config.to_dict()).rope, torch.float32)

    torch.testing.assert_close(rotate(q, tables), their_q[0].transpose(0, 1), rtol=0, atol=2e-6)
    torch.testing.assert_close(rotate(k, tables), their_k[0].transpose(0, 1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("part", [0.25, 0.5, 1.0])
def test_a_part_of_each_head_is_turned_as_transformers_does(part: float) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": part}
    config = HFNext(head_dim=64, rope_parameters=rope)
    positions = torch.tensor([0, 1, 4095, 262143])
    q = torch.randn(len(positions), 3, 64, generator=torch.Generator().manual_seed(0))

    cos, sin = hf_next.Qwen3NextRotaryEmbedding(config)(q, positions[None])
    theirs, _ = hf_next.apply_rotary_pos_emb(q.transpose(0, 1)[None], q.transpose(0, 1)[None], cos, sin)
    tables = rotary_tables(positions, read_model_config(config.to_dict()).rope, torch.float32)
    torch.testing.assert_close(rotate(q, tables), theirs[0].transpose(0, 1), rtol=0, atol=2e-6)
