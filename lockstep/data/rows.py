"""Rows of a .jsonl or .parquet file, read one at a time; `path@[a:b]` is a slice of one.

Opening a .jsonl file keeps eight bytes per row (where it starts), opening a .parquet file keeps its footer, so the size
of the file never matters to memory.
"""

from __future__ import annotations

import json
import re
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from lockstep.errors import DataError

Row = dict[str, Any]

PARQUET_CACHE_BYTES = 512 * 2**20
SLICE = re.compile(r"(?P<path>.*)@\[(?P<start>-?\d+)?:(?P<stop>-?\d+)?\]")
SLICE_LIKE = re.compile(r".*@\[[^\[\]/]*\]?")
EXCERPT_CHARS = 80
FIX_OR_SKIP = "Fix the row, or pass --skip-malformed-rows to leave such rows out and count them."


class MalformedRowError(DataError):
    """One row that cannot be used; `--skip-malformed-rows` leaves it out and counts it."""

    def __init__(self, field: str, value: Any, reason: str, remedy: str = FIX_OR_SKIP) -> None:
        super().__init__(field, value, reason, remedy)


class RowReader(Protocol):
    """Rows by index, read when asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row:
        """
        Raises:
            MalformedRowError: this row is not an object with string keys.
        """

    def location(self, index: int) -> str:
        """Where a person finds the row: `train.jsonl:17`, or `train.parquet[16]`. May read the file up to there."""


def open_rows(prompt_data: str | Path) -> RowReader:
    """The rows of `prompt_data`: a .jsonl or .parquet file, or a Python slice of one such as `train.jsonl@[-200:]`.

    Raises:
        DataError: there is no such file, its format is unknown, or no row is left.
    """
    path, bounds = _split_slice(str(prompt_data))
    rows = _open_file(path)
    if not len(rows):
        raise DataError(str(path), "empty", "a data set needs at least one row.", "Check how the file was written.")
    if bounds is None:
        return rows
    kept = range(len(rows))[bounds]
    if not kept:
        raise DataError(
            str(prompt_data), f"{len(rows)} rows", "the slice keeps none of them.", "Change the bounds behind the @."
        )
    return SlicedRows(rows, kept)


class JsonlRows:
    """One JSON object per line; blank lines do not count as rows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.starts = array("Q")
        start = 0
        with path.open("rb") as file:
            for line in file:
                if not line.isspace():
                    self.starts.append(start)
                start += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Row:
        with self.path.open("rb") as file:
            file.seek(self.starts[index])
            line = file.readline()
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._malformed(index, line, f"it is not valid JSON ({error}).") from error
        if not isinstance(row, dict):
            raise self._malformed(index, line, f"a row must be a JSON object, this is a {type(row).__name__}.")
        return row

    def location(self, index: int) -> str:
        return f"{self.path}:{1 + _count_newlines(self.path, self.starts[index])}"

    def _malformed(self, index: int, line: bytes, reason: str) -> MalformedRowError:
        return MalformedRowError(self.location(index), excerpt(line.decode(errors="replace").strip()), reason)


class ParquetRows:
    """Rows of a parquet file. Row groups are decoded whole; the latest stay in memory up to `cache_bytes`.

    Parquet cannot tell an absent key of a nested object from a null, so nulls inside nested objects are dropped.
    """

    def __init__(self, path: Path, cache_bytes: int = PARQUET_CACHE_BYTES) -> None:
        self.path = path
        self.cache_bytes = cache_bytes
        try:
            metadata = pq.read_metadata(path)
        except (pa.ArrowException, ValueError) as error:
            raise DataError(
                str(path),
                "unreadable",
                f"it is not a parquet file ({_first_line(error)}).",
                "Check how it was written.",
            ) from error
        sizes = (metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        self.starts: list[int] = [0, *accumulate(sizes)]
        self.cache: OrderedDict[int, pa.Table] = OrderedDict()

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Row:
        group = bisect_right(self.starts, index) - 1
        table = self._row_group(group)
        row: Row = table.slice(index - self.starts[group], 1).to_pylist()[0]
        return {key: _without_nulls(value) for key, value in row.items()}

    def location(self, index: int) -> str:
        return f"{self.path}[{index}]"

    def _row_group(self, group: int) -> pa.Table:
        if group in self.cache:
            self.cache.move_to_end(group)
            return self.cache[group]
        try:
            with pq.ParquetFile(self.path) as file:
                table = file.read_row_group(group, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                str(self.path),
                f"row group {group}",
                f"it cannot be decoded ({_first_line(error)}).",
                "Write the file again; it is damaged or has changed since the run began.",
            ) from error
        self.cache[group] = table
        while len(self.cache) > 1 and sum(table.nbytes for table in self.cache.values()) > self.cache_bytes:
            self.cache.popitem(last=False)
        return table


class SlicedRows:
    """The rows of another reader whose indices are in `kept`."""

    def __init__(self, rows: RowReader, kept: range) -> None:
        self.rows, self.kept = rows, kept

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Row:
        return self.rows[self.kept[index]]

    def location(self, index: int) -> str:
        return self.rows.location(self.kept[index])


READERS: dict[str, Callable[[Path], RowReader]] = {".jsonl": JsonlRows, ".parquet": ParquetRows}


def excerpt(value: Any) -> str:
    """The beginning of a value, short enough for an error message."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= EXCERPT_CHARS else text[:EXCERPT_CHARS] + "..."


def _split_slice(prompt_data: str) -> tuple[Path, slice | None]:
    if match := SLICE.fullmatch(prompt_data):
        start, stop = (int(bound) if bound else None for bound in match.group("start", "stop"))
        return Path(match["path"]), slice(start, stop)
    if SLICE_LIKE.fullmatch(prompt_data):
        raise DataError(
            "data set",
            prompt_data,
            "what follows the @ is not a slice.",
            "Write path@[start:stop]; either number may be negative or left out.",
        )
    return Path(prompt_data), None


def _open_file(path: Path) -> RowReader:
    if path.suffix.lower() not in READERS:
        raise DataError(
            "data set",
            str(path),
            f"files ending in {path.suffix!r} are not read." if path.suffix else "its name has no ending.",
            f"Use {' or '.join(READERS)} (one JSON object per line, or a table).",
        )
    if not path.exists():
        raise DataError("data set", str(path), "there is no such file.", "Check the path.")
    try:
        return READERS[path.suffix.lower()](path)
    except OSError as error:
        raise DataError(
            "data set", str(path), f"it cannot be read ({error.strerror or error}).", "It must be a readable file."
        ) from error


def _count_newlines(path: Path, stop: int) -> int:
    """Newlines in the first `stop` bytes, read in blocks."""
    count = 0
    with path.open("rb") as file:
        while stop > 0 and (block := file.read(min(stop, 2**20))):
            count += block.count(b"\n")
            stop -= len(block)
    return count


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0]
