from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from lockstep.errors import OptionError
from lockstep.trainer.optimizer.host_memory import host_memory_left, require_host_memory

GB = 10**9


def group(folder: Path, files: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")


def left(tmp_path: Path, own: str) -> int:
    (tmp_path / "own").write_text(own)
    return host_memory_left(tmp_path / "cgroup", tmp_path / "own")


def test_the_tightest_of_the_nested_groups_counts_and_file_cache_does_not(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    stat = "anon 100000000\ninactive_file 200000000"
    group(root / "job", {"memory.max": GB, "memory.current": 700_000_000, "memory.stat": stat})
    group(root / "job" / "task", {"memory.max": "max", "memory.current": 600_000_000, "memory.stat": stat})
    assert left(tmp_path, "0::/job/task\n") == GB - (700_000_000 - 200_000_000)


def test_the_first_version_of_control_groups_is_understood(tmp_path: Path) -> None:
    files = {
        "memory.limit_in_bytes": GB,
        "memory.usage_in_bytes": 400_000_000,
        "memory.stat": "cache 5\ntotal_inactive_file 100000000",
    }
    group(tmp_path / "cgroup" / "memory" / "box", files)
    assert left(tmp_path, "3:cpu,cpuacct:/box\n2:memory:/box\n") == GB - 300_000_000


def test_without_a_limit_it_is_what_the_machine_has_free(tmp_path: Path) -> None:
    """Other processes come and go between the two readings: half a gigabyte either way."""
    free = psutil.virtual_memory().available
    assert left(tmp_path, "0::/\n") == pytest.approx(free, abs=GB / 2)


def test_more_than_is_left_is_refused_with_what_helps() -> None:
    with pytest.raises(OptionError) as caught:
        require_host_memory(2**60)
    assert caught.value.field == "--optimizer-cpu-offload"
    assert caught.value.value == "1073741824.0 GiB of pinned host memory"
    assert "--optimizer-offload-fraction" in caught.value.remedy
    require_host_memory(0)
