"""Log-probs of a pack whose rows, and whose vocabulary, are spread over ranks.

R predictions of the whole pack, M of them on this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.kernels.linear_log_probs import KeptTokens, linear_log_probs
from lockstep.parallel.collectives import all_gather_rows, share
from lockstep.parallel.linear_log_probs import vocab_parallel_log_probs
from lockstep.parallel.mesh import Meshes
from lockstep.parallel.rows import RankRows


def log_probs_of_pack(
    hidden_SD: Tensor,
    head_weight: Tensor,
    rows: RankRows,
    rows_R: Tensor,
    targets_R: Tensor,
    meshes: Meshes,
    *,
    temperature: float,
    kept: KeptTokens | None,
    chunk_rows: int | None,
    with_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropies of all predictions, on every context- and tensor-parallel rank.

    So a loss may look at all tokens of a document, wherever they were computed. Every rank has to go on with the
    results alike, and of their gradient each takes what belongs to its own rows.

    Args:
        hidden_SD: this rank's rows.
        head_weight: this rank's slice of the vocabulary.
        rows_R: the row of the pack that makes each prediction.
    """
    layout = meshes.layout
    places_R = rows.place_T[rows_R]
    mine_M = (places_R >= 0).nonzero().squeeze(1)
    hidden_CD = all_gather_rows(hidden_SD, meshes.group("tp")) if layout.tp_size > 1 else hidden_SD
    inputs = hidden_CD[places_R[mine_M]], head_weight, targets_R[mine_M]
    kept = None if kept is None else _some_rows(kept, mine_M)
    if layout.tp_size > 1:
        log_probs_M, entropy_M = vocab_parallel_log_probs(
            *inputs,
            meshes.group("tp"),
            temperature=temperature,
            kept=kept,
            chunk_rows=chunk_rows,
            with_entropy=with_entropy,
        )
    else:
        log_probs_M, entropy_M = linear_log_probs(
            *inputs, temperature=temperature, kept=kept, chunk_rows=chunk_rows, with_entropy=with_entropy
        )
    if layout.cp_size == 1:
        return log_probs_M, entropy_M
    both_M = torch.stack([log_probs_M] if entropy_M is None else [log_probs_M, entropy_M])
    both_R = both_M.new_zeros(len(both_M), len(rows_R)).index_copy(1, mine_M, both_M)
    log_probs_R, *entropy = share(both_R, meshes.group("cp"))
    return log_probs_R, entropy[0] if entropy else None


def _some_rows(kept: KeptTokens, rows_M: Tensor) -> KeptTokens:
    sizes_R = kept.offsets_R1.diff()
    is_wanted_R = torch.zeros_like(sizes_R, dtype=torch.bool).index_fill(0, rows_M, True)
    offsets = torch.cat([sizes_R.new_zeros(1), sizes_R[rows_M].cumsum(0)])
    return KeptTokens(kept.token_ids_N[is_wanted_R[kept.rows_N()]], offsets)
