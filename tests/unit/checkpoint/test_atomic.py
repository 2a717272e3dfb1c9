from __future__ import annotations

from pathlib import Path

import pytest

from lockstep.checkpoint.atomic import atomic_directory
from lockstep.errors import CheckpointError


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_and_fail(target: Path, error: BaseException) -> None:
    with atomic_directory(target, replace=True) as temporary:
        (temporary / "a").write_text("new")
        raise error


def test_a_directory_appears_under_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "sub" / "saved"
    with atomic_directory(target) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "a").write_text("1")
        assert not target.exists()
    assert contents(tmp_path) == {"sub/saved/inner/a": "1"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_and_passes_on(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        write_and_fail(tmp_path / "saved", error())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_named_error_and_the_earlier_directory_stays(tmp_path: Path) -> None:
    target = tmp_path / "saved"
    with atomic_directory(target) as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(CheckpointError, match="No space left on device") as raised:
        write_and_fail(target, OSError(28, "No space left on device"))
    assert raised.value.field == str(target)
    assert contents(tmp_path) == {"saved/a": "old"}


def test_replacing_takes_all_of_the_old_directory_away(tmp_path: Path) -> None:
    target = tmp_path / "saved"
    for name in ("old", "new"):
        with atomic_directory(target, replace=True) as temporary:
            (temporary / name).write_text(name)
    assert contents(tmp_path) == {"saved/new": "new"}


def test_what_a_killed_write_left_is_not_mixed_into_the_next(tmp_path: Path) -> None:
    left = tmp_path / "saved.incomplete"
    left.mkdir()
    (left / "rest").write_text("half")
    with atomic_directory(tmp_path / "saved") as temporary:
        (temporary / "a").write_text("1")
    assert contents(tmp_path) == {"saved/a": "1"}
