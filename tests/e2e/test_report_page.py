"""The report in a real browser: curves are drawn, samples are readable, and nothing of a model's output runs."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from lockstep.report import write_report, write_samples
from lockstep.tracking import JsonlTracker

EVIL = '</script><script>document.title = "owned"</script><img src=x onerror="document.title=1">'


def browse(page, profile):
    """The page's elements (above its scripts) after the scripts ran, and what it wrote to the console."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.fail("This test opens the report in a browser: install chromium (`apt-get install chromium`).")
    run = subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--enable-logging=stderr", "--virtual-time-budget=5000", "--window-size=1400,2400",
            f"--user-data-dir={profile}", "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return run.stdout.partition('<script type="application/json"')[0], re.findall(r"CONSOLE.*", run.stderr)


@pytest.fixture
def run_dir(tmp_path):
    tracker = JsonlTracker(tmp_path / "run")
    tracker.log(-1, {"eval/sums": 0.25})
    for step in range(30):
        tracker.log(
            step,
            {
                "rollout/raw_reward": 0.25 + step / 60,
                "train/train_rollout_logprob_abs_diff": 1e-7,
                "perf/step_time": 3.0,
                "perf/rollout_time": 2.0,
                "eval/sums": 0.25 + step / 60,
            },
        )
    return tmp_path / "run"


def test_the_page_draws_its_curves_and_shows_its_samples(run_dir, tmp_path):
    tokens = ["The", " answer", " is", " <b>", "41", EVIL]
    record = {
        "step": 29,
        "group_index": 3,
        "index": 24,
        "prompt": "What is 20 + 21?",
        "response": "".join(tokens),
        "label": "41",
        "reward": 1.0,
        "advantage": 0.5,
        "status": "completed",
        "response_tokens": tokens,
        "rollout_log_probs": [-0.5] * 6,
        "policy_log_probs": [-0.5, -0.5001, -0.6, -1.5, -0.5, -0.5],
        "loss_mask": [1, 1, 1, 1, 1, 0],
        "eval": None,
    }
    write_samples(run_dir, 29, [record, {**record, "index": 25, "reward": 0.0}])
    dom, console = browse(write_report(run_dir), tmp_path / "profile")

    assert console == []
    charts = re.split(r'id="chart-\d+"', dom)[1:]
    assert len(charts) == 4, "reward, held-out, parity and time per phase"
    assert all("<svg" in chart for chart in charts)
    assert all('class="js-line"' in chart or 'class="js-fill"' in chart for chart in charts), "each has a curve"
    detail = dom[dom.index('id="detail"') :]
    assert "What is 20 + 21?" in detail
    assert "<dt>label</dt><dd>41</dd>" in detail
    assert detail.count('<span class="token') == 7, "six tokens, and one in the legend"
    assert re.findall(r"--heat-share: (\d+)", detail) == ["36", "73", "85"], (
        "1e-4, 0.1 and 1 on the scale from 1e-7 to 1"
    )
    assert "&lt;/script&gt;&lt;script&gt;" in detail
    assert "<title>run · Lockstep report</title>" in dom


def test_a_run_with_little_to_show_still_makes_a_quiet_page(run_dir, tmp_path):
    dom, console = browse(write_report(run_dir), tmp_path / "profile")
    assert console == []
    assert "This run kept no samples." in dom


def test_the_console_is_really_watched(tmp_path):
    page = tmp_path / "broken.html"
    page.write_text("<script>missing()</script>")
    _, console = browse(page, tmp_path / "profile")
    assert "missing is not defined" in console[0]
