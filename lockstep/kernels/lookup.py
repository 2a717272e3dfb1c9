"""Rows of a matrix by their numbers.

V rows of the matrix, D its width, T numbers.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def look_up(matrix_VD: Tensor, ids_T: Tensor) -> Tensor:
    """`matrix_VD[ids_T]`, `[T, D]`, by an operation whose backward adds up in one order: on a GPU indexing's does and
    that of `F.embedding` does not; on a CPU with several threads it is the other way round."""
    return matrix_VD[ids_T] if matrix_VD.is_cuda else F.embedding(ids_T, matrix_VD)
