"""The samples a run keeps for people to read: one file a rollout, written by the run, read by the report.

A record is one sample:

    {"step": int, "group_index": int, "index": int, "prompt": str, "response": str, "label": str | null,
     "reward": float | null, "advantage": float | null, "status": str, "response_tokens": [str],
     "rollout_log_probs": [float], "policy_log_probs": [float], "loss_mask": [int], "eval": str | null}

The four lists have one entry per response token, or are empty where a run did not record them. `eval` names the
held-out set, null for training.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lockstep.errors import DataError

Record = dict[str, Any]

T = TypeVar("T")

MAX_STEPS = 64
MAX_SAMPLES = 2_000
MAX_CHARACTERS = 12_000_000
"""Bounds of what one page embeds. Characters count text, and TOKEN_COST for the numbers of each token."""
TOKEN_COST = 16
MAX_PROMPT_CHARACTERS = 20_000
REQUIRED = ("step", "prompt", "response")


def samples_path(run_dir: Path, rollout_id: int) -> Path:
    return run_dir / "samples" / f"{rollout_id:07d}.jsonl"


def write_samples(run_dir: Path, rollout_id: int, records: Iterable[Record]) -> Path:
    """Write one rollout's records in one go: a kill leaves the file whole or absent, a resumed rollout replaces it.

    Log-probs keep 9 significant digits, which are all that fp32 has.
    """
    path = samples_path(run_dir, rollout_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".jsonl.new")
    with unfinished.open("w", encoding="ascii") as file:
        for record in records:
            file.write(json.dumps(_with_short_numbers(record)) + "\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    return path


def _with_short_numbers(record: Record) -> Record:
    names = ("rollout_log_probs", "policy_log_probs")
    return record | {name: [float(f"{x:.9g}") for x in record[name]] for name in names if record.get(name)}


@dataclass(frozen=True)
class Selection:
    """What the page shows of all samples that the run kept."""

    records: list[Record]
    num_samples: int
    num_steps: int

    @property
    def is_complete(self) -> bool:
        return len(self.records) == self.num_samples and not any("cut_tokens" in record for record in self.records)


def select_samples(
    run_dir: Path, *, max_steps: int = MAX_STEPS, max_samples: int = MAX_SAMPLES, max_characters: int = MAX_CHARACTERS
) -> Selection:
    """Samples spread evenly over the run, by whole groups where they fit, within the bounds.

    A sample that alone exceeds its step's share keeps its first tokens and says in `cut_tokens` how many are missing.
    """
    paths = sorted((run_dir / "samples").glob("*.jsonl"))
    chosen = spread(paths, max_steps)
    records: list[Record] = []
    for path in chosen:
        records += _fit(_read(path), max_samples // len(chosen), max_characters // len(chosen))
    return Selection(records, num_samples=sum(map(_count_lines, paths)), num_steps=len(paths))


def spread(items: Sequence[T], count: int) -> list[T]:
    """`count` of the items, evenly spaced, the first and the last among them; all if there are no more."""
    if len(items) <= count:
        return list(items)
    if count == 1:
        return [items[0]]
    return [items[round(position * (len(items) - 1) / (count - 1))] for position in range(count)]


def _read(path: Path) -> list[Record]:
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line:
            records.append(_parse(f"{path}:{number}", line))
    return records


def _parse(place: str, line: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or any(name not in record for name in REQUIRED):
        raise DataError(
            place, line[:80], f"A sample is a JSON object with {', '.join(REQUIRED)}.", "Remove or repair the line."
        )
    return record


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _fit(records: list[Record], max_samples: int, max_characters: int) -> list[Record]:
    """As many whole groups as fit, evenly spaced; if not even one fits, the part of the first that does."""
    groups: dict[tuple[Any, Any], list[Record]] = {}
    for record in records:
        groups.setdefault((record.get("eval"), record.get("group_index")), []).append(record)
    whole = list(groups.values())
    for num_groups in range(len(whole), 0, -1):
        kept = [record for group in spread(whole, num_groups) for record in group]
        if len(kept) <= max_samples and sum(map(_cost, kept)) <= max_characters:
            return kept
    first = whole[0][: max(1, max_samples)] if whole else []
    return [_cut(record, max_characters // len(first)) for record in first]


def _cost(record: Record) -> int:
    return len(record["prompt"]) + len(record["response"]) + TOKEN_COST * len(record.get("response_tokens") or [])


def _cut(record: Record, max_characters: int) -> Record:
    if _cost(record) <= max_characters:
        return record
    tokens: list[str] = record.get("response_tokens") or list(record["response"])
    prompt = record["prompt"][: min(MAX_PROMPT_CHARACTERS, max_characters // 2)]
    room = max_characters - len(prompt)
    num_kept = 0
    for token in tokens:
        room -= len(token) * 2 + TOKEN_COST
        if room < 0:
            break
        num_kept += 1
    lists = ("response_tokens", "rollout_log_probs", "policy_log_probs", "loss_mask")
    shortened = {name: record[name][:num_kept] for name in lists if record.get(name)}
    return (
        record
        | shortened
        | {
            "prompt": prompt,
            "response": "".join(tokens[:num_kept]),
            "cut_tokens": len(tokens) - num_kept,
        }
    )
