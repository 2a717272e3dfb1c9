"""One page, complete in itself, that says what happened and never runs what a model wrote."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from lockstep.errors import DataError
from lockstep.report import write_report, write_samples
from lockstep.tracking import JsonlTracker

EVIL = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> \u2028 & \"'"


def write_run(run_dir, rows=None, samples=()):
    tracker = JsonlTracker(run_dir)
    for row in rows or [{"step": 0, "train/loss": 0.5}]:
        tracker.log(row["step"], {name: value for name, value in row.items() if name != "step"})
    if samples:
        write_samples(run_dir, 0, samples)
    return run_dir


def sample(**fields):
    return {"step": 0, "group_index": 0, "index": 0, "prompt": "1+1=", "response": "2", "eval": None, **fields}


class Page(HTMLParser):
    """The elements, the visible text and the embedded data of a page."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.words, self._inside = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.words += data.split()

    @property
    def text(self):
        return " ".join(self.words)

    @property
    def data(self):
        return json.loads(self.scripts[0])


def page_of(run_dir):
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


def test_the_page_tells_where_the_run_began_and_ended(tmp_path):
    run = write_run(
        tmp_path / "sums",
        [
            {"step": -1, "eval/held_out": 0.3125},
            {"step": 0, "rollout/raw_reward": 0.25, "perf/step_time": 50.0, "rollout/response_tokens": 6000},
            {"step": 1, "rollout/raw_reward": 0.75, "perf/step_time": 150.0, "rollout/response_tokens": 6400},
            {"step": 2, "eval/held_out": 0.859, "rollout/raw_reward": 0.5, "my_hook/x": 1.0},
        ],
    )
    (run / "config.toml").write_text(
        '[model]\nhf_checkpoint = "/models/tiny-moe"\n[algorithm]\nadvantage_estimator = "grpo"\n'
    )
    text = page_of(run).text
    assert "sums tiny-moe · grpo" in text
    assert "held-out held_out 0.312 → 0.859" in text
    assert "training reward 0.25 → 0.5 best 0.75" in text
    assert "steps 3" in text
    assert "time 3m20s 100.0 s a step" in text
    assert "tokens sampled 12,400" in text
    assert "my_hook/x logged by a hook of this run" in text
    assert 'hf_checkpoint = "/models/tiny-moe"' in text


def test_nothing_is_fetched_from_anywhere(tmp_path):
    page = page_of(write_run(tmp_path, samples=[sample()]))
    assert [(tag, attrs) for tag, attrs in page.elements if "src" in attrs or tag in {"link", "iframe", "img"}] == []
    (policy,) = [
        attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    assert "default-src 'none'" in policy
    assert "http" not in policy


@pytest.mark.parametrize("field", ["prompt", "response", "label", "status", "eval"])
def test_what_a_model_writes_is_data_and_never_markup(tmp_path, field):
    harmless = page_of(write_run(tmp_path / "harmless", samples=[sample()]))
    evil = page_of(write_run(tmp_path / "evil", samples=[sample(response_tokens=[EVIL], **{field: EVIL})]))
    assert len(evil.scripts) == len(harmless.scripts) == 3
    assert [tag for tag, _ in evil.elements] == [tag for tag, _ in harmless.elements]
    assert evil.data["samples"][0][field] == EVIL
    assert evil.data["samples"][0]["tokens"] == [EVIL]
    assert "<" not in evil.scripts[0]


def test_options_and_hook_metrics_are_escaped(tmp_path):
    run = write_run(tmp_path / "run", [{"step": 0, "<u>x</u>": 1.0}])
    (run / "config.toml").write_text(f"name = {json.dumps(EVIL)}\n")
    page = page_of(run)
    assert "u" not in [tag for tag, _ in page.elements]
    assert "<u>x</u>" in page.text


def test_each_token_carries_its_difference_to_the_trainer(tmp_path):
    samples = [
        sample(
            response_tokens=["a", "b"], rollout_log_probs=[-1.0, -2.0], policy_log_probs=[-1.5, -2.0], loss_mask=[1, 0]
        ),
        sample(rollout_log_probs=[-1.0], policy_log_probs=[float("nan")], reward=float("nan")),
    ]
    first, second = page_of(write_run(tmp_path, samples=samples)).data["samples"]
    assert (first["log_probs"], first["differences"], first["loss_mask"]) == ([-1.0, -2.0], [0.5, 0.0], [1, 0])
    assert (second["differences"], second["reward"]) == ([None], None)


def test_what_is_missing_is_said_with_what_to_do(tmp_path):
    text = page_of(write_run(tmp_path)).text
    assert "Held-out evaluation is not in this run. Set --eval-prompt-data and --eval-interval." in text
    assert "This run kept no samples." in text
    assert page_of(tmp_path).data["samples"] == []


def test_samples_left_out_are_counted(tmp_path):
    samples = [sample(group_index=position // 8, index=position) for position in range(2400)]
    page = page_of(write_run(tmp_path, samples=samples))
    assert len(page.data["samples"]) == 2000
    assert "2,000 of 2,400 samples, spread evenly over 1 kept steps." in page.text


def test_the_page_goes_where_it_is_told(tmp_path):
    run = write_run(tmp_path / "run")
    assert write_report(run) == run / "report.html"
    assert write_report(run, tmp_path / "pages" / "a.html") == tmp_path / "pages" / "a.html"
    assert re.match("<!doctype html>", (tmp_path / "pages" / "a.html").read_text(encoding="utf-8"))
    assert [path.name for path in (tmp_path / "pages").iterdir()] == ["a.html"]


def test_a_missing_run_and_a_run_without_a_step_are_named(tmp_path):
    with pytest.raises(DataError, match=r"RUN is .*There is no such folder"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "half')
    with pytest.raises(DataError, match=r"RUN is .*It is a file\. Give the folder"):
        write_report(tmp_path / "metrics.jsonl")
    with pytest.raises(DataError, match=r"RUN is .*no finished step in metrics.jsonl\. Train first"):
        write_report(tmp_path)


def test_a_broken_config_is_named(tmp_path):
    (write_run(tmp_path) / "config.toml").write_text("lr = ")
    with pytest.raises(DataError, match=r"config.toml is .*not valid TOML"):
        write_report(tmp_path)
