"""Ranks answer in order, and whatever happens to one of them is named and ends them all."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from group_targets import Target

from lockstep.cluster import group as group_module
from lockstep.cluster.group import WorkerGroup
from lockstep.errors import OptionError, RankError

NEWS: list[tuple[int, str, Any]] = []


def started(greeting: str = "hello", **options: Any) -> WorkerGroup:
    NEWS.clear()
    options = {"timeout_s": 60.0, "on_news": lambda *news: NEWS.append(news)} | options
    return WorkerGroup(2, Target, (greeting,), **options)


@pytest.fixture(scope="module")
def group() -> Iterator[WorkerGroup]:
    """For tests after which it still works."""
    group = started()
    group.wait_for_start()
    yield group
    group.close()


def processes(group: WorkerGroup) -> list[int]:
    return [worker.started.process.pid for worker in group._workers]


def test_answers_come_in_rank_order_and_news_during_the_call(group: WorkerGroup) -> None:
    assert group.call("greet", "you") == ["hello you from 0 of 2", "hello you from 1 of 2"]
    assert sorted(NEWS) == [(0, "greeted", "you"), (1, "greeted", "you")]
    assert group.call_each("greet", [("a",), ("b",)]) == ["hello a from 0 of 2", "hello b from 1 of 2"]


def test_large_arguments_arrive_whole(group: WorkerGroup) -> None:
    """More than a socket's buffer holds."""
    assert group.call("length", bytes(2**24)) == [2**24] * 2


def test_an_error_of_ours_arrives_as_it_was_raised_and_the_group_works_on(group: WorkerGroup) -> None:
    with pytest.raises(OptionError) as raised:
        group.call("refuse")
    assert raised.value.field == "--rank"
    assert raised.value.remedy == "Ask another."
    assert len(group.call("greet", "again")) == 2


def test_one_rank_is_asked_and_poked_while_the_event_loop_runs(group: WorkerGroup) -> None:
    async def ask() -> dict[int, str]:
        waiting = asyncio.create_task(group.ask("wait", {1: ()}))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        assert await group.ask("greet", {0: ("you",)}) == {0: "hello you from 0 of 2"}
        group.poke([1])
        return await waiting

    assert asyncio.run(ask()) == {1: "poked"}
    group._detach()


def test_a_start_that_is_refused_is_the_error_itself() -> None:
    group = started("refused")
    with pytest.raises(OptionError, match="nobody says that"):
        group.wait_for_start()
    group.close()


def test_a_killed_rank_is_named_with_its_last_words_and_nobody_is_left(capfd: pytest.CaptureFixture[str]) -> None:
    """The other rank's complaint comes first or later; it is not the cause."""
    group = started()
    group.wait_for_start()
    pids, begun = processes(group), time.monotonic()
    with pytest.raises(RankError) as raised:
        group.call("die_at_second")
    assert time.monotonic() - begun < 10
    assert (raised.value.field, raised.value.value) == ("rank 1", "killed by SIGKILL")
    assert "`die_at_second`; its last words: last words" in raised.value.reason
    with pytest.raises(RankError, match="rank 1"):
        group.call("greet", "anyone")
    group.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert "[rank 1] last words" in capfd.readouterr().err


def test_a_rank_that_fails_alone_is_named_with_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    """All others have answered, so the group works on."""
    group = started()
    group.wait_for_start()
    with pytest.raises(RankError) as raised:
        group.call("fail_at_first")
    assert (raised.value.field, raised.value.value) == ("rank 0", "ZeroDivisionError: by the first")
    assert "`fail_at_first`" in raised.value.reason
    assert "fail_at_first\n    raise ZeroDivisionError" in capfd.readouterr().err
    assert len(group.call("greet", "again")) == 2
    group.close()


def test_a_silent_rank_is_named_although_the_other_is_busy() -> None:
    group = started()
    group.wait_for_start()
    group.timeout_s = 1.5
    pids = processes(group)
    with pytest.raises(RankError) as raised:
        group.call("be_silent")
    assert raised.value.field == "rank 1"
    assert "told to `be_silent`" in raised.value.reason
    assert "--distributed-timeout-minutes" in raised.value.remedy
    group.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_ranks_that_wait_for_one_that_failed_do_not_keep_the_error_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "_FOLLOW_S", 0.5)
    group = started()
    group.wait_for_start()
    with pytest.raises(RankError) as raised:
        group.call("refuse_at_first")
    assert raised.value.field == "rank 0"
    assert "--rank is 0: it refuses." in raised.value.value
    assert "`refuse_at_first`, and the others wait" in raised.value.reason
    group.close()


def test_ranks_end_with_their_controller(tmp_path: Path) -> None:
    """Even with one that is killed and cannot say goodbye."""
    script = (
        "import os, sys; from group_targets import Target; from lockstep.cluster.group import WorkerGroup\n"
        "group = WorkerGroup(2, Target, ('hello',), timeout_s=60.0); group.wait_for_start()\n"
        f"open({str(tmp_path / 'pids')!r}, 'w').write(' '.join(str(w.started.process.pid) for w in group._workers))\n"
        "os.kill(os.getpid(), 9)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == -9
    deadline = time.monotonic() + 10
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
