from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lockstep.errors import OptionError, RewardError
from lockstep.rewards import Outcome, RewardPool
from lockstep.types import Sample

HOOKS = Path(__file__).with_name("reward_hooks.py")
REPOSITORY = Path(__file__).parents[3]


def options(hook=None, **values):
    defaults = {"rm_type": None, "rm_url": "url", "group_rm": False, "reward_key": None, "eval_reward_key": None}
    return SimpleNamespace(**defaults | {"custom_rm_path": f"{HOOKS}:{hook}" if hook else None} | values)


def score_all(
    responses, hook="by_response", *, num_workers=1, timeout_s=0.4, policy="drop", num_concurrent=64, **values
):
    """Outcomes of one pool for these responses, all asked at once."""

    async def run():
        async with RewardPool(
            options(hook, **values),
            num_workers=num_workers,
            timeout_s=timeout_s,
            failure_policy=policy,
            num_concurrent=num_concurrent,
        ) as pool:
            samples = [Sample(index=i, response=response, label="1") for i, response in enumerate(responses)]
            outcomes = await asyncio.gather(*(pool.score(sample) for sample in samples))
            assert [outcome.reward for outcome in outcomes] == [sample.reward for sample in samples]
            return outcomes, pool.take_counts()

    return asyncio.run(run())


def outcome_names(outcomes):
    return [str(outcome.outcome) for outcome in outcomes]


def is_alive(pid):
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, limit_s=10.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("hook", ["length", "plain_length"])
def test_async_and_plain_functions_score_every_sample_its_own(hook):
    outcomes, counts = score_all(["x" * n for n in range(20)], hook, num_workers=2, timeout_s=30)
    assert [outcome.reward for outcome in outcomes] == [float(n) for n in range(20)]
    assert counts == {"ok": 20, "timeout": 0, "exception": 0, "crash": 0, "invalid": 0, "no_thinking_end": 0}


def test_what_a_reward_changes_in_its_sample_is_merged():
    async def run():
        async with RewardPool(options("annotate")) as pool:
            sample = Sample(index=3, response="r", tokens=[5, 6], metadata={"kept": 1}, rollout_routed_experts="heavy")
            await pool.score(sample)
            return sample

    expected = Sample(index=3, response="r", tokens=[5, 6], rollout_routed_experts="heavy")
    expected.metadata = {"kept": 1, "seen": ["url", [5, 6]]}
    expected.remove_sample, expected.reward = True, 0.5
    assert asyncio.run(run()) == expected


def test_each_hang_times_out_alone_although_it_takes_its_worker_along():
    hangs = ["busy loop", "blocking sleep", "stuck regex", "child task blocks", "refuses cancellation"]
    responses = [response for hang in hangs for response in ("wait a little", hang, "wait a little")]
    outcomes, counts = score_all(responses, num_workers=2)
    assert outcome_names(outcomes) == ["ok", "timeout", "ok"] * 5
    assert [outcome.reward for outcome in outcomes] == [7.0, None, 7.0] * 5
    assert all("no answer within 0.4 s, so its worker was killed" in outcome.detail for outcome in outcomes[1::3])
    assert (counts["ok"], counts["timeout"]) == (10, 5)


def test_a_slow_async_reward_is_cancelled_and_its_worker_lives_on():
    async def run():
        async with RewardPool(options("by_response"), num_workers=1, timeout_s=0.3) as pool:
            responses = ["pid", "async sleep", "pid"]
            return [await pool.score(Sample(response=response)) for response in responses]

    before, slow, after = asyncio.run(run())
    assert slow.outcome is Outcome.TIMEOUT
    assert 0.3 <= slow.duration_s < 0.3 + 0.5
    assert before.reward == after.reward


def test_async_rewards_share_a_worker_up_to_the_limit():
    outcomes, _ = score_all(["count the others"] * 12, num_concurrent=4, timeout_s=10)
    assert max(outcome.reward for outcome in outcomes) == 4.0


def test_a_crash_is_counted_for_the_call_that_caused_it_only():
    outcomes, counts = score_all(["wait a little", "exit", "wait a little", "kill", "wait a little"], timeout_s=5)
    assert outcome_names(outcomes) == ["ok", "crash", "ok", "crash", "ok"]
    assert "its worker process died with exit code 3" in outcomes[1].detail
    assert "its worker process died with SIGKILL" in outcomes[3].detail
    assert (counts["ok"], counts["crash"]) == (3, 2)


def test_calls_on_a_worker_that_dies_for_no_reason_of_theirs_are_sent_again():
    async def run():
        async with RewardPool(options("by_response"), num_workers=1) as pool:
            worker_pid = int((await pool.score(Sample(response="pid"))).reward)
            calls = [asyncio.ensure_future(pool.score(Sample(response="wait a little"))) for _ in range(3)]
            await asyncio.sleep(0.1)
            os.kill(worker_pid, signal.SIGKILL)
            return await asyncio.gather(*calls)

    assert [outcome.reward for outcome in asyncio.run(run())] == [7.0] * 3


def test_a_call_whose_worker_dies_twice_is_a_crash():
    outcomes, counts = score_all(["exit in the background"], timeout_s=5)
    assert outcome_names(outcomes) == ["crash"]
    assert "exit code 4" in outcomes[0].detail
    assert counts["crash"] == 1


def test_the_first_failure_of_each_kind_is_told_at_once(caplog):
    score_all(["raise", "raise", "nan", "1"])
    first, second = sorted(record.getMessage() for record in caplog.records)
    assert re.match(r"The reward of sample \d failed \(exception\): ", first)
    assert re.match(r"The reward of sample 2 failed \(invalid\): ", second)


def test_failures_that_go_on_are_counted_aloud(caplog):
    score_all(["1", *["raise"] * 20])
    told = [record.getMessage() for record in caplog.records]
    assert told[1:] == [f"{count} rewards have failed so far (exception), and 1 worked" for count in (8, 16)]


def test_returning_nonsense_is_invalid_and_raising_is_an_exception():
    responses = ["nan", "infinite", "none", "text", "raise", "sys.exit", "unpicklable", "local class", "dict", "fine"]
    outcomes, _ = score_all(responses, timeout_s=10)
    assert outcome_names(outcomes) == ["invalid"] * 4 + ["exception"] * 4 + ["ok"] * 2
    assert outcomes[0].detail == "the reward is nan, not a finite number"
    assert outcomes[4].detail.startswith("ZeroDivisionError: division by zero (")
    assert "return 1 / 0" in outcomes[4].detail
    assert [outcome.reward for outcome in outcomes] == [None] * 8 + [{"score": 0.25, "why": "because"}, 1.0]


def test_the_reward_key_must_be_there_and_finite():
    outcomes, _ = score_all(["dict", "nan in dict", "fine"], timeout_s=10, reward_key="score")
    assert outcome_names(outcomes) == ["ok", "invalid", "invalid"]
    assert outcomes[0].reward == {"score": 0.25, "why": "because"}


def test_policy_zero_gives_a_zero_of_the_shape_that_training_reads():
    assert score_all(["raise"], policy="zero", timeout_s=10)[0][0].reward == 0.0
    outcomes, counts = score_all(["raise", "dict"], policy="zero", timeout_s=10, reward_key="score")
    assert [outcome.reward["score"] for outcome in outcomes] == [0.0, 0.25]
    assert (counts["exception"], counts["ok"]) == (1, 1)


def test_policy_stop_raises_with_the_sample_the_reward_and_the_line():
    with pytest.raises(RewardError) as raised:
        score_all(["raise"], policy="stop", timeout_s=10)
    error = raised.value
    assert error.field == f"the reward of sample 0 by --custom-rm-path {HOOKS}:by_response"
    assert error.value == "exception"
    assert re.fullmatch(rf"ZeroDivisionError: division by zero \({HOOKS}:\d+, in \w+\)\.", error.reason)
    assert "--reward-failure-policy drop" in error.remedy


def test_policy_stop_ends_a_group_without_waiting_for_its_slow_members():
    async def run():
        async with RewardPool(options("by_response"), num_workers=1, timeout_s=60, failure_policy="stop") as pool:
            await pool.score_group([Sample(response=response) for response in ["async sleep", "raise", "async sleep"]])

    start = time.monotonic()
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        asyncio.run(run())
    assert time.monotonic() - start < 10


def score_group(hook, responses, **values):
    async def run():
        async with RewardPool(options(hook, **values), num_workers=2) as pool:
            samples = [Sample(index=i, response=response) for i, response in enumerate(responses)]
            return await pool.score_group(samples), samples

    return asyncio.run(run())


def test_a_group_is_scored_in_one_call():
    outcomes, samples = score_group("group_ranks", ["a", "bbb", "cc"], group_rm=True)
    assert [outcome.reward for outcome in outcomes] == [1.0, 3.0, 2.0]
    assert [(sample.reward, sample.metadata) for sample in samples] == [
        (1.0, {"rank": 0}),
        (3.0, {"rank": 1}),
        (2.0, {"rank": 2}),
    ]


def test_without_group_rm_the_members_are_scored_one_by_one():
    outcomes, _ = score_group("length", ["a", "bbb"])
    assert [outcome.reward for outcome in outcomes] == [1.0, 3.0]


def test_one_bad_reward_in_a_group_fails_that_sample_only():
    outcomes, _ = score_group("group_one_nan", ["a", "nan", "b"], group_rm=True)
    assert [(str(outcome.outcome), outcome.reward) for outcome in outcomes] == [
        ("ok", 1.0),
        ("invalid", None),
        ("ok", 1.0),
    ]


def test_a_group_reward_of_the_wrong_length_is_invalid_for_all():
    outcomes, _ = score_group("group_too_short", ["a", "b"], group_rm=True)
    assert outcome_names(outcomes) == ["invalid"] * 2
    assert "a list of 2 rewards is needed" in outcomes[0].detail


def test_a_custom_reward_that_cannot_be_imported_is_an_option_error_under_every_policy():
    with pytest.raises(OptionError, match="--custom-rm-path"):
        score_all(["x"], hook="no_such_function", policy="drop")


def test_what_cannot_cross_to_a_worker_fails_its_sample():
    async def run():
        async with RewardPool(options("length")) as pool:
            return await pool.score(Sample(metadata={"lock": threading.Lock()}))

    outcome = asyncio.run(run())
    assert outcome.outcome is Outcome.EXCEPTION
    assert "keep plain values in its metadata" in outcome.detail


def test_importing_the_reward_does_not_count_against_its_deadline(tmp_path):
    hook = tmp_path / "slow_to_import.py"
    hook.write_text("import time\ntime.sleep(0.4)\ndef rm(args, sample):\n    return 0.5\n")
    outcomes, _ = score_all(["x"], hook=None, timeout_s=0.2, custom_rm_path=f"{hook}:rm")
    assert outcomes[0].reward == 0.5


def test_cancelling_a_score_frees_its_worker():
    async def run():
        async with RewardPool(options("by_response"), num_workers=1, timeout_s=60, num_concurrent=1) as pool:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(pool.score(Sample(response="async sleep")), 0.5)
            outcome = await asyncio.wait_for(pool.score(Sample(response="fine")), 10)
            return outcome, pool.take_counts()

    outcome, counts = asyncio.run(run())
    assert outcome.reward == 1.0
    assert (counts["ok"], counts["timeout"]) == (1, 0)


def test_built_in_rewards_and_counts_follow_the_sample_and_the_phase():
    async def run():
        async with RewardPool(options(rm_type="deepscaler"), num_workers=2) as pool:
            exact = Sample(response="5", label="5", metadata={"rm_type": "exact"})
            unfinished = Sample(response=r"\boxed{5}", label="5")
            finished = Sample(response=r"</think>\boxed{5}", label="5")
            custom = Sample(response="four", custom_rm_path=f"{HOOKS}:length")
            outcomes = await asyncio.gather(*map(pool.score, [exact, unfinished, finished, custom]))
            await pool.score(Sample(response="", label="5"), evaluation=True)
            counts = [pool.take_counts(), pool.take_counts(evaluation=True), pool.take_counts()]
            return [outcome.reward for outcome in outcomes], [(c["ok"], c["no_thinking_end"]) for c in counts]

    rewards, counts = asyncio.run(run())
    assert rewards == [1.0, 0.0, 1.0, 4.0]
    assert counts == [(4, 1), (1, 1), (0, 0)]


def test_evaluation_reads_its_own_reward_key():
    async def run():
        async with RewardPool(options("by_response", reward_key="why_not", eval_reward_key="score")) as pool:
            train = await pool.score(Sample(response="dict"))
            return train, await pool.score(Sample(response="dict"), evaluation=True)

    train, evaluation = asyncio.run(run())
    assert train.outcome is Outcome.INVALID
    assert evaluation.reward == {"score": 0.25, "why": "because"}


CONTROLLER = """
import asyncio, pickle, sys
from lockstep.rewards import RewardPool
from lockstep.types import Sample

async def main():
    async with RewardPool(pickle.loads(bytes.fromhex(sys.argv[1])), num_workers=2, timeout_s=60) as pool:
        print(int((await pool.score(Sample(response="pid"))).reward), flush=True)
        for line in sys.stdin:
            print((await pool.score(Sample(response=line.strip()))).outcome, flush=True)

asyncio.run(main())  # unguarded: a worker that imported this script would start it again
"""


@contextlib.contextmanager
def controller(tmp_path):
    """A program with a pool, started outside the repository; it scores each line it gets."""
    script = tmp_path / "controller.py"
    script.write_text(CONTROLLER)
    process = subprocess.Popen(
        [sys.executable, str(script), pickle.dumps(options("by_response")).hex()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
        process_group=0,
    )
    with process:
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


@pytest.mark.parametrize("state", ["fine", "stuck regex"])
def test_a_killed_controller_leaves_no_worker_behind(tmp_path, state):
    with controller(tmp_path) as (process, worker_pid):
        assert is_alive(worker_pid)
        process.stdin.write(f"{state}\n")
        time.sleep(0.2)
        process.kill()
        process.wait()
        wait_until(lambda: not is_alive(worker_pid))


def test_ctrl_c_is_left_to_the_controller(tmp_path):
    with controller(tmp_path) as (process, worker_pid):
        os.kill(worker_pid, signal.SIGINT)
        process.stdin.write("fine\n")
        assert process.stdout.readline() == "ok\n"
        assert is_alive(worker_pid)
        assert os.getpgid(worker_pid) != os.getpgid(process.pid)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate()
        assert output == ""
        assert "KeyboardInterrupt" in errors  # the controller's own
        assert "worker.py" not in errors
        wait_until(lambda: not is_alive(worker_pid))


def test_what_rewards_print_stays_off_standard_output(tmp_path):
    with controller(tmp_path) as (process, _):
        output, errors = process.communicate("loud\n")
        assert process.returncode == 0
    assert output == "ok\n"
    assert errors == "loud on stdout\nloud child\n"


def test_no_process_to_be_had_is_an_error_and_not_a_hang(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(RewardError, match="the system starts no process"):
        score_all(["x"], hook="length")
