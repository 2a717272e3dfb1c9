"""`lockstep doctor`: what this machine has, what is wrong with it, and what each missing piece costs.

`look` reads the machine into data; every check is a function of that data. So a fault that this machine does not have
can be tested.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires
from math import inf
from pathlib import Path
from typing import Literal

from lockstep.kernels.delta_rule_choice import choose_kernels, fla_fault, installed, release

DELTA_RULE_SLOWDOWN = 7.0
"""Plain version over our Triton kernels, forward and backward. Measured: benchmarks/results/delta-rule-h200.md."""

LITTLE_DISK = 20 * 2**30


@dataclass(frozen=True)
class Gpu:
    """Memory in bytes. `delta_rule_error`: of our Triton kernels against the plain version; None where not measured."""

    name: str
    memory: int
    capability: tuple[int, int]
    delta_rule_error: float | None = None


@dataclass(frozen=True)
class Machine:
    """What was found. A package is None when it is missing; `required` holds (package, condition) pairs, `broken`
    (package, error) pairs of required packages that are there and cannot be imported."""

    python: str
    packages: dict[str, str | None]
    required: tuple[tuple[str, str], ...]
    torch_cuda: str | None
    torch_problem: str | None
    gpus: tuple[Gpu, ...]
    driver: str | None
    cpu_cores: int
    omp_threads: int
    memory_left: int | None
    disk_left: int
    folder: str
    broken: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Finding:
    """One line of the table. `stops`: training cannot run. `costs`: it can, and `says` tells at which price."""

    subject: str
    found: str
    level: Literal["fine", "costs", "stops"] = "fine"
    says: str = ""


IMPORTED_AS = {"pyyaml": "yaml"}
EXTRAS = {
    "ray": "runs stay on one machine",
    "uvicorn": "there is no `lockstep serve`",
    "wandb": "no logging to Weights & Biases",
    "tensorboard": "no TensorBoard files",
}
"""Packages and what is missing without them. SGLang is none: it has an environment of its own (--sglang-python)."""
OPTIONAL = ("triton", "fla-core", *EXTRAS)


def look(folder: Path) -> Machine:
    """Read this machine; on a GPU that compiles our kernels, which takes up to a minute the first time."""
    required = _required()
    torch_cuda, torch_problem, gpus = _look_at_torch()
    return Machine(
        python=platform.python_version(),
        packages={name: installed(name) for name in (*dict(required), "torch", "transformers", *OPTIONAL)},
        required=required,
        torch_cuda=torch_cuda,
        torch_problem=torch_problem,
        gpus=gpus,
        driver=_driver(Path("/proc/driver/nvidia/version")),
        cpu_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        omp_threads=_omp_threads(os.environ.get("OMP_NUM_THREADS", "")),
        memory_left=_memory_left(),
        disk_left=shutil.disk_usage(folder).free,
        folder=str(folder.resolve()),
        broken=tuple(_broken(name for name, _ in required if name != "torch" and installed(name))),
    )


def _required() -> tuple[tuple[str, str], ...]:
    """Our own dependencies, as (package, condition), from the installed distribution."""
    try:
        lines = requires("lockstep-rl") or []
    except PackageNotFoundError:
        return ()
    found = [re.match(r"([\w.-]+)\s*(.*)", line) for line in lines if "extra ==" not in line]
    return tuple((match[1], match[2]) for match in found if match)


def _broken(packages: Iterable[str]) -> Iterator[tuple[str, str]]:
    for name in packages:
        try:
            import_module(IMPORTED_AS.get(name, name.replace("-", "_")))
        except Exception as error:  # a broken installation fails in many ways
            yield name, f"{type(error).__name__}: {error}"


def _omp_threads(text: str) -> int:
    """The first number of a list such as "4,2" (one per nesting level); 0 where none is set."""
    found = re.match(r"\s*(\d+)", text)
    return int(found[1]) if found else 0


def _look_at_torch() -> tuple[str | None, str | None, tuple[Gpu, ...]]:
    """The CUDA version that torch was built for, why torch cannot be used, and the GPUs that it sees."""
    try:
        import torch

        from lockstep.kernels.gated_delta_rule import error_of_triton

        gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    except Exception as error:  # a broken installation fails in many ways
        return None, f"{type(error).__name__}: {error}", ()
    found = []
    for index, gpu in enumerate(gpus):
        off_by = error_of_triton(index, num_keys=16, key_dim=128, num_values=32, value_dim=128)
        found.append(Gpu(gpu.name, gpu.total_memory, (gpu.major, gpu.minor), off_by))
    return torch.version.cuda, None, tuple(found)


def _driver(path: Path) -> str | None:
    found = re.search(r"\s(\d+\.[\d.]+)\s", path.read_text()) if path.exists() else None
    return found[1] if found else None


def _memory_left() -> int | None:
    try:
        from lockstep.trainer.optimizer.host_memory import host_memory_left
    except Exception:  # a required package is missing or broken, which another line tells
        return None
    return host_memory_left()


def check_python(machine: Machine) -> Finding:
    if release(machine.python) < (3, 11):
        return Finding("Python", machine.python, "stops", "Lockstep needs Python 3.11 or newer.")
    return Finding("Python", machine.python)


def check_required(machine: Machine) -> Finding:
    wrong = [
        f"{name} {version or 'is missing'}{f' is outside {condition}' if version else ''}"
        for name, condition in machine.required
        if not fits(version := machine.packages.get(name), condition)
    ]
    wrong += [f"{name} cannot be imported: {error}" for name, error in machine.broken]
    if wrong:
        return Finding(
            "required packages", "; ".join(wrong), "stops", "`pip install lockstep-rl` brings the right ones."
        )
    found = ", ".join(f"{name} {machine.packages.get(name)}" for name in ("torch", "transformers"))
    if not machine.required:
        return Finding("required packages", found, says="Lockstep is not installed as a package: versions not checked.")
    return Finding("required packages", found)


def fits(version: str | None, condition: str) -> bool:
    """Whether a version satisfies a condition such as `>=2.11,<2.14`."""
    if version is None:
        return False
    holds: dict[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
        ">=": lambda a, b: a >= b,
        "<": lambda a, b: a < b,
        "==": lambda a, b: a == b,
    }
    parts = re.findall(r"(>=|<|==)\s*([\d.]+)", condition)
    return all(holds[operator](release(version), release(bound)) for operator, bound in parts)


def check_torch(machine: Machine) -> Finding:
    found = f"{machine.packages.get('torch')}, {f'CUDA {machine.torch_cuda}' if machine.torch_cuda else 'CPU only'}"
    if machine.torch_problem:
        return Finding("PyTorch", machine.torch_problem, "stops", "PyTorch cannot be used; install it again.")
    if machine.driver and not machine.gpus:
        reason = "is built for the CPU" if machine.torch_cuda is None else f"does not work with driver {machine.driver}"
        return Finding(
            "PyTorch", found, "costs", f"There is an NVIDIA driver, but this PyTorch {reason}: runs use the CPU."
        )
    return Finding("PyTorch", found)


def check_gpus(machine: Machine) -> Finding:
    if not machine.gpus:
        return Finding("GPUs", "none", "costs", "Runs use the CPU: enough for the quickstart, not for real models.")
    found = "; ".join(
        f"{g.name}, {g.memory / 2**30:.0f} GiB, {g.capability[0]}.{g.capability[1]}" for g in machine.gpus
    )
    driver = f"; driver {machine.driver}" if machine.driver else ""
    if any(gpu.capability < (8, 0) for gpu in machine.gpus):
        return Finding("GPUs", found + driver, "costs", "Below capability 8.0 there is no fast bf16: use fp32, slowly.")
    return Finding("GPUs", found + driver)


def check_cpu(machine: Machine) -> Finding:
    found = f"{machine.cpu_cores} cores, OMP_NUM_THREADS {machine.omp_threads or 'not set'}"
    if machine.omp_threads > machine.cpu_cores:
        says = f"Threads wait for each other. Set OMP_NUM_THREADS to {machine.cpu_cores} or less."
        return Finding("CPU", found, "costs", says)
    return Finding("CPU", found)


def check_memory(machine: Machine) -> Finding:
    if machine.memory_left is None:
        return Finding("host memory", "not read", says="That takes the required packages.")
    found = f"{machine.memory_left / 2**30:.1f} GiB left to this process"
    on_gpus = sum(gpu.memory for gpu in machine.gpus)
    if machine.memory_left < on_gpus / 2:
        says = "Less than half of the GPUs' memory: optimizer state of large models will not fit off the GPU."
        return Finding("host memory", found, "costs", says)
    return Finding("host memory", found)


def check_disk(machine: Machine) -> Finding:
    found = f"{machine.disk_left / 2**30:.1f} GiB left at {machine.folder}"
    if machine.disk_left < LITTLE_DISK:
        return Finding("disk", found, "costs", "Checkpoints need room: --save another folder, or free some.")
    return Finding("disk", found)


def check_delta_rule(machine: Machine) -> Finding:
    """Which kernels compute Qwen3-Next's gated delta rule."""
    fla, triton = machine.packages.get("fla-core"), machine.packages.get("triton")
    if not machine.gpus:
        return Finding("Qwen3-Next kernels", "the plain version, for the CPU")
    worst = max(machine.gpus, key=lambda gpu: inf if gpu.delta_rule_error is None else gpu.delta_rule_error)
    fault = fla_fault(fla, triton, worst.capability)
    kernels = choose_kernels(worst.delta_rule_error, fault)
    if kernels == "triton":
        return Finding("Qwen3-Next kernels", f"ours with Triton {triton}, off by {worst.delta_rule_error:.1%} in bf16")
    if kernels == "fla":
        return Finding("Qwen3-Next kernels", f"fla-core {fla}")
    ours = "Triton is missing" if triton is None else f"ours are not right with Triton {triton} on {worst.name}"
    says = (
        f"Qwen3-Next trains on the plain delta rule: right, but that part takes {DELTA_RULE_SLOWDOWN} times as long. "
        "Install fla-core 0.6 or newer, with the Triton that your torch asks for (3.7.1 with torch 2.13)."
    )
    return Finding("Qwen3-Next kernels", f"{ours}; {fault}", "costs", says)


def check_triton_on_cpu(machine: Machine) -> Finding:
    fla, triton = machine.packages.get("fla-core"), machine.packages.get("triton")
    found = f"Triton {triton or 'missing'}, fla-core {fla or 'missing'}"
    if fla and triton and not machine.gpus:
        says = (
            "Without a GPU, transformers picks fla's kernels for its own Qwen3-Next and crashes. Lockstep does not use "
            "them, but comparisons with transformers will: remove fla-core."
        )
        return Finding("GPU extras", found, "costs", says)
    return Finding("GPU extras", found)


def check_extras(machine: Machine) -> Finding:
    found = ", ".join(f"{name} {machine.packages[name]}" for name in EXTRAS if machine.packages.get(name)) or "none"
    missing = [f"without {name} {cost}" for name, cost in EXTRAS.items() if not machine.packages.get(name)]
    return Finding("extras", found, says="; ".join(missing))


CHECKS: tuple[Callable[[Machine], Finding], ...] = (
    check_python,
    check_required,
    check_torch,
    check_gpus,
    check_delta_rule,
    check_triton_on_cpu,
    check_cpu,
    check_memory,
    check_disk,
    check_extras,
)


def main(as_json: bool) -> int:
    """Print the findings; 0 when training can run, else 1."""
    machine = look(Path.cwd())
    findings = [check(machine) for check in CHECKS]
    if as_json:
        print(json.dumps({"machine": asdict(machine), "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        _print_table(findings)
    return int(any(finding.level == "stops" for finding in findings))


def _print_table(findings: list[Finding]) -> None:
    says = [f.says if f.level == "fine" else f"{f.level.upper()}: {f.says}" for f in findings]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:  # one of the lines tells
        for finding, text in zip(findings, says, strict=True):
            print(f"{finding.subject}: {finding.found}. {text}")
        return
    table = Table("", "found", "what it means", box=None, pad_edge=False)
    styles = {"fine": "", "costs": "yellow", "stops": "bold red"}
    for finding, text in zip(findings, says, strict=True):
        table.add_row(finding.subject, finding.found, text, style=styles[finding.level])
    Console().print(table)
