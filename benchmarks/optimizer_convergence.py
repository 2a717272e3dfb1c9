"""Does compact optimizer state learn as well as fp32? The quickstart's imitation phase, on a CPU.

    python benchmarks/optimizer_convergence.py benchmarks/results/optimizer-convergence

For each precision and three seeds (of the initial weights and the order of the data), 300 steps of 64 new
demonstrations each, and then the loss on 1024 that were never seen. Two smaller questions are answered beside it: which
8-bit codes distort the steps least, and what rounding moments to the nearest would do.
Writes OUTPUT.json, OUTPUT.md and OUTPUT.svg.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from lockstep.algorithms import SftLoss
from lockstep.checkpoint.hf import load_hf_model
from lockstep.config import BatchingOptions, OptimizerOptions
from lockstep.data.chat import SftTokenizer
from lockstep.data.tokenizer import load_tokenizer
from lockstep.kernels.adamw import (
    decode_exp_avg_sq,
    encode_exp_avg_sq,
    random_bits,
    round_to_bf16,
)
from lockstep.trainer.batch import TrainSample
from lockstep.trainer.local import LocalTrainer
from lockstep.types import Sample

STEPS, BATCH, HELDOUT, SEEDS = 300, 64, 1024, (0, 1, 2)
SETTINGS: dict[str, tuple[torch.dtype, str]] = {
    "fp32 weights, fp32 moments": (torch.float32, "fp32"),
    "bf16 weights + remainder, fp32 moments": (torch.bfloat16, "fp32"),
    "bf16 weights + remainder, bf16 moments": (torch.bfloat16, "bf16"),
    "bf16 weights + remainder, 8-bit moments": (torch.bfloat16, "8bit"),
}
COLOURS = ("#111111", "#0072b2", "#e69f00", "#d55e00")
Row = tuple[list[int], list[int]]
"""Tokens of one demonstration, and its response's loss mask."""


def main() -> None:
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        prepare = Path(__file__).parents[1] / "recipes" / "quickstart" / "prepare.py"
        subprocess.run([sys.executable, str(prepare), "--output", folder], check=True)
        rows = demonstrations(Path(folder))
        runs = {
            name: [train(Path(folder), rows, seed, *setting) for seed in SEEDS] for name, setting in SETTINGS.items()
        }
    moments = runs["fp32 weights, fp32 moments"][0].pop("moments")
    for setting in runs.values():
        for run in setting:
            run.pop("moments", None)
    result = {"runs": runs, "codes": codes(moments), "rounding": rounding(), "torch": torch.__version__}
    result["minutes"] = (time.perf_counter() - started) / 60
    output = Path(sys.argv[1])
    output.with_suffix(".json").write_text(json.dumps(result) + "\n")
    output.with_suffix(".svg").write_text(figure({name: [run["losses"] for run in of] for name, of in runs.items()}))
    output.with_suffix(".md").write_text(page(result, output.name))


def demonstrations(folder: Path) -> list[Row]:
    tokenizer = SftTokenizer(load_tokenizer(folder / "model"))
    rows = []
    for line in (folder / "sft.jsonl").read_text().splitlines()[: STEPS * BATCH + HELDOUT]:
        sample = tokenizer.sample(Sample(prompt=json.loads(line)["prompt"]))
        assert sample.loss_mask is not None
        rows.append((sample.tokens, sample.loss_mask))
    return rows


def train(folder: Path, rows: list[Row], seed: int, dtype: torch.dtype, moments: Any) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    model = load_hf_model(folder / "model", dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.1, generator=draw)
    trainer = LocalTrainer(
        model.to(dtype),
        reference=None,
        loss=SftLoss(),
        optimizer=OptimizerOptions(
            lr=4e-3,
            lr_decay_style="cosine",
            lr_warmup_iters=20,
            weight_decay=0.0,
            adam_beta2=0.98,
            use_precision_aware_optimizer=True,
            exp_avg_dtype=moments,
            exp_avg_sq_dtype=moments,
        ),
        batching=BatchingOptions(use_dynamic_batch_size=True, max_tokens_per_gpu=8192),
        temperature=1.0,
        needs_entropy=False,
        routing="own",
        num_steps=STEPS,
    )
    order = torch.randperm(STEPS * BATCH, generator=draw).tolist()
    losses, kept = [], {}
    for step in range(STEPS):
        chosen = [rows[i] for i in order[step * BATCH : (step + 1) * BATCH]]
        losses.append(round(trainer.step(samples(chosen)).metrics["train/loss"], 5))
        if step == STEPS // 2 and moments == "fp32":
            kept = {name: tensor.clone() for name, tensor in trainer.optimizer.named_state()}
    heldout = samples(rows[STEPS * BATCH :])
    log_probs = trainer.log_probs(heldout)
    loss = -sum(
        float((result.log_probs * torch.tensor(sample.loss_mask)).sum()) * sample.loss_weight
        for result, sample in zip(log_probs, heldout, strict=True)
    )
    print(f"{dtype}, {moments} moments, seed {seed}: {loss:.4f}", flush=True)
    return {"losses": losses, "heldout": loss, "moments": kept}


def samples(rows: list[Row]) -> list[TrainSample]:
    count = sum(sum(mask) for _, mask in rows)
    return [TrainSample(tokens, len(mask), mask, loss_weight=1 / count) for tokens, mask in rows]


# Codes


def codes(state: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Error of the step `m / sqrt(v)` when one moment is coded as (c / n)^p of its block's largest, to the nearest."""
    pairs = [
        (state[f"exp_avg.{name}"], state[f"exp_avg_sq.{name}"])
        for name in (key.removeprefix("exp_avg.") for key in state if key.startswith("exp_avg."))
        if state[f"exp_avg.{name}"].dim() > 1
    ]
    first = {f"{p:g}": error(pairs, lambda m, v, p=p: (coded(m, p, 127), v)) for p in (1.0, 1.5, 2.0, 3.0)}
    second = {f"{p:g}": error(pairs, lambda m, v, p=p: (m, coded(v, p, 255))) for p in (1.0, 2.0, 3.0, 4.0, 6.0)}
    return {"exp_avg": first, "exp_avg_sq": second}


def error(pairs: list[tuple[Tensor, Tensor]], change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> float:
    """Root mean square over that of the exact steps."""
    wrong, whole = 0.0, 0.0
    for m, v in pairs:
        seen = v > 0
        exact = m[seen] / (v[seen].sqrt() + 1e-8)
        coded_m, coded_v = change(m, v)
        wrong += float((coded_m[seen] / (coded_v[seen].sqrt() + 1e-8) - exact).square().sum())
        whole += float(exact.square().sum())
    return float((wrong / whole) ** 0.5)


def coded(x: Tensor, power: float, levels: int) -> Tensor:
    rows = x.flatten(0, -2)
    assert rows.shape[1] <= 128, "one block a row"
    largest = rows.abs().amax(1, keepdim=True).clamp(min=1e-30)
    share = rows.abs() / largest
    low = (share ** (1 / power) * levels).floor().clamp(max=levels - 1)
    below, above = (low / levels) ** power, ((low + 1) / levels) ** power
    nearest = torch.where(share - below > above - share, above, below)
    if levels == 255:
        nearest = torch.where((nearest == 0) & (share > 0), levels**-power, nearest)
    return (nearest * largest * rows.sign()).view(x.shape)


# Rounding


def rounding() -> dict[str, float]:
    """A second moment of 1 whose gradients fall to 0.1: stored over exact value after 3000 steps, mean of 1016.

    One in 128 has gradients of 4 throughout, so that a block's scale stays.
    """
    squares = torch.full((8, 128), 0.01)
    squares[:, 0] = 16.0
    found = {}
    for beta2 in (0.98, 0.999):
        exact = 0.01 + 0.99 * beta2**3000
        for name, store in {
            "bf16, nearest": lambda v, _: v.bfloat16().float(),
            "bf16, random": lambda v, bits: round_to_bf16(v, bits).float(),
            "8-bit, nearest": lambda v, _: coded(v, 4.0, 255),
            "8-bit, random": lambda v, bits: decode_exp_avg_sq(*encode_exp_avg_sq(v, bits)),
        }.items():
            v = squares.clamp(min=1.0)
            for step in range(3000):
                v = v * beta2 + (1 - beta2) * squares
                v = store(v, random_bits(step * 2654435761, 0, v) & 0xFFFF)
            found[f"{name}, beta2 {beta2:g}"] = float(v[:, 1:].mean()) / exact
    return found


# Report


def figure(losses: dict[str, list[list[float]]]) -> str:
    """Loss over steps, means of five, one faint line a seed and a strong one for their mean; a log scale."""
    width, height, left, right, top, bottom = 720, 380, 56, 700, 24, 330
    high, low = 8.0, 0.02

    def line(values: list[float], style: str) -> str:
        smooth = [mean(values[i : i + 5]) for i in range(0, len(values), 5)]
        points = " ".join(
            f"{left + (right - left) * (5 * i + 2.5) / STEPS:.1f},{y(value):.1f}" for i, value in enumerate(smooth)
        )
        return f'<polyline points="{points}" fill="none" {style}/>'

    def y(loss: float) -> float:
        position = torch.tensor(high / loss).log() / torch.tensor(high / low).log()
        return top + (bottom - top) * min(1.0, max(0.0, float(position)))

    body = []
    for loss in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5):
        body.append(f'<path d="M{left} {y(loss):.1f}H{right}" stroke="#ddd"/>')
        body.append(f'<text x="{left - 8}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:g}</text>')
    for step in range(0, STEPS + 1, 50):
        at = left + (right - left) * step / STEPS
        body.append(f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{step}</text>')
    for row, ((name, of), colour) in enumerate(zip(losses.items(), COLOURS, strict=True)):
        body += [line(values, f'stroke="{colour}" stroke-width="0.6" opacity="0.5"') for values in of]
        body.append(line([mean(step) for step in zip(*of, strict=True)], f'stroke="{colour}" stroke-width="1.8"'))
        body.append(f'<text x="{right - 270}" y="{top + 20 + 18 * row}" fill="{colour}">{name}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(body)
        + f'\n<text x="{(left + right) / 2}" y="{bottom + 40}" text-anchor="middle">optimizer steps; loss per token, '
        "three seeds and their mean</text></svg>\n"
    )


def page(result: dict[str, Any], name: str) -> str:
    runs = result["runs"]
    exact = [run["heldout"] for run in runs["fp32 weights, fp32 moments"]]
    lines = [
        "# Compact optimizer state against fp32",
        "",
        "    python benchmarks/optimizer_convergence.py benchmarks/results/optimizer-convergence",
        "",
        f"The quickstart's imitation phase: {STEPS} steps of {BATCH} new demonstrations, beta2 0.98, {len(SEEDS)} "
        f"seeds of weights and order; held-out loss per token on {HELDOUT} demonstrations. One CPU thread, torch "
        f"{result['torch']}, {result['minutes']:.1f} minutes.",
        "",
        f"![loss over steps]({name}.svg)",
        "",
        "| precision | held-out loss, each seed | mean | standard deviation | mean difference from fp32, same seeds |",
        "|---|---|---|---|---|",
    ]
    for setting, of in runs.items():
        losses = [run["heldout"] for run in of]
        differences = [a - b for a, b in zip(losses, exact, strict=True)]
        each = ", ".join(f"{loss:.4f}" for loss in losses)
        lines.append(f"| {setting} | {each} | {mean(losses):.4f} | {stdev(losses):.4f} | {mean(differences):+.4f} |")
    lines += [
        "",
        "## Which 8-bit codes",
        "",
        "A number is stored as `(c / n)^p` of the largest in its block (n is 127 and a sign, or 255). Error of the "
        "step `m / sqrt(v)` when one moment is coded, relative, on the moments of an fp32 run at half time:",
        "",
        "| p | first moment coded | second moment coded |",
        "|---|---|---|",
    ]
    first, second = result["codes"]["exp_avg"], result["codes"]["exp_avg_sq"]
    for power in sorted({*first, *second}, key=float):
        cells = [f"{of[power]:.2%}" if power in of else "" for of in (first, second)]
        lines.append(f"| {power} | {cells[0]} | {cells[1]} |")
    lines += [
        "",
        "## Why moments are rounded at random",
        "",
        "A second moment of 1 whose gradients fall to 0.1, after 3000 steps: what is stored over the exact value, mean "
        "of 1016 numbers, in blocks with a larger one.",
        "",
        "| stored as | beta2 0.98 | beta2 0.999 |",
        "|---|---|---|",
    ]
    for kind in ("bf16, nearest", "bf16, random", "8-bit, nearest", "8-bit, random"):
        cells = [f"{result['rounding'][f'{kind}, beta2 {beta2}']:.2f}" for beta2 in ("0.98", "0.999")]
        lines.append(f"| {kind} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
