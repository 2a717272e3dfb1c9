"""From `--sglang-NAME value` to the command line of SGLang's server."""

from __future__ import annotations

import difflib
import functools
import logging
import re
import subprocess
from collections.abc import Mapping
from typing import Any

from lockstep.errors import OptionError

logger = logging.getLogger(__name__)

_OURS = {
    "model_path": "--hf-checkpoint",
    "host": "--rollout-engine",
    "port": "--rollout-engine",
    "tp_size": "--rollout-num-gpus-per-engine",
    "tensor_parallel_size": "--rollout-num-gpus-per-engine",
    "weight_version": "--update-weight-transport",
    "nnodes": "--rollout-num-gpus-per-engine",
    "node_rank": "--rollout-num-gpus-per-engine",
}
"""Arguments that Lockstep gives itself, and the option that says what they are."""


def server_words(server_args: Mapping[str, Any], *, tp_size: int) -> list[str]:
    """The words of `--sglang-*` options, in their order: a switch alone, a list as several words, False left out.

    Raises:
        OptionError: an argument that Lockstep gives itself.
    """
    words: list[str] = []
    for name, value in _renamed(server_args, tp_size).items():
        if name in _OURS:
            raise OptionError(
                _flag(name), value, "Lockstep gives this argument to its servers itself.", f"Use {_OURS[name]}."
            )
        if value is False or value is None:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += [str(item) for item in (value if isinstance(value, list | tuple) else [value])]
    return words


def spanning_words(node_rank: int, num_nodes: int, address: str) -> list[str]:
    """What the process on one node of a server gets beside `server_words`; a server on one node needs none of it.

    Args:
        address: host:port on the first node at which the processes meet.
    """
    if num_nodes == 1:
        return []
    return ["--nnodes", str(num_nodes), "--node-rank", str(node_rank), "--dist-init-addr", address]


def _renamed(server_args: Mapping[str, Any], tp_size: int) -> dict[str, Any]:
    """Today's names for arguments that SGLang has renamed."""
    args = dict(server_args)
    for old in ("enable_ep_moe", "enable_deepep_moe"):
        if (value := args.pop(old, None)) is None or value is False:
            continue
        new = {"ep_size": tp_size} if old == "enable_ep_moe" else {"moe_a2a_backend": "deepep", "ep_size": tp_size}
        new = {name: args.get(name, value) for name, value in new.items()}
        args |= new
        spelled = " ".join(f"{_flag(name)} {value}" for name, value in new.items())
        logger.warning("%s is gone from SGLang; it is read as %s.", _flag(old), spelled)
    return args


@functools.cache
def known_flags(python: str) -> frozenset[str]:
    """The flags of the SGLang that is installed for this interpreter, asked of its server.

    Raises:
        OptionError: there is none that answers.
    """
    try:
        done = subprocess.run(
            [python, "-m", "sglang.launch_server", "--help"],
            capture_output=True,
            text=True,
            timeout=300,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OptionError(
            "--sglang-python", python, f"it cannot be run: {error}.", "Give the Python of SGLang's environment."
        ) from error
    flags = frozenset(re.findall(r"(?<![\w-])--[a-z0-9][a-z0-9-]*", done.stdout))
    if done.returncode or "--model-path" not in flags:
        raise OptionError(
            "--sglang-python",
            python,
            f"its `-m sglang.launch_server --help` failed: {done.stderr.strip()[-500:]}",
            "Give the Python of an environment in which SGLang works.",
        )
    return flags


def require_known(words: list[str], flags: frozenset[str]) -> None:
    """Refuse arguments that the installed SGLang has not got, before a server is started.

    Raises:
        OptionError: naming the nearest flag.
    """
    for word in words:
        if word.startswith("--") and word not in flags:
            near = difflib.get_close_matches(word, flags, n=1)
            raise OptionError(
                f"--sglang-{word.removeprefix('--')}",
                None,
                "the installed SGLang has no such argument.",
                f"Did you mean --sglang-{near[0].removeprefix('--')}?" if near else "See its --help.",
            )


def _flag(name: str) -> str:
    return f"--sglang-{name.replace('_', '-')}"
