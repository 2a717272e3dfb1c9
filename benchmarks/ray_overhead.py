"""What Ray adds to a training step on a CPU: `python benchmarks/ray_overhead.py RESULT.json`.

A small model is trained by the same options in these ways, one after another, `ROUNDS` times:

    here           one rank in the controller's own process, without Ray
    ray            one rank that Ray has placed, in a process of its own
    2 processes    two ranks as local processes
    ray, 2         two ranks that Ray has placed

A step's time is the tenth of its distribution: what other work on the machine adds is no part of it.
`ray` minus `here` is what a user pays who could do without it: messages to the rank and back, and the trainer of many
ranks in place of one's. `ray, 2` minus `2 processes` is Ray's own share. Calls to a rank that
does nothing are measured alone, too.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "e2e"))

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "unit" / "cluster"))

from e2e_runs import Workshop, make_workshop
from group_targets import Target

from lockstep.cluster.executor import Executor, LocalProcesses
from lockstep.cluster.group import WorkerGroup
from lockstep.cluster.ray_cluster import RayCluster

STEPS, WARM_UP, ROUNDS, CALLS = 40, 10, 2, 500
WAYS: dict[str, dict[str, object]] = {
    "here": {},
    "ray": {"ray_address": "local"},
    "2 processes": {"actor_num_gpus_per_node": 2},
    "ray, 2": {"ray_address": "local", "actor_num_gpus_per_node": 2},
}


def step_times(workshop: Workshop, root: Path, options: dict[str, object]) -> list[float]:
    words = workshop.train(root, device="cpu", num_rollout=STEPS, **options)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([sys.executable, "-m", "lockstep", *words], check=True, **quiet)
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    return [row["perf/step_time"] for row in rows[WARM_UP:]]


def round_trips(executor: Executor, num_bytes: int) -> list[float]:
    """Milliseconds of calls to one rank, with so many bytes there and a number back."""
    group = WorkerGroup(1, Target, ("hello",), timeout_s=60.0, executor=executor)
    try:
        group.wait_for_start()
        times = []
        for _ in range(CALLS):
            started = time.perf_counter()
            group.call("length", bytes(num_bytes))
            times.append(1000 * (time.perf_counter() - started))
        return times
    finally:
        group.close()


def calls() -> dict[str, dict[str, float]]:
    """The least and the median of calls, by executor and size."""
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    cluster = RayCluster("local", [1], device="cpu", timeout_s=60.0)
    executors: dict[str, Executor] = {"local process": LocalProcesses(), "ray": cluster.processes([0], "rank")}
    found = {}
    try:
        for name, executor in executors.items():
            for size in (0, 10**6):
                times = round_trips(executor, size)
                found[f"{name}, {size} bytes"] = {"least": min(times), "median": statistics.median(times)}
    finally:
        cluster.close()
    return found


def main(output: Path) -> None:
    of_calls = calls()
    print(of_calls, flush=True)
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        workshop = make_workshop(root)
        for number in range(ROUNDS):
            for name, options in WAYS.items():
                times[name] += step_times(workshop, root / f"{name} {number}", options)
                print(name, f"{1000 * statistics.median(times[name]):.1f} ms", flush=True)
    tenths = {name: 1000 * statistics.quantiles(found, n=10)[0] for name, found in times.items()}
    medians = {name: 1000 * statistics.median(found) for name, found in times.items()}
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "load_at_end": os.getloadavg()[0],
        "python": platform.python_version(),
        "steps": STEPS,
        "warm_up": WARM_UP,
        "rounds": ROUNDS,
        "calls_ms": of_calls,
        "median_ms": medians,
        "tenth_ms": tenths,
        "ray_against_in_process_ms": tenths["ray"] - tenths["here"],
        "ray_against_local_processes_ms": tenths["ray, 2"] - tenths["2 processes"],
    }
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
