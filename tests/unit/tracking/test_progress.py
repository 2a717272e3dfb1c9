"""People see the phase they wait for and the numbers they watch; logs get plain lines."""

from __future__ import annotations

import asyncio
import io

import pytest
from rich.console import Console

from lockstep.tracking.progress import RunProgress, sparkline, watched_values
from lockstep.tracking.transfer import duration

METRICS = {
    "rollout/raw_reward": 0.43211,
    "rollout/response_len/mean": 38.25,
    "train/entropy_loss": 0.8,
    "train/train_rollout_logprob_abs_diff": 3.2e-7,
    "train/grad_norm": 0.41,
    "perf/tokens_per_gpu_per_sec": 12345.6,
}


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def plain(**kwargs):
    console = Console(file=io.StringIO(), force_terminal=False, width=80)
    return RunProgress("sums", console=console, **kwargs)


def terminal(**kwargs):
    console = Console(file=io.StringIO(), force_terminal=True, width=100, _environ={"TERM": "xterm-256color"})
    return RunProgress("sums", console=console, **kwargs)


def output(progress):
    return progress.console.file.getvalue()


def panel_text(progress):
    console = Console(file=io.StringIO(), width=100)
    console.print(progress._panel())
    return console.file.getvalue()


def test_a_log_file_gets_one_ascii_line_a_step():
    clock = Clock()
    with plain(num_steps=60, clock=clock) as progress:
        progress.step(-1, {"eval/sums": 0.31})
        with progress.phase("rollout", total=256) as rollout:
            rollout.advance(256)
        clock.now += 2
        progress.step(0, METRICS)
        progress.message("saved [step 1]")
    assert output(progress) == (
        "before training  held-out 0.310\n"
        "step 1/60  reward 0.432  response length 38.2  entropy 0.800  log-prob diff 3.2e-07  grad norm 0.410  "
        "tok/s 12,346  1m58s to go\n"
        "saved [step 1]\n"
    )
    assert output(progress).isascii()


def test_the_panel_shows_phase_count_and_how_the_numbers_moved():
    clock = Clock()
    progress = terminal(num_steps=60, clock=clock)
    assert "The first numbers come with the first finished step." in panel_text(progress)
    progress.step(0, METRICS)
    progress.step(1, {**METRICS, "rollout/raw_reward": 0.9})
    with progress.phase("rollout", total=256) as rollout:
        rollout.advance()
        rollout.advance(130)
        clock.now += 7
        text = panel_text(progress)
    assert "step 2/60" in text
    assert "rollout 131/256  7s" in text
    (reward,) = [line for line in text.splitlines() if "reward" in line]
    assert reward.split()[1:5] == ["reward", "0.900", "0.432", "▁█"]
    assert "rollout" not in panel_text(progress)


def test_a_resumed_run_shows_what_it_has_behind_it():
    progress = terminal(num_steps=60, start_step=2)
    progress.recall({"step": 0, "rollout/raw_reward": 0.1, "train/grad_norm": None})
    progress.recall({"step": 1, "rollout/raw_reward": 0.2})
    assert output(progress) == ""
    progress.step(2, {"rollout/raw_reward": 0.3})
    (reward,) = [line for line in panel_text(progress).splitlines() if "reward" in line]
    assert reward.split()[1:5] == ["reward", "0.300", "0.100", "▁▅█"]


def test_a_loss_of_nothing_has_no_sign():
    progress = plain(num_steps=1)
    progress.step(0, {"train/loss": -4e-9})
    assert output(progress) == "step 1/1  loss 0.0000\n"


def test_an_inner_phase_gives_way_to_the_outer_one():
    progress = terminal(num_steps=1)
    with progress.phase("eval"):
        with pytest.raises(KeyError), progress.phase("rewards"):
            raise KeyError
        assert "eval" in panel_text(progress)
        assert "rewards" not in panel_text(progress)


def test_the_time_left_counts_only_this_process():
    clock = Clock()
    progress = plain(num_steps=0, clock=clock)
    progress.num_steps, progress.start_step = 10, 5
    with progress:
        assert "step 5/10" in panel_text(progress)
        clock.now += 3
        progress.step(5, {})
    assert output(progress) == "step 6/10  12s to go\n"


def test_a_terminal_is_left_clean_after_an_error():
    progress = terminal(num_steps=3)

    def fail():
        with progress:
            progress.step(0, METRICS)
            progress.message("[red]not markup[/red]")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    text = output(progress)
    assert "[red]not markup[/red]" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor is hidden once and shown again"


def test_it_costs_an_asyncio_program_next_to_nothing():
    async def work(phase):
        for _ in range(200):
            phase.advance()
            await asyncio.sleep(0)

    async def main(progress):
        with progress, progress.phase("rollout", total=2000) as phase:
            await asyncio.gather(*(work(phase) for _ in range(10)))
            return phase.done

    progress = terminal(num_steps=3)
    assert asyncio.run(main(progress)) == 2000
    assert output(progress).count("sums") < 20, "drawing follows the clock, not the updates"


def test_held_out_sets_are_found_by_their_declaration():
    metrics = {"eval/step": 4, "eval/sums-truncated_ratio": 0.5, "eval/sums/response_len/mean": 9.0, "eval/sums": 0.25}
    assert watched_values(metrics) == {"held-out": 0.25}


def test_sparklines_span_from_lowest_to_highest():
    assert sparkline([0.0, 3.5, 7.0]) == "▁▅█"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([1.0, float("nan"), 2.0, float("inf")]) == "▁?█?"
    assert sparkline([]) == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (200, "3m20s"), (7500, "2h05m"), (273600, "3d04h")]
)
def test_durations_have_two_units_at_most(seconds, text):
    assert duration(seconds) == text
