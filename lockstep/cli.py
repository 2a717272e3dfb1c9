"""The command `lockstep`. It reads the command line before anything heavy (torch, transformers) is imported."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lockstep import __version__
from lockstep.errors import LockstepError, OptionError
from lockstep.option_parser import OptionParser

if TYPE_CHECKING:
    from lockstep.config import Config

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Errors of ours are printed in one line, without a traceback."""
    words = sys.argv[1:] if words is None else words
    # PyTorch's CPU threads wait by spinning, for milliseconds: on a machine with other work that made steps 10 times
    # slower. Some microseconds are enough between two operations. OpenMP reads this when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        return _dispatch(list(words))
    except LockstepError as error:
        print(f"lockstep: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("lockstep: interrupted", file=sys.stderr)
        return INTERRUPTED


def _dispatch(words: list[str]) -> int:
    if words and words[0] in COMMANDS:
        return COMMANDS[words[0]][0](words[1:])
    if words and words[0] not in ("-h", "--help", "--version"):
        raise OptionError("command", words[0], "there is no such command.", f"The commands are {', '.join(COMMANDS)}.")
    parser = _overview()
    parser.parse_args(words)
    parser.print_help()
    return 0


def _overview() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:8} {text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="lockstep",
        usage="lockstep COMMAND ...",
        description=f"Train language models with reinforcement learning.\n\ncommands:\n{listing}",
        epilog="`lockstep COMMAND --help` says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lockstep {__version__}")
    return parser


def _train(words: Sequence[str]) -> int:
    from lockstep.config.checks import check_training

    if (config := _read_config("train", words, check_training)) is None:
        return 0
    _say_what_loads(config)
    _let_segments_grow(config)
    from lockstep.loop import train

    return train(config)


def _eval(words: Sequence[str]) -> int:
    from lockstep.config.checks import check_evaluation

    if (config := _read_config("eval", words, check_evaluation)) is None:
        return 0
    _say_what_loads(config)
    _let_segments_grow(config)
    from lockstep.loop import evaluate

    return evaluate(config)


def _let_segments_grow(config: Config) -> None:
    """Training fills a GPU almost to its end, with tensors of all sizes: segments that grow leave no gaps between them.

    They grow by 128 MiB, not 20, since the driver takes its time for each piece, when memory changes hands too. Not
    where servers open training's memory by CUDA IPC: of such segments that takes a right which containers often lack.
    PyTorch reads it when it first uses a GPU.
    """
    may_be_opened = config.weight_sync.update_weight_transport in (None, "tensor")
    if config.rollout.rollout_engine == "sglang" and may_be_opened:
        return
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True,large_segment_size_mb:128")


def _read_config(command: str, words: Sequence[str], check: Callable[[Config], None]) -> Config | None:
    """The checked options of a run, or None when printing them (or the help) was all that was asked for."""
    from lockstep.config.parsing import option_parser, parse_options

    if "--help" in words or "-h" in words:
        option_parser(command).print_help()
        return None
    parsed = parse_options(command, words)
    check(parsed.config)
    if parsed.dry_run:
        print(*(f"# {note}\n" for note in parsed.notes), parsed.config.to_toml(), sep="", end="")
        return None
    for note in parsed.notes:
        print(f"lockstep: note: {note}", file=sys.stderr)
    return parsed.config


def _say_what_loads(config: Config) -> None:
    """PyTorch and a model take seconds to minutes."""
    print(f"loading {config.model.hf_checkpoint}", file=sys.stderr, flush=True)


def _serve(words: Sequence[str]) -> int:
    parser = OptionParser(
        prog="lockstep serve",
        usage="lockstep serve CHECKPOINT [--host ADDRESS] [--port PORT] [--option value ...]",
        description="Answer over HTTP, in OpenAI's protocol, with a model or a training checkpoint (docs/serve.md).",
        epilog="Options are those of `lockstep train`, such as --device, --params-dtype, --rollout-max-context-len.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", type=Path, help="folder in HF format, or the --save folder of a run")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    options, rest = parser.parse_known_args(words)

    def read_config(first: Sequence[str]) -> Config | None:
        return _read_config("serve", [*first, "--sglang-mem-fraction-static", "0.8", *rest], lambda config: None)

    from lockstep.serve import serve

    return serve(options.checkpoint, options.host, options.port, read_config)


def _report(words: Sequence[str]) -> int:
    parser = OptionParser(prog="lockstep report", description="Write the HTML page of a run.")
    parser.add_argument("run_dir", type=Path, help="folder of the run")
    parser.add_argument(
        "--output", type=Path, default=None, help="where to write the page (default: in the run's folder)"
    )
    options = parser.parse_args(words)
    from lockstep.report import write_report

    print(write_report(options.run_dir, options.output))
    return 0


def _bench(words: Sequence[str]) -> int:
    parser = OptionParser(prog="lockstep bench", description="Measure speed on this machine.")
    parser.add_argument("what", choices=["loop"], help="loop: sampling and training tokens/s of a tiny model")
    parser.add_argument("--output", type=Path, default=None, help="file for the result as JSON")
    options = parser.parse_args(words)
    from lockstep.bench.loop import main as bench_loop

    bench_loop(options.output)
    return 0


def _convert(words: Sequence[str]) -> int:
    parser = OptionParser(
        prog="lockstep convert",
        description="Between HF folders and Megatron's distributed checkpoints, alone or under torchrun.",
    )
    ways = parser.add_subparsers(dest="way", required=True, metavar="WAY")
    there = ways.add_parser(
        "hf-to-torch-dist",
        help="write an HF folder as a Megatron checkpoint",
        epilog="Megatron's model-shape flags may follow; they are checked against config.json.",
        allow_abbrev=False,
    )
    there.add_argument("--hf-checkpoint", type=Path, required=True, help="HF folder")
    there.add_argument("--save", type=Path, required=True, help="new folder, for Megatron's --load or --ref-load")
    back = ways.add_parser("torch-dist-to-hf", help="write a Megatron checkpoint as an HF folder", allow_abbrev=False)
    back.add_argument(
        "--load", "--input-dir", type=Path, required=True, help="folder of a run, or of one of its checkpoints"
    )
    back.add_argument(
        "--hf-checkpoint", "--origin-hf-dir", type=Path, required=True, help="HF folder with config and tokenizer"
    )
    back.add_argument("--save-hf", "--output-dir", type=Path, required=True, help="new HF folder")
    options, rest = parser.parse_known_args(words)
    if options.way == "torch-dist-to-hf":
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        from lockstep.checkpoint.megatron.command import run_torch_dist_to_hf

        return run_torch_dist_to_hf(options.load, options.hf_checkpoint, options.save_hf)
    from lockstep.config.model_flags import check_model_flags
    from lockstep.config.parsing import parse_options

    flags = parse_options("convert", ["--hf-checkpoint", str(options.hf_checkpoint), *rest]).config
    from lockstep.checkpoint.megatron.command import run_hf_to_torch_dist

    return run_hf_to_torch_dist(options.hf_checkpoint, options.save, lambda hf: check_model_flags(flags, hf))


def _launch(words: Sequence[str]) -> int:
    from lockstep.config.checks import check_training

    parser = OptionParser(
        prog="lockstep launch",
        usage="lockstep launch [--hosts A,B,...] [--ray-port PORT] [--run] [RECIPE.toml] [--option value ...]",
        description="Print the commands that bring up a Ray cluster for a run on several machines, and the run itself. "
        "With --run, execute those of this machine, and wait for the other hosts to join.",
        epilog="Recipe and options are those of `lockstep train` (docs/multi-node.md).",
        allow_abbrev=False,
    )
    parser.add_argument("--hosts", default="", metavar="A,B,...", help="addresses of all hosts; this machine first")
    parser.add_argument("--ray-port", type=int, default=6379, help="port of Ray's head (default: 6379)")
    parser.add_argument("--run", action="store_true", help="start Ray's nodes on this machine, and the run")
    options, rest = parser.parse_known_args(words)
    if (config := _read_config("launch", rest, check_training)) is None:
        return 0
    from lockstep.launch import launch

    hosts = [host for host in options.hosts.split(",") if host]
    return launch(config, hosts, options.ray_port, rest, starts=options.run)


def _plan(words: Sequence[str]) -> int:
    from lockstep.config.checks import check_training

    parser = OptionParser(
        prog="lockstep plan",
        usage="lockstep plan [RECIPE.toml] [--option value ...] [--hardware MACHINE] [--json]",
        description="Predict the memory of a run from its options and config.json, without weights or GPUs. Exits with "
        "1 when it does not fit, and says what to change.",
        epilog="Recipe and options are those of `lockstep train`.",
        allow_abbrev=False,
    )
    parser.add_argument("--hardware", help="such as 1xH200-141G,128G-host or 64G-host (default: this machine)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options, rest = parser.parse_known_args(words)
    if (config := _read_config("plan", rest, check_training)) is None:
        return 0
    from lockstep.plan.command import run_plan

    return run_plan(config, options.hardware, as_json=options.json)


def _doctor(words: Sequence[str]) -> int:
    parser = OptionParser(
        prog="lockstep doctor",
        description="Say what this machine has, what is wrong, and what each missing piece costs.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(words)
    from lockstep.doctor import main as doctor

    return doctor(options.json)


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (_train, "train a model"),
    "eval": (_eval, "evaluate a model on held-out prompts"),
    "serve": (_serve, "answer over HTTP with a model"),
    "plan": (_plan, "predict the memory of a run"),
    "convert": (_convert, "between HF folders and Megatron checkpoints"),
    "launch": (_launch, "a Ray cluster and a run on several machines"),
    "report": (_report, "write the HTML page of a run"),
    "bench": (_bench, "measure speed on this machine"),
    "doctor": (_doctor, "what this machine has, and what is missing"),
}
