"""Which reward judges a sample, by slime's rules, and how its function is found."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lockstep.errors import OptionError
from lockstep.rewards.boxed import last_boxed
from lockstep.types import Sample

RewardFunction = Callable[[Any, Any], Any]

BUILTIN_REWARDS: tuple[str, ...] = ("math", "deepscaler", "dapo", "f1", "gpqa", "exact", "random", "remote_rm")
_BOXED = "boxed_"


@dataclass(frozen=True)
class RewardName:
    """The option that chose a reward, and its value."""

    option: str
    value: str

    @property
    def is_custom(self) -> bool:
        return self.option == "--custom-rm-path"

    @property
    def builtin(self) -> str:
        """The built-in's name without `boxed_`."""
        return self.value.removeprefix(_BOXED)

    @property
    def is_boxed(self) -> bool:
        return self.value.startswith(_BOXED)


def reward_name(args: Any, sample: Sample) -> RewardName:
    """The reward that judges `sample`.

    The first that is set: the sample's `custom_rm_path`, `--custom-rm-path`, `metadata["rm_type"]`, `--rm-type`.

    Raises:
        OptionError: none is set, or it is not one of ours.
    """
    if path := sample.custom_rm_path or args.custom_rm_path:
        return RewardName("--custom-rm-path", path)
    if rm_type := sample.metadata.get("rm_type") or args.rm_type:
        return _checked_rm_type(str(rm_type).strip(), args)
    raise OptionError(
        "--rm-type",
        None,
        f"sample {sample.index} has no reward: there is no custom function and no metadata.rm_type either.",
        f"Set --custom-rm-path or --rm-type, one of {', '.join(BUILTIN_REWARDS)}.",
    )


def check_reward_options(args: Any) -> None:
    """Raise OptionError for a reward that could never work, before anything is sampled."""
    if args.rm_type and not args.custom_rm_path:
        _checked_rm_type(args.rm_type.strip(), args)
    if args.group_rm and not args.custom_rm_path:
        raise OptionError(
            "--group-rm", True, "the built-in rewards judge one sample at a time.", "Set --custom-rm-path, or drop it."
        )


def _checked_rm_type(rm_type: str, args: Any) -> RewardName:
    name = RewardName("--rm-type", rm_type)
    if name.builtin == "remote_rm" and not args.rm_url:
        raise OptionError("--rm-url", None, "--rm-type remote_rm has no address to ask.", "Give the service's URL.")
    if name.builtin in BUILTIN_REWARDS:
        return name
    if name.builtin == "ifbench":
        raise OptionError(
            "--rm-type",
            rm_type,
            "this reward of slime's comes in a later version.",
            "Until then wrap the IFBench checkers in a function and name it with --custom-rm-path.",
        )
    closest = difflib.get_close_matches(name.builtin, BUILTIN_REWARDS, n=1, cutoff=0.0)[0]
    prefix = _BOXED if name.is_boxed else ""
    raise OptionError(
        "--rm-type",
        rm_type,
        f"there is no such reward. The closest is {prefix}{closest}.",
        f"Use one of {', '.join(BUILTIN_REWARDS)}, with or without boxed_ in front, or --custom-rm-path.",
    )


def load_reward(name: RewardName) -> RewardFunction:
    """The function behind `name`, which takes `(args, sample)` or, with --group-rm, `(args, samples)`."""
    if name.is_custom:
        from lockstep.config.hooks import load_function  # pydantic, which only custom rewards need to wait for

        return load_function(name.value, option=name.option)  # type: ignore[no-any-return]
    function: RewardFunction = importlib.import_module(f"lockstep.rewards.{name.builtin}").reward
    return _of_boxed(function) if name.is_boxed else function


def _of_boxed(function: RewardFunction) -> RewardFunction:
    """`function`, judging the content of the last `\\boxed{}` only, or an empty response where there is none."""

    def boxed(args: Any, sample: Sample) -> Any:
        return function(args, replace(sample, response=last_boxed(sample.response) or ""))

    return boxed
