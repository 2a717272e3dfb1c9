"""From the words of a command line to a `Config`: defaults < recipe < flags."""

from __future__ import annotations

import argparse
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from lockstep.config import compatibility
from lockstep.config.compatibility import plain_value
from lockstep.config.config import GROUPS, HOME, KNOWN_NAMES, PREFIXES, Config, flatten
from lockstep.config.reporting import flag_of, unknown_option
from lockstep.errors import OptionError
from lockstep.option_parser import OptionParser

COMMAND_FLAGS = ("--help", "--dry-run")
_NEGATIVE_NUMBER = re.compile(r"-\.?\d")


@dataclass(frozen=True)
class ParsedOptions:
    """A config and what to tell the user about it."""

    config: Config
    notes: list[str]
    """One line per reason why a given flag has no effect of its own."""
    dry_run: bool = False


_OF_A_REAL_RUN = ("load", "save", "save_interval", "keep_last_checkpoints", "save_hf", "run_dir")
"""What a recipe says of folders, which are not for random weights."""


def parse_options(command: str, words: Sequence[str]) -> ParsedOptions:
    """The options of `lockstep train` and `lockstep eval`.

    Raises:
        OptionError: a flag or a recipe's key is unknown, or a value cannot work.
    """
    plain_words, collected = _split_sglang(_normalise(words))
    given = vars(option_parser(command).parse_args(plain_words))
    recipe, dry_run = given.pop("recipe"), given.pop("dry_run")
    values = read_recipe(Path(recipe)) if recipe else {}
    flags = {name: _from_json(name, value) for name, value in given.items()} | collected
    is_dummy = flags.get("load_format", values.get("load_format")) == "dummy"
    kept_apart = [name for name in _OF_A_REAL_RUN if is_dummy and name in values]
    values = {name: value for name, value in values.items() if name not in kept_apart}
    for name, value in flatten(flags).items():
        values[name] = {**values.get(name, {}), **value} if name in PREFIXES.values() else value
    if recipe:
        values.setdefault("run_dir", f"runs/{recipe_name(Path(recipe))}{'-dummy' if is_dummy else ''}")
    config = Config.from_dict(values)
    notes = _notes(config, values)
    if kept_apart:
        left_out = ", ".join(f"--{name.replace('_', '-')}" for name in kept_apart)
        notes.append(
            f"--load-format dummy: {left_out} of the recipe are left out; random weights stay out of its folders."
        )
    return ParsedOptions(config, notes, dry_run)


def read_recipe(path: Path) -> dict[str, Any]:
    """The options of a TOML recipe by name.

    Raises:
        OptionError: the file is missing or is not TOML, or a key is unknown or in the wrong table.
    """
    try:
        with path.open("rb") as file:
            return flatten(tomllib.load(file))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OptionError("recipe", str(path), f"it cannot be read: {reason}.", "Give the path of a recipe.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError("recipe", str(path), f"it is not TOML: {error}.", "Correct the file.") from None


def recipe_name(path: Path) -> str:
    """What a run is called: the recipe's file name, or its folder's when the file is just `recipe.toml`."""
    return path.resolve().parent.name if path.stem == "recipe" else path.stem


@cache
def option_parser(command: str) -> OptionParser:
    """The parser of one command, with one section of help per group of options."""
    parser = OptionParser(
        prog=f"lockstep {command}",
        usage=f"lockstep {command} [RECIPE.toml] [--option value ...]",
        description="Options come from defaults, then the recipe, then the command line; the last one wins.",
        epilog="Other flags of slime and Megatron: docs/compatibility.md. --sglang-* and --router-* take any name.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", nargs="?", default=None, metavar="RECIPE.toml", help="TOML file of options")
    parser.add_argument("--dry-run", action="store_true", default=False, help="Print the options as TOML and stop.")
    for group, model in GROUPS.items():
        section = parser.add_argument_group(f"[{group}]", model.__doc__)
        for name, field in model.model_fields.items():
            _add_option(section, name, field)
    for entry in compatibility.FLAGS.values():
        if entry.name not in HOME:
            _add_foreign_flag(parser, entry)
    for alias, name in compatibility.ALIASES.items():
        parser.add_argument(flag_of(alias), dest=name, action="store_true", help=argparse.SUPPRESS)
    return parser


def _add_option(section: argparse._ArgumentGroup, name: str, field: FieldInfo) -> None:
    flag, help_text = flag_of(name), _help(field)
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    if field.annotation is bool:
        _add_switch(section, flag, name, help_text)
    elif extra.get("repeatable"):
        section.add_argument(flag, dest=name, action="append", metavar="VALUE", help=help_text)
    elif words := _tuple_words(field.annotation):
        section.add_argument(flag, dest=name, nargs=words, metavar="VALUE", help=help_text)
    else:
        metavar = "JSON" if get_origin(field.annotation) is dict else "VALUE"
        section.add_argument(flag, dest=name, metavar=metavar, help=help_text)


def _add_switch(section: argparse._ActionsContainer, flag: str, name: str, help_text: str) -> None:
    section.add_argument(flag, dest=name, action="store_const", const=True, help=help_text)
    section.add_argument(_negation(flag), dest=name, action="store_const", const=False, help=argparse.SUPPRESS)


def _negation(flag: str) -> str:
    return f"--no-{flag.removeprefix('--')}"


def _add_foreign_flag(parser: argparse.ArgumentParser, entry: compatibility.SlimeFlag) -> None:
    if entry.words == "none":
        _add_switch(parser, entry.flag, entry.name, argparse.SUPPRESS)
    else:
        nargs = "+" if entry.words == "many" else None
        parser.add_argument(entry.flag, dest=entry.name, nargs=nargs, help=argparse.SUPPRESS)


def _tuple_words(annotation: Any) -> int | str | None:
    """How many words a tuple field takes: a number, "+" for one or more, None when it is no tuple."""
    if get_origin(annotation) in (Union, UnionType):
        return next((found for part in get_args(annotation) if (found := _tuple_words(part))), None)
    if get_origin(annotation) is not tuple:
        return None
    items = get_args(annotation)
    return "+" if Ellipsis in items else len(items)


def choices_of(annotation: Any) -> list[str]:
    """The words that an option takes, or none when it takes any."""
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    if get_origin(annotation) in (Union, UnionType):
        return [choice for part in get_args(annotation) for choice in choices_of(part)]
    return []


def _help(field: FieldInfo) -> str:
    text = (field.description or "").replace("%", "%%")
    if choices := choices_of(field.annotation):
        text += f" One of: {', '.join(choices)}."
    if field.is_required():
        return f"{text} Required."
    shown = field.default
    if field.default_factory is not None or shown in (None, (), False):
        return text
    return f"{text} ({shown})"


@cache
def switches() -> frozenset[str]:
    """Flags that take no word: `--colocate`, `--no-colocate`."""
    own = [flag_of(name) for model in GROUPS.values() for name, f in model.model_fields.items() if f.annotation is bool]
    foreign = [entry.flag for entry in compatibility.FLAGS.values() if entry.words == "none"]
    aliases = [flag_of(alias) for alias in compatibility.ALIASES]
    return frozenset([*own, *foreign, *aliases])


def _normalise(words: Sequence[str]) -> Iterator[str]:
    """Words as argparse wants them: switches without a word, negative numbers joined to their flag.

    Raises:
        OptionError: a flag is unknown.
    """
    known_switches, rest = switches(), list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            yield word
            continue
        flag, equals, value = word.partition("=")
        _check_flag(flag, value if equals else (rest[0] if rest else None))
        if flag in known_switches:
            if not equals and rest and rest[0].lower() in ("true", "false"):
                equals, value = "=", rest.pop(0)
            yield _switch(flag, value) if equals else flag
        elif not equals and rest and _NEGATIVE_NUMBER.match(rest[0]):
            yield f"{flag}={rest.pop(0)}"
        else:
            yield word


def _switch(flag: str, value: str) -> str:
    if value.lower() not in ("true", "false"):
        raise OptionError(flag, value, "it must be true or false.", f"Write {flag} or {_negation(flag)}.")
    return flag if value.lower() == "true" else _negation(flag)


def _check_flag(flag: str, value: Any) -> None:
    name = flag.removeprefix("--").replace("-", "_")
    positive = name.removeprefix("no_")
    known = KNOWN_NAMES | PREFIXES.keys()
    if "_" in flag or not (
        flag in COMMAND_FLAGS
        or name in KNOWN_NAMES
        or (positive in KNOWN_NAMES and flag_of(positive) in switches())
        or name.startswith(tuple(PREFIXES))
    ):
        raise unknown_option(flag, value, positive if positive in KNOWN_NAMES else name, known)


def _split_sglang(words: Iterator[str]) -> tuple[list[str], dict[str, Any]]:
    """Take `--sglang-NAME` and `--router-NAME` with their words out of the command line."""
    kept: list[str] = []
    collected: dict[str, list[str]] = {}
    current: list[str] | None = None
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            name = flag.removeprefix("--").replace("-", "_")
            current = None
            if name.startswith(tuple(PREFIXES)) and name not in KNOWN_NAMES:
                current = collected[name] = [value] if equals else []
                continue
        (kept if current is None else current).append(word)
    return kept, {name: _scalar_or_list(values) for name, values in collected.items()}


def _scalar_or_list(values: list[str]) -> Any:
    if not values:
        return True
    return plain_value(values[0]) if len(values) == 1 else plain_value(values)


def _from_json(name: str, value: Any) -> Any:
    """A dict option's text, read."""
    annotation = next(
        (model.model_fields[name].annotation for model in GROUPS.values() if name in model.model_fields), None
    )
    if get_origin(annotation) is not dict:
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise OptionError(
            flag_of(name), value, f"it is not JSON: {error}.", """Write it like '{"enable_thinking": false}'."""
        ) from None


def _notes(config: Config, given: Mapping[str, Any]) -> list[str]:
    """What has no effect of its own, and what an option falls back to, in sentences."""
    notes = compatibility.notes(name for name in given if not _is_default(config, name))
    if config.rollout.rollout_engine == "sglang":
        routers = [f"--router-{name}".replace("_", "-") for name in config.sglang.router_args]
        notes += [f"{', '.join(routers)}: requests go straight to the servers; there is no router."] * bool(routers)
    elif unused := config.sglang.unused_by_the_embedded_engine:
        notes.append(f"{', '.join(unused)}: for SGLang's servers; the embedded engine does not use them.")
    if config.rollout.num_rollout is not None and config.rollout.num_epoch is not None:
        notes.append("--num-epoch: --num-rollout is set too, and decides the length of the run.")
    if config.algorithm.use_kl_loss and config.checkpoint.ref_load is None:
        notes.append(f"--use-kl-loss: without --ref-load the reference model is {config.model.hf_checkpoint}.")
    return notes


def _is_default(config: Config, name: str) -> bool:
    if name not in HOME:
        return False
    group = getattr(config, HOME[name])
    return bool(getattr(group, name) == type(group).model_fields[name].default)
