from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
import pytest
import torch

from lockstep import cli, doctor
from lockstep.doctor import CHECKS, Finding, Gpu, Machine
from lockstep.kernels.delta_rule_choice import Kernels, choose_kernels

H200 = Gpu("NVIDIA H200", 139 * 2**30, (9, 0), delta_rule_error=0.004)
GOOD = Machine(
    python="3.12.3",
    packages={
        "torch": "2.13.0", "transformers": "5.17.0", "triton": "3.7.1", "fla-core": "0.6.0", "ray": "2.50.0",
        "uvicorn": None, "wandb": "0.31.0", "tensorboard": "2.21.0",
    },
    required=(("torch", "<2.14,>=2.11"), ("transformers", "<6,>=5.12")),
    torch_cuda="13.0",
    torch_problem=None,
    gpus=(H200,),
    driver="580.159.04",
    cpu_cores=16,
    omp_threads=8,
    memory_left=120 * 2**30,
    disk_left=500 * 2**30,
    folder="/runs",
)  # fmt: skip
"""A machine without a fault."""

TORCH = version("torch")
"""Of the installed package: some builds leave out the `+cu130` that `torch.__version__` has."""


def findings(machine: Machine) -> dict[str, Finding]:
    return {finding.subject: finding for finding in (check(machine) for check in CHECKS)}


def without(machine: Machine, *packages: str) -> Machine:
    return replace(machine, packages={**machine.packages, **dict.fromkeys(packages)})


def test_a_good_machine_has_nothing_to_complain_about() -> None:
    assert {finding.level for finding in findings(GOOD).values()} == {"fine"}
    assert findings(GOOD)["GPUs"].found == "NVIDIA H200, 139 GiB, 9.0; driver 580.159.04"
    assert findings(GOOD)["Qwen3-Next kernels"].found == "ours with Triton 3.7.1, off by 0.4% in bf16"
    assert findings(GOOD)["extras"].says == "without uvicorn there is no `lockstep serve`"


@pytest.mark.parametrize(
    ("machine", "subject", "level", "words"),
    [
        (replace(GOOD, python="3.10.14"), "Python", "stops", "3.11 or newer"),
        (without(GOOD, "torch"), "required packages", "stops", "torch is missing"),
        (
            replace(GOOD, packages={**GOOD.packages, "torch": "2.14.0+cu130"}),
            "required packages", "stops", "torch 2.14.0+cu130 is outside <2.14,>=2.11",
        ),
        (
            replace(GOOD, broken=(("numpy", "ImportError: libopenblas"),)),
            "required packages", "stops", "numpy cannot be imported: ImportError: libopenblas",
        ),
        (replace(GOOD, torch_problem="OSError: libcudart.so"), "PyTorch", "stops", "OSError: libcudart.so"),
        (replace(GOOD, gpus=(), torch_cuda=None), "PyTorch", "costs", "is built for the CPU: runs use the CPU"),
        (replace(GOOD, gpus=()), "PyTorch", "costs", "does not work with driver 580.159.04"),
        (replace(GOOD, gpus=()), "GPUs", "costs", "Runs use the CPU"),
        (replace(GOOD, gpus=(replace(H200, capability=(7, 5)),)), "GPUs", "costs", "no fast bf16"),
        (replace(GOOD, gpus=()), "GPU extras", "costs", "transformers picks fla's kernels"),
        (replace(GOOD, omp_threads=17), "CPU", "costs", "Set OMP_NUM_THREADS to 16"),
        (replace(GOOD, memory_left=60 * 2**30), "host memory", "costs", "Less than half"),
        (replace(GOOD, disk_left=19 * 2**30), "disk", "costs", "19.0 GiB left at /runs"),
    ],
)  # fmt: skip
def test_every_fault_is_told_with_its_price(machine: Machine, subject: str, level: str, words: str) -> None:
    finding = findings(machine)[subject]
    assert finding.level == level
    assert words in f"{finding.found} {finding.says}"


def machine_with(fla: str | None, triton: str | None, *errors: float | None, capability: tuple[int, int]) -> Machine:
    gpus = tuple(replace(H200, capability=capability, delta_rule_error=error) for error in errors)
    return replace(GOOD, gpus=gpus, packages={**GOOD.packages, "fla-core": fla, "triton": triton})


HOPPER, BLACKWELL = (9, 0), (10, 0)


@pytest.mark.parametrize(
    ("machine", "level", "words"),
    [
        (machine_with(None, "3.6.0", 0.004, capability=HOPPER), "fine", "ours with Triton 3.6.0"),
        (machine_with("0.6.0", "3.7.1", 0.5, capability=HOPPER), "fine", "fla-core 0.6.0"),
        (machine_with("0.6.0", "3.7.1", 0.004, 0.5, capability=HOPPER), "fine", "fla-core 0.6.0"),
        (machine_with("0.6.0", "3.6.0", 0.5, capability=HOPPER), "costs", "ours are not right with Triton 3.6.0"),
        (machine_with("0.6.0", "3.6.0", 0.5, capability=HOPPER), "costs", "miscompiles its backward on Hopper"),
        (machine_with("0.5.0", "3.6.0", 0.5, capability=BLACKWELL), "costs", "fla-core 0.5.0 is older than 0.6"),
        (machine_with(None, None, None, capability=HOPPER), "costs", "Triton is missing"),
        (machine_with(None, None, None, capability=HOPPER), "costs", "7.0 times as long"),
    ],
)
def test_the_kernels_of_qwen3_next_are_named_and_their_lack_is_priced(machine: Machine, level: str, words: str) -> None:
    finding = findings(machine)["Qwen3-Next kernels"]
    assert finding.level == level
    assert words in f"{finding.found} {finding.says}"


@pytest.mark.parametrize(
    ("error", "fault", "kernels"),
    [
        (0.004, None, "triton"),
        (0.004, "too old", "triton"),
        (0.03, None, "fla"),
        (float("inf"), "too old", "torch"),
        (None, None, "fla"),
        (None, "too old", "torch"),
    ],
)
def test_kernels_that_are_not_known_to_be_right_are_not_chosen(
    error: float | None, fault: str | None, kernels: Kernels
) -> None:
    assert choose_kernels(error, fault) == kernels


def test_this_machine_is_read_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    machine = doctor.look(tmp_path)
    assert machine.python == ".".join(str(part) for part in sys.version_info[:3])
    assert machine.packages["torch"] == TORCH
    assert ("torch", "<2.14,>=2.11") in machine.required
    assert (machine.torch_cuda, machine.torch_problem) == (torch.version.cuda, None)
    assert len(machine.gpus) == torch.cuda.device_count()
    assert machine.cpu_cores == len(os.sched_getaffinity(0))
    assert machine.omp_threads == 3
    assert machine.memory_left is not None
    assert 0 < machine.memory_left <= psutil.virtual_memory().total
    assert machine.folder == str(tmp_path)


@pytest.mark.parametrize(("text", "threads"), [("4,2", 4), (" 8", 8), ("", 0), ("many", 0)])
def test_the_number_of_threads_is_read_as_openmp_does(monkeypatch: pytest.MonkeyPatch, text: str, threads: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert doctor.look(Path.cwd()).omp_threads == threads


def run_with_broken(package: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`lockstep doctor` where importing this package fails."""
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text("raise ImportError('half installed')")
    python_path = os.pathsep.join([str(folder), str(Path(doctor.__file__).parents[1])])
    return subprocess.run(
        [sys.executable, "-m", "lockstep", "doctor", *words],
        env=os.environ | {"PYTHONPATH": python_path, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("package", ["torch", "transformers", "rich", "pydantic"])
def test_a_package_that_is_there_and_broken_stops_without_a_traceback(tmp_path: Path, package: str) -> None:
    done = run_with_broken(package, tmp_path)
    assert done.returncode == 1
    assert "ImportError: half installed" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_machine_without_any_other_package_is_told_what_to_install(tmp_path: Path) -> None:
    """`-S`: Python as it comes, with nothing but this package and the list of what it requires."""
    (tmp_path / "lockstep").symlink_to(Path(doctor.__file__).parent)
    required = [line for line in requires("lockstep-rl") or [] if "extra ==" not in line]
    metadata = tmp_path / "lockstep_rl-0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Name: lockstep-rl\n" + "".join(f"Requires-Dist: {line}\n" for line in required))
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    words = [sys.executable, "-S", "-B", "-m", "lockstep", "doctor"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    for name in ("pydantic", "torch", "numpy", "psutil"):
        assert f"{name} is missing" in done.stdout
    assert "`pip install lockstep-rl` brings the right ones" in done.stdout
    assert "host memory: not read" in done.stdout


def test_a_checkout_that_is_not_installed_is_looked_at_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", not_installed)
    finding = findings(doctor.look(tmp_path))["required packages"]
    assert finding.found.startswith(f"torch {TORCH}, transformers ")
    assert (finding.level, "not installed as a package" in finding.says) == ("fine", True)


def test_the_driver_is_read_where_the_kernel_module_says_it(tmp_path: Path) -> None:
    version = tmp_path / "version"
    version.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\nGCC 12.3.0\n"
    )
    assert doctor._driver(version) == "580.159.04"
    assert doctor._driver(tmp_path / "missing") is None


def test_the_command_succeeds_where_training_can_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["machine"]["packages"]["torch"] == TORCH
    assert [finding["subject"] for finding in printed["findings"]] == list(findings(GOOD))
    assert cli.main(["doctor"]) == 0
    assert f"torch {TORCH}" in " ".join(capsys.readouterr().out.split())


def test_the_command_fails_where_training_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "look", lambda folder: without(GOOD, "transformers"))
    assert cli.main(["doctor", "--json"]) == 1
