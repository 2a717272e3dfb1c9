"""Megatron-Core's distributed checkpoints ("torch_dist") in and out of HF folders, without Megatron."""

from __future__ import annotations

from lockstep.checkpoint.megatron.to_hf import torch_dist_to_hf
from lockstep.checkpoint.megatron.to_torch_dist import hf_to_torch_dist

__all__ = ["hf_to_torch_dist", "torch_dist_to_hf"]
