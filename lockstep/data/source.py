"""Where the loop gets its prompts: a data set read in epochs, behind a buffer of unfinished groups."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockstep.config import Config
from lockstep.config.hooks import load_optional_hook
from lockstep.data.prompts import PromptFormat, PromptReader
from lockstep.data.rows import MalformedRowError
from lockstep.data.sample_json import sample_from_json, sample_to_json
from lockstep.data.tokenizer import Tokenizer
from lockstep.errors import DataError, OptionError
from lockstep.types import Group, Sample

BufferFilter = Callable[[Any, int | None, list[Group], int], list[Group]]
"""`--buffer-filter-path`: (args, rollout_id, buffer, n) -> at most n groups, which it removes from the buffer."""

logger = logging.getLogger(__name__)


def epoch_order(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of the rows in one epoch: a permutation of range(num_rows) that depends on nothing but the arguments.

    Sorting the raw stream of a counter-based generator keeps the order the same in every NumPy release, which
    `Generator.permutation` does not promise.
    """
    keys = np.random.Philox(key=np.array([seed % 2**64, epoch], dtype=np.uint64)).random_raw(num_rows)
    return np.argsort(keys, kind="stable")


class PromptStream:
    """The prompts of a data set, epoch after epoch; malformed and over-long rows are counted and left out.

    Args:
        rollout_max_prompt_len: longest prompt in tokens; None lets every prompt pass.
        skip_malformed_rows: count a malformed row instead of stopping at it.
    """

    def __init__(
        self,
        reader: PromptReader,
        *,
        rollout_max_prompt_len: int | None = None,
        rollout_shuffle: bool = False,
        rollout_seed: int = 42,
        skip_malformed_rows: bool = False,
    ) -> None:
        self.reader = reader
        self.rollout_max_prompt_len = rollout_max_prompt_len
        self.rollout_shuffle = rollout_shuffle
        self.rollout_seed = rollout_seed
        self.skip_malformed_rows = skip_malformed_rows
        self.epoch = 0
        self.position = 0
        self.skipped: Counter[str] = Counter()
        self._order: tuple[int, NDArray[np.int64]] | None = None
        self._warned: set[str] = set()

    def __len__(self) -> int:
        return len(self.reader)

    def draw(self) -> Sample:
        """The next usable prompt, without ids.

        Raises:
            MalformedRowError: the row is malformed and `skip_malformed_rows` is off.
            DataError: no row of a whole epoch is usable.
        """
        before = self.skipped.copy()
        for _ in range(2 * len(self.reader)):  # so many rows in a row contain a whole epoch, wherever we start
            if (sample := self.usable(self._next_row())) is not None:
                return sample
        raise self.nothing_usable(self.skipped - before)

    def usable(self, row: int) -> Sample | None:
        """The prompt of a row, or None for one that is left out (and counted)."""
        try:
            sample = self.reader[row]
        except MalformedRowError as error:
            if not self.skip_malformed_rows:
                raise
            what = f"{error.field} is {error.value!r}: {error.reason}"
            self._warn_once("malformed_rows", "A malformed row is left out and counted: %s", what)
            self.skipped["malformed_rows"] += 1
            return None
        if self._is_over_long(sample):
            self.skipped["over_long_prompts"] += 1
            return None
        return sample

    def _next_row(self) -> int:
        if self.position == len(self.reader):
            self.epoch, self.position = self.epoch + 1, 0
        self.position += 1
        if not self.rollout_shuffle:
            return self.position - 1
        if self._order is None or self._order[0] != self.epoch:
            self._order = (self.epoch, epoch_order(len(self.reader), self.rollout_seed, self.epoch))
        return int(self._order[1][self.position - 1])

    def _is_over_long(self, sample: Sample) -> bool:
        if self.rollout_max_prompt_len is None:
            return False
        if not isinstance(sample.prompt, str):
            self._warn_once(
                "lists", "Prompts that stay message lists are not measured against --rollout-max-prompt-len."
            )
            return False
        tokens = self.reader.tokenizer.encode(sample.prompt, add_special_tokens=False)
        return len(tokens) > self.rollout_max_prompt_len

    def _warn_once(self, topic: str, message: str, *values: object) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            logger.warning(message, *values)

    def nothing_usable(self, skipped: Counter[str]) -> DataError:
        """The error for a whole epoch of rows that were left out, with their counts by reason."""
        malformed, over_long = skipped["malformed_rows"], skipped["over_long_prompts"]
        why = []
        if over_long:
            why.append(f"prompts are longer than {self.rollout_max_prompt_len} tokens")
        if malformed:
            why.append("rows are malformed")
        return DataError(
            self.reader.prompt_data,
            f"{len(self.reader)} rows",
            f"none of them is usable: {' and '.join(why)}.",
            "Run without --skip-malformed-rows to see the reason." if malformed else "Raise the limit.",
        )


class RolloutDataSourceWithBuffer:
    """Groups of samples to generate: first those in the buffer, then new ones from the data set.

    Args:
        buffer_filter: picks groups from the buffer in place of first in, first out.
        args: what `buffer_filter` gets as its first argument.
    """

    def __init__(
        self,
        prompts: PromptStream,
        *,
        n_samples_per_prompt: int = 1,
        buffer_filter: BufferFilter | None = None,
        args: Any = None,
    ) -> None:
        self.prompts = prompts
        self.n_samples_per_prompt = n_samples_per_prompt
        self.buffer_filter = buffer_filter
        self.args = args
        self.buffer: list[Group] = []
        self.sample_group_index = 0
        self.sample_index = 0

    @classmethod
    def from_config(cls, config: Config, tokenizer: Tokenizer) -> RolloutDataSourceWithBuffer:
        """The data source that the options describe. Unless malformed rows are skipped, the first row is tried.

        Raises:
            OptionError: `--prompt-data` is not set, or `--buffer-filter-path` cannot be imported.
            DataError: the data or the chat template cannot be used.
        """
        data, rollout = config.data, config.rollout
        if data.prompt_data is None:
            raise OptionError("--prompt-data", None, "there is nothing to train on.", "Give a .jsonl or .parquet file.")
        prompts = PromptStream(
            PromptReader(data.prompt_data, tokenizer, PromptFormat.from_config(config)),
            rollout_max_prompt_len=rollout.longest_prompt,
            rollout_shuffle=data.rollout_shuffle,
            rollout_seed=data.rollout_seed,
            skip_malformed_rows=data.skip_malformed_rows,
        )
        if not data.skip_malformed_rows:
            prompts.reader[0]
        buffer_filter = load_optional_hook(rollout.buffer_filter_path, "--buffer-filter-path")
        return cls(
            prompts,
            n_samples_per_prompt=rollout.n_samples_per_prompt,
            buffer_filter=buffer_filter,
            args=config.args(),
        )

    def __len__(self) -> int:
        """Rows of one epoch, usable or not."""
        return len(self.prompts)

    @property
    def counters(self) -> dict[str, int]:
        """Rows left out since the run began, once per epoch each: `malformed_rows`, `over_long_prompts`."""
        return {name: self.prompts.skipped[name] for name in ("malformed_rows", "over_long_prompts")}

    def num_rollout(self, num_epoch: int, rollout_batch_size: int) -> int:
        """How many rollouts `num_epoch` epochs fill. The rest of the rows, less than a batch, is not drawn.

        Raises:
            OptionError: not even one.
        """
        if (rollouts := num_epoch * len(self) // rollout_batch_size) > 0:
            return rollouts
        raise OptionError(
            "--num-epoch",
            num_epoch,
            f"{num_epoch * len(self)} rows do not fill one rollout of {rollout_batch_size} prompts.",
            "Raise --num-epoch or lower --rollout-batch-size.",
        )

    def get_samples(self, num_samples: int, rollout_id: int | None = None) -> list[Group]:
        """The next `num_samples` groups; those from the buffer come first and leave it."""
        groups = self._from_buffer(num_samples, rollout_id)
        return groups + [self._new_group() for _ in range(num_samples - len(groups))]

    def add_samples(self, groups: list[Group]) -> None:
        """Give back groups, started or not, for a later `get_samples`."""
        for group in groups:
            if not group or not all(isinstance(sample, Sample) for sample in group):
                raise DataError(
                    "add_samples",
                    repr(group)[:80],
                    "a group is a list of at least one Sample.",
                    "Pass a list of groups.",
                )
        self.buffer.extend(groups)

    def state_dict(self) -> dict[str, Any]:
        """Everything that `get_samples` depends on, as JSON values; `load_state_dict` takes it back exactly.

        Raises:
            DataError: a buffered sample holds a value that JSON cannot.
        """
        return {
            "data": self._identity(),
            "epoch": self.prompts.epoch,
            "position": self.prompts.position,
            "skipped": dict(self.prompts.skipped),
            "sample_group_index": self.sample_group_index,
            "sample_index": self.sample_index,
            "buffer": [[sample_to_json(sample) for sample in group] for group in self.buffer],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            DataError: the state belongs to other data or another order, so its position means nothing here.
        """
        for name, value in self._identity().items():
            if state["data"][name] != value:
                raise DataError(
                    name,
                    value,
                    f"the checkpoint was written with {state['data'][name]!r}, so its place in the data means nothing.",
                    "Resume with the data and options of the run, or start a new run from its weights.",
                )
        self.prompts.epoch, self.prompts.position = state["epoch"], state["position"]
        self.prompts.skipped = Counter(state["skipped"])
        self.sample_group_index, self.sample_index = state["sample_group_index"], state["sample_index"]
        self.buffer = [[sample_from_json(values) for values in group] for group in state["buffer"]]

    def _identity(self) -> dict[str, Any]:
        prompts = self.prompts
        return {
            "number of rows": len(prompts),
            "--rollout-shuffle": prompts.rollout_shuffle,
            "--rollout-seed": prompts.rollout_seed if prompts.rollout_shuffle else None,
        }

    def _from_buffer(self, num_samples: int, rollout_id: int | None) -> list[Group]:
        if not self.buffer or num_samples == 0:
            return []
        if self.buffer_filter is None:
            picked, self.buffer = self.buffer[:num_samples], self.buffer[num_samples:]
            return picked
        picked = self.buffer_filter(self.args, rollout_id, self.buffer, num_samples)
        if not isinstance(picked, list) or len(picked) > num_samples:
            raise DataError(
                "--buffer-filter-path",
                f"{len(picked)} groups" if isinstance(picked, list) else type(picked).__name__,
                f"it must return a list of at most {num_samples} groups.",
                "Return what is wanted and leave the rest in the buffer.",
            )
        return picked

    def _new_group(self) -> Group:
        prompt = self.prompts.draw()
        group = []
        for _ in range(self.n_samples_per_prompt):
            sample = copy.deepcopy(prompt)
            sample.group_index, sample.index, sample.rollout_id = (
                self.sample_group_index,
                self.sample_index,
                self.sample_index,
            )
            self.sample_index += 1
            group.append(sample)
        self.sample_group_index += 1
        return group
