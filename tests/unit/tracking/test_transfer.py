"""Loads and exports show how far they are once they take long, and disturb nobody while they do not."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lockstep.tracking.progress import RunProgress
from lockstep.tracking.transfer import TransferProgress, transfer_text

GB = 10**9


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def plain():
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=100, _environ={"TERM": "xterm-256color"})


def transfer(console, seconds, steps=20):
    """A transfer of 2 GB in equal steps; the progress before it ended."""
    clock = Clock()
    with TransferProgress("loading", console=console, clock=clock) as progress:
        for step in range(steps):
            clock.now += seconds / steps
            progress((step + 1) * 2 * GB // steps, 2 * GB)
    return console.file.getvalue()


@pytest.mark.parametrize("console", [plain, terminal])
def test_a_quick_transfer_shows_nothing(console):
    assert transfer(console(), seconds=1.9) == ""


def test_a_log_gets_a_line_every_ten_seconds_and_a_last_one():
    lines = transfer(plain(), seconds=40).splitlines()
    assert lines == [
        "loading 0.5 of 2.0 GB, 0.1 GB/s, 30s to go",
        "loading 1.0 of 2.0 GB, 0.1 GB/s, 20s to go",
        "loading 1.5 of 2.0 GB, 0.1 GB/s, 10s to go",
        "loading 2.0 GB in 40s, 0.1 GB/s",
    ]


def test_a_terminal_gets_a_bar_that_leaves_one_line():
    shown = transfer(terminal(), seconds=40)
    assert "━" in shown
    erase_line = "\x1b[2K"
    assert shown.endswith(f"{erase_line}loading 2.0 GB in 40s, 0.1 GB/s\n")


def test_a_failed_transfer_does_not_say_that_it_is_done():
    console, clock = plain(), Clock()

    def fail():
        with TransferProgress("loading", console=console, clock=clock) as progress:
            clock.now += 11
            progress(GB, 2 * GB)
            raise ValueError("cut")

    with pytest.raises(ValueError, match="cut"):
        fail()
    assert console.file.getvalue() == "loading 1.0 of 2.0 GB, 0.1 GB/s, 11s to go\n"


def test_nothing_done_yet_promises_no_time():
    assert transfer_text(0, GB, 0.0) == "0.0 of 1.0 GB, 0.0 GB/s"


def panel_text(progress):
    console = Console(file=io.StringIO(), width=100)
    console.print(progress._panel())
    return console.file.getvalue()


def test_an_export_in_a_live_panel_is_a_part_of_its_phase():
    clock = Clock()
    progress = RunProgress("sums", 60, console=terminal(), clock=clock)
    with progress, progress.phase("save"), progress.transfer("exporting") as on_bytes:
        clock.now += 20
        on_bytes(GB, 3 * GB)
        assert "exporting 1.0 of 3.0 GB, 0.1 GB/s, 40s to go" in panel_text(progress)
        on_bytes(3 * GB, 3 * GB)
        assert "exporting" not in panel_text(progress)


def test_an_export_of_a_run_in_a_log_gets_lines():
    clock, console = Clock(), plain()
    progress = RunProgress("sums", 60, console=console, clock=clock)
    with progress, progress.phase("save"), progress.transfer("exporting") as on_bytes:
        clock.now += 20
        on_bytes(GB, 3 * GB)
    assert console.file.getvalue().startswith("exporting 1.0 of 3.0 GB, 0.1 GB/s, 40s to go\n")
