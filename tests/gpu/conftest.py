"""Tests that need an NVIDIA GPU; on other machines the folder is left out of the collection."""

from __future__ import annotations

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
