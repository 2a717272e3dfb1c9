"""Layers that give a token the same bits in sampling and in training (`--true-on-policy`).

`compute_exactly` swaps them into a model once; trainer and sampler then follow the model that they are given.
"""

from lockstep.exact.layers import compute_exactly, is_exact, require_exactness
from lockstep.exact.packed import log_probs_for, packed_documents

__all__ = ["compute_exactly", "is_exact", "log_probs_for", "packed_documents", "require_exactness"]
