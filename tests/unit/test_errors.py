"""Errors cross process borders whole."""

from __future__ import annotations

import pickle

import pytest

from lockstep import errors
from lockstep.errors import LockstepError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LockstepError)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_comes_out_of_another_process_as_it_went_in(kind: type[LockstepError]) -> None:
    error = kind("--field", 3, "it is odd.", "Use 2.")
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), str(back), vars(back)) == (kind, "--field is 3: it is odd. Use 2.", vars(error))
