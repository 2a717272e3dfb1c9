"""The two pages that are made from the options: `python -m lockstep.config.docs` writes them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from lockstep.config.base import OptionGroup
from lockstep.config.compatibility import ALIASES, SECTIONS, SlimeFlag
from lockstep.config.config import GROUPS
from lockstep.config.reporting import flag_of

_OPTIONS_HEAD = """\
# Options

`lockstep train RECIPE.toml [--option value ...]`. Each option is a flag (`--rollout-batch-size 32`) and a key of a TOML
recipe (`rollout_batch_size = 32`, below the table of its group or at the top). Defaults give way to the recipe, and the
recipe to flags; of a flag that is given twice, the last one counts. A switch is given as `--flag`, `--no-flag`,
`--flag true` or `--flag false`; a list as words after the flag; a table as JSON. `--dry-run` prints what holds in the
end, as a recipe.

Names are slime's and Megatron's; what becomes of all their flags stands in [compatibility.md](compatibility.md).

<!-- Made from lockstep/config by `python -m lockstep.config.docs`; change it there. -->
"""

_COMPATIBILITY_HEAD = """\
# Compatibility with slime

The argument arrays of a slime script are read as they stand. Each flag is one of four:

- **same**: an option of Lockstep with slime's name and meaning ([options.md](options.md)).
- **accepted**: may stay in the script; what it asks for happens anyway. A run says so once, with the reason. Where a
  value is shown, others stop with a sentence that says what to use.
- **later**: not there yet. The value shown works; any other stops the run with a sentence that says what to use.
- **never**: does not fit Lockstep. The value shown works; any other stops in the same way.

A flag that is in neither list is an error that names the closest one.

## What differs on purpose

- **Unknown flags, keys of a recipe and values** are errors (exit code 2), never ignored.
- **Defaults.** `--colocate` is on, because sampler and trainer share one set of weights. `--actor-num-gpus-per-node` is
  1 (slime: 8). `--rollout-batch-size` is 32 and `--rollout-max-response-len` 1024 (slime asks for both).
- **Model shape** comes from the HF config. Megatron's shape flags are compared with it, and a difference is an error.
- **Checkpoints.** `--hf-checkpoint` gives the start weights, and `--ref-load` is a folder in HF format; a Megatron
  torch_dist folder is refused (`lockstep convert torch-dist-to-hf` makes one). `--load` and `--save` are Lockstep's own
  atomic checkpoints.
- **Malformed rows** stop the run with file and line, or are counted with `--skip-malformed-rows`.
- **Uneven groups** are normalised by the prompt they belong to; a group of one is refused (`--n-samples-per-prompt 1`).
- **Options that would do nothing** are refused: `--kl-coef` with grpo and gspo, `--kl-loss-coef` without
  `--use-kl-loss`, `--save-interval` without `--save`.
- **`--rm-type math`** compares with math-verify, where slime normalises strings and asks sympy in some cases.
  Right here and wrong in slime: an unreduced fraction (`2/4` for `1/2`), an integer written otherwise (`4/2` or `1+1`
  for `2`), powers (`2^{10}` for `1024`), sets in another order, and a correct answer without `\\boxed{}`. Right in
  slime and wrong here: numbers with `million` or `billion` in words.
- **Hooks** have slime's signatures. `args` is read-only, and options of slime that Lockstep has not got read there as
  their neutral value. slime's own paths (`slime.rollout.filter_hub...check_reward_nonzero_std`) are understood for the
  default rollout, SFT's rollout, the default data source and that filter.
- **SGLang's arguments** (`--sglang-NAME`, `--router-NAME`, any name) are kept in the config. With `--rollout-engine
  sglang` the former reach the servers ([sglang.md](sglang.md)); there is no router. The embedded engine, which is the
  default, reads `--sglang-mem-fraction-static` (on a GPU, the share of the memory beside the model that its KV cache
  may take), `--sglang-chunked-prefill-size`, `--sglang-cuda-graph-bs` (batch sizes of decoding that are captured) and
  `--sglang-disable-cuda-graph`; a run lists the others as not used.

<!-- Made from lockstep/config/compatibility.py by `python -m lockstep.config.docs`; change it there. -->
"""


def options_page() -> str:
    """docs/options.md."""
    return "\n".join([_OPTIONS_HEAD, *(_group_section(name, group) for name, group in GROUPS.items())])


def compatibility_page() -> str:
    """docs/compatibility.md."""
    sections = [_flag_section(title, flags) for title, flags in SECTIONS.items()]
    aliases = [f"`{flag_of(alias)}` is another spelling of `{flag_of(name)}`." for alias, name in ALIASES.items()]
    return "\n".join([_COMPATIBILITY_HEAD, *sections, *aliases, ""])


def _group_section(name: str, group: type[OptionGroup]) -> str:
    rows = [
        f"| `{flag_of(option)}` | {_type_name(field)} | {_default(field)} | {_cell(field.description)} |"
        for option, field in group.model_fields.items()
    ]
    head = "| option | type | default | meaning |\n|---|---|---|---|"
    return "\n".join([f"## [{name}]", "", group.__doc__ or "", "", head, *rows, ""])


def _flag_section(title: str, flags: list[SlimeFlag]) -> str:
    rows = [f"| `{entry.flag}` | {entry.status} | {_cell(_fate(entry))} |" for entry in flags]
    return "\n".join([f"## {title}", "", "| flag | | |\n|---|---|---|", *rows, ""])


def _fate(entry: SlimeFlag) -> str:
    """The third column: what the flag does, or why it stops and what to use."""
    note = entry.note[:1].upper() + entry.note[1:]
    if entry.refused:
        values = ", ".join(f"`{value}`" for value in entry.refused)
        return f"{note} Later: {values}. {entry.remedy}".strip()
    if entry.works is None:
        return note
    works = "" if entry.neutral in (None, False) else f" Works: `{_spelled(entry)}`."
    return f"{note}{works} {entry.remedy}"


def _spelled(entry: SlimeFlag) -> str:
    return ", ".join(str(value).lower() if isinstance(value, bool) else str(value) for value in entry.works or ())


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|").replace("\n", " ")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None or field.default in (None, ()):
        return ""
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def _type_name(field: FieldInfo) -> str:
    return _annotation_name(field.annotation)


def _annotation_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _annotation_name(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(_annotation_name(part) for part in arguments if part is not type(None))
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is tuple and Ellipsis not in arguments:
        return f"{len(arguments)} words"
    if origin in (tuple, list):
        return f"list of {_annotation_name(arguments[0])}"
    if origin is dict:
        return "table"
    return {bool: "switch", int: "int", float: "float", str: "text"}[annotation]


def main(folder: Path) -> None:
    (folder / "options.md").write_text(options_page())
    (folder / "compatibility.md").write_text(compatibility_page())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
