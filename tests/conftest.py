"""Its presence puts this folder on the import path: `tiny_models` serves tests of several rooms."""

from __future__ import annotations

import os

from hypothesis import settings

# The tensors of tests are tiny: more OpenMP threads only wait for each other. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine is no defect: no example has a time limit.
settings.register_profile("lockstep", deadline=None)
settings.load_profile("lockstep")
