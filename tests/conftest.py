"""Its presence puts this folder on the import path: `tiny_models` serves tests of several rooms."""

from __future__ import annotations
