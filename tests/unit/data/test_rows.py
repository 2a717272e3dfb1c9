from __future__ import annotations

import json
import pickle
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lockstep.data.rows import JsonlRows, MalformedRowError, ParquetRows, open_rows
from lockstep.errors import DataError


def numbered(path: Path, count: int) -> Path:
    path.write_text("".join(f'{{"n": {i}}}\n' for i in range(count)))
    return path


def test_rows_are_read_in_any_order(tmp_path):
    rows = open_rows(numbered(tmp_path / "data.jsonl", 50))
    assert [rows[i]["n"] for i in (49, 0, 17, 17)] == [49, 0, 17, 17]
    assert len(rows) == 50


def test_blank_lines_and_a_missing_last_line_break_change_nothing(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\n{"n": 0}\r\n   \n\n{"n": "\xc3\xa9"}')
    rows = open_rows(path)
    assert [rows[i] for i in range(len(rows))] == [{"n": 0}, {"n": "é"}]
    assert rows.location(1) == f"{path}:5"


@pytest.mark.parametrize(
    "bounds",
    ["[:]", "[3:7]", "[:4]", "[-3:]", "[:-8]", "[-5:-2]", "[8:100]", "[-100:2]"],
    ids=lambda bounds: bounds[1:-1],
)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_slices_are_python_slices(tmp_path, bounds, ending):
    path = tmp_path / f"data.{ending}"
    if ending == "jsonl":
        numbered(path, 10)
    else:
        pq.write_table(pa.table({"n": list(range(10))}), path, row_group_size=4)
    rows = open_rows(f"{path}@{bounds}")
    start, stop = (int(bound) if bound else None for bound in bounds[1:-1].split(":"))
    assert [rows[i]["n"] for i in range(len(rows))] == list(range(10))[start:stop]


def test_a_row_of_a_slice_is_named_by_its_line_in_the_file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"n": 0}\n{"n": 1}\n{oops\n')
    with pytest.raises(MalformedRowError) as caught:
        open_rows(f"{path}@[1:]")[1]
    assert open_rows(f"{path}@[1:]").location(1) == f"{path}:3"
    assert caught.value.field == f"{path}:3"
    assert "'{oops'" in str(caught.value)
    assert "not valid JSON (Expecting property name" in caught.value.reason
    assert "--skip-malformed-rows" in caught.value.remedy


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"n": 1', "not valid JSON"),
        (b'"text"', "must be a JSON object, this is a str"),
        (b"[1, 2]", "must be a JSON object, this is a list"),
        (b'{"n": "\xff"}', "not valid JSON ('utf-8' codec can't decode"),
        (b"[" * 100_000, "not valid JSON (maximum recursion depth"),
    ],
    ids=["cut", "text", "list", "not-utf8", "too-deep"],
)
def test_a_malformed_line_says_why(tmp_path, line, reason):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"n": 0}\n' + line + b"\n")
    with pytest.raises(MalformedRowError) as caught:
        open_rows(path)[1]
    assert reason in caught.value.reason
    assert len(str(caught.value)) < 500
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_data_set_that_cannot_be_opened_says_why(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "data.csv").write_text("a,b\n")
    (tmp_path / "noending").write_text("{}\n")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "fake.parquet").write_text("not parquet at all")
    (tmp_path / "short.parquet").write_text("")
    numbered(tmp_path / "ok.jsonl", 3)
    reasons = {
        "missing.jsonl": "there is no such file",
        "empty.jsonl": "at least one row",
        "data.csv": "files ending in '.csv' are not read",
        "noending": "its name has no ending",
        "folder.jsonl": "it cannot be read (Is a directory)",
        "fake.parquet": "it is not a parquet file",
        "short.parquet": "it is not a parquet file",
        "ok.jsonl@[2:1]": "the slice keeps none of them",
        "ok.jsonl@[5:]": "the slice keeps none of them",
        "ok.jsonl@[1]": "not a slice",
        "ok.jsonl@[::2]": "not a slice",
        "ok.jsonl@[a:b]": "not a slice",
        "ok.jsonl@[-:]": "not a slice",
        "ok.jsonl@[1:2": "not a slice",
    }
    for name, reason in reasons.items():
        with pytest.raises(DataError) as caught:
            open_rows(f"{tmp_path}/{name}")
        assert reason in str(caught.value), name
        assert caught.value.remedy, name


def test_an_at_sign_in_a_path_is_no_slice(tmp_path):
    folder = tmp_path / "user@[home]"
    folder.mkdir()
    assert len(open_rows(numbered(folder / "data.jsonl", 2))) == 2


def test_a_jsonl_file_is_not_held_in_memory(tmp_path):
    """Eight bytes a row, whatever the rows weigh: 30,000 rows of 1 kB need well under 1 MB."""
    path = tmp_path / "data.jsonl"
    row = json.dumps({"text": "x" * 1000}) + "\n"
    with path.open("w") as file:
        for _ in range(30):
            file.write(row * 1000)
    tracemalloc.start()
    rows = JsonlRows(path)
    for i in range(0, 30_000, 1000):
        assert len(rows[i]["text"]) == 1000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 30e6
    assert peak < 1e6
    assert len(rows.starts) * rows.starts.itemsize == 240_000


def test_parquet_rows_are_plain_values_without_the_nulls_of_merged_structs(tmp_path):
    path = tmp_path / "data.parquet"
    messages = [[{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b", "step_loss_mask": 0}]]
    pq.write_table(pa.table({"prompt": messages, "label": ["1", None]}), path)
    rows = open_rows(path)
    assert [rows[0], rows[1]] == [{"prompt": messages[0], "label": "1"}, {"prompt": messages[1], "label": None}]
    assert rows.location(1) == f"{path}[1]"


def test_parquet_keeps_only_the_latest_row_groups(tmp_path):
    path = tmp_path / "data.parquet"
    pq.write_table(
        pa.table({"text": [f"{i:01000d}" for i in range(100)]}), path, row_group_size=10, use_dictionary=False
    )
    rows = ParquetRows(path, cache_bytes=25_000)
    assert [int(rows[i]["text"]) for i in (99, 5, 90, 10)] == [99, 5, 90, 10]
    assert list(rows.cache) == [9, 1]


def test_a_row_group_larger_than_the_cache_is_still_read_once(tmp_path):
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"n": list(range(10))}), path)
    rows = ParquetRows(path, cache_bytes=1)
    assert rows[3] == {"n": 3}
    path.unlink()
    assert rows[4] == {"n": 4}


def test_a_parquet_file_with_damaged_pages_says_so(tmp_path):
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"text": ["some text"] * 3}), path)
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"row group 0.*cannot be decoded"):
        open_rows(path)[0]
