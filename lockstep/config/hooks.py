"""Importing the functions and classes that a user names in an option."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from lockstep.errors import LockstepError, OptionError, RolloutError

SLIME_PATHS = {
    "slime.rollout.sglang_rollout.generate_rollout": "lockstep.rollout.generate.generate_rollout",
    "slime.rollout.sft_rollout.generate_rollout": "lockstep.rollout.generate.generate_rollout",
    "slime.rollout.data_source.RolloutDataSourceWithBuffer": "lockstep.data.RolloutDataSourceWithBuffer",
    "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std": (
        "lockstep.rollout.hooks.check_nonzero_std"
    ),
}
"""slime's own functions that its scripts name, and ours that do the same. With sft_loss ours does SFT's."""

_OF_A_FILE = "lockstep_hook_"
"""How the modules are called that come from a file, not from the path of packages."""


def our_path(path: str) -> str:
    """Where a function that may be named by its place in slime is found here."""
    return SLIME_PATHS.get(path, path)


def load_function(path: str, option: str = "hook path") -> Any:
    """The function or class at `package.module.name` or `path/to/file.py:name`.

    Args:
        option: the flag that named it, for the error (`--custom-rm-path`).
    Raises:
        OptionError: it cannot be imported; the reason carries the import's own error.
    """
    path = our_path(path)
    if ".py:" in path:
        file, _, name = path.rpartition(":")
        module = _load_file(Path(file), path, option)
    elif "." in path:
        module_name, _, name = path.rpartition(".")
        module = _load_module(module_name, path, option)
    else:
        raise OptionError(
            option, path, "this names no module.", "Write package.module.function or path/to/file.py:function."
        )
    if not callable(found := getattr(module, name, None)):
        raise OptionError(option, path, _what_is_there(module, name), "Check the name after the last separator.")
    return found


def load_hook(path: str, option: str) -> Callable[..., Any]:
    """A user's function, plain or async, whose exceptions name the option and the line that raised.

    Raises:
        OptionError: it cannot be imported.
    """
    function = load_function(path, option)

    @functools.wraps(function)
    def guarded(*arguments: Any, **named: Any) -> Any:
        with _blaming(option, path):
            result = function(*arguments, **named)
        return _guarded_await(result, option, path) if inspect.isawaitable(result) else result

    return guarded


def load_optional_hook(path: str | None, option: str) -> Callable[..., Any] | None:
    return load_hook(path, option) if path else None


async def _guarded_await(result: Awaitable[Any], option: str, path: str) -> Any:
    with _blaming(option, path):
        return await result


@contextmanager
def _blaming(option: str, path: str) -> Iterator[None]:
    try:
        yield
    except LockstepError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise RolloutError(
            option,
            path,
            f"it raised {type(error).__name__}: {error} ({place.filename}:{place.lineno}, in {place.name}).",
            _without_slime(error)
            or "Fix the function; --debug-rollout-only and --load-debug-rollout-data help to try it alone.",
        ) from error


def _what_is_there(module: ModuleType, name: str) -> str:
    if hasattr(module, name):
        return f"{name} is a {type(getattr(module, name)).__name__}, which cannot be called."
    return f"{module.__file__ if module.__name__.startswith(_OF_A_FILE) else module.__name__} has no {name}."


def _load_module(module_name: str, path: str, option: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except Exception as error:
        raise OptionError(
            option, path, f"importing {module_name} failed: {error!r}.", _how_to_import(module_name, path, error)
        ) from error


def _load_file(file: Path, path: str, option: str) -> ModuleType:
    """Load a file once per process, under a name of its own."""
    if not file.is_file():
        raise OptionError(option, path, f"there is no file {file}.", "Give the path of an existing Python file.")
    name = f"{_OF_A_FILE}{file.resolve()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise OptionError(
            option,
            path,
            f"running {file} failed: {error!r}.",
            _without_slime(error) or "Make the file importable on its own.",
        ) from error
    return module


def _how_to_import(module_name: str, path: str, error: Exception) -> str:
    if path.endswith(".py"):
        return f"Write {path}:NAME, with the name of the function in that file."
    file = Path(*module_name.split(".")).with_suffix(".py")
    if file.is_file() and isinstance(error, ModuleNotFoundError):
        return f"Write {file}:{path.rpartition('.')[2]}."
    return _without_slime(error) or "Check the name, and that it is importable."


def _without_slime(error: Exception) -> str | None:
    """What to write in the place of slime's own modules."""
    if not isinstance(error, ModuleNotFoundError) or (error.name or "").partition(".")[0] != "slime":
        return None
    return (
        "slime is not needed: import Sample from lockstep.types, and ask lockstep.rollout.current_policy() where "
        "the function posted to SGLang's router."
    )
