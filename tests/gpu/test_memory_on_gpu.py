"""What the plan says of a GPU's kernels is what its allocator measures, within 10 %."""

from __future__ import annotations

import gc
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lockstep.algorithms import make_policy_loss
from lockstep.config import Config
from lockstep.kernels.packed import PackedDocuments
from lockstep.models import LanguageModel, build_model, read_model_config
from lockstep.models.activations import Pack, block_memory
from lockstep.models.layers.moe import top_k_experts
from lockstep.plan import Hardware, predict
from lockstep.trainer.batch import TrainSample
from lockstep.trainer.local import LocalTrainer

ROOT = Path(__file__).parents[2]
WITHIN = 0.1
PEAK = re.compile(r"(\w+) ([\d.e+]+) \(([\d.e+]+)\)")
"""A phase in a run's summary: measured (predicted)."""
TOKENS, DOCUMENT = 8192, 2048
COMMON: dict[str, Any] = {"vocab_size": 32768, "num_hidden_layers": 2, "num_attention_heads": 32}
SHAPES: dict[str, dict[str, Any]] = {
    "4B": COMMON
    | {
        "model_type": "qwen3",
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "30B-A3B": COMMON
    | {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
    },
    "Next-80B-A3B": COMMON
    | {
        "model_type": "qwen3_next",
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "full_attention_interval": 2,
    },
}


@pytest.fixture(autouse=True)
def empty_gpu() -> Iterator[None]:
    """A trainer's hooks know it: only the collector frees its tensors."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    assert before < 2**27, f"{before} bytes are left of the test before; 64 MiB are the workspace of cuBLAS"
    yield
    gc.collect()


def on_gpu(shape: str, **changes: Any) -> LanguageModel:
    with torch.device("meta"):
        model = build_model(read_model_config(SHAPES[shape] | changes))
    model = model.to(torch.bfloat16).to_empty(device="cuda")
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    return model


@pytest.mark.parametrize(
    ("shape", "layer"), [("4B", 0), ("30B-A3B", 0), ("Next-80B-A3B", 0), ("Next-80B-A3B", 1)], ids=str
)
def test_a_block_keeps_and_takes_what_is_predicted(shape: str, layer: int) -> None:
    model = on_gpu(shape)
    block, predicted = (
        model.model.layers[str(layer)],
        block_memory(model.config, layer, Pack(TOKENS, DOCUMENT, 2, "fused")),
    )
    for parameter in block.parameters():  # a trainer adds gradients up elsewhere, as each is ready
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    documents = PackedDocuments([DOCUMENT] * (TOKENS // DOCUMENT), torch.device("cuda"))
    rotary = model.rotary(torch.arange(DOCUMENT, device="cuda").repeat(TOKENS // DOCUMENT))
    x_TD = torch.randn(TOKENS, model.config.hidden_size, device="cuda", dtype=torch.bfloat16).requires_grad_()
    upstream = torch.ones_like(x_TD)
    for measured in (False, True):  # the first time kernels are compiled and tried
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out_TD = block(x_TD, rotary, documents, top_k_experts)
        kept = torch.cuda.memory_allocated() - before - out_TD.nbytes
        torch.cuda.reset_peak_memory_stats()
        out_TD.backward(upstream)
        backward = torch.cuda.max_memory_allocated() - before - out_TD.nbytes
        del out_TD
        x_TD.grad = None
        if measured:
            print(f"{shape} layer {layer}: kept {kept / predicted.kept_bytes:.3f} of the predicted,", end=" ")
            print(f"with backward {backward / (predicted.kept_bytes + predicted.backward):.3f}")
            assert predicted.kept_bytes == pytest.approx(kept, rel=WITHIN)
            assert predicted.kept_bytes + predicted.backward == pytest.approx(backward, rel=WITHIN)


@pytest.mark.parametrize("order", ["layer", "micro-batch", "full", "selective"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_training_step_takes_what_is_planned(shape: str, order: str) -> None:
    options: dict[str, Any] = {
        "use_precision_aware_optimizer": True,
        "main_grads_dtype": "bf16",
        "use_dynamic_batch_size": True,
        "max_tokens_per_gpu": TOKENS,
        "backward_order": "layer" if order == "layer" else "micro-batch",
        "recompute_granularity": order if order in ("full", "selective") else None,
    }
    rollout = {"rollout_batch_size": 2, "n_samples_per_prompt": 8, "rollout_max_response_len": DOCUMENT - 16}
    config = Config.from_dict(options | rollout | {"hf_checkpoint": "model", "rollout_max_prompt_len": 16})
    # Fewer experts, so that weights and state do not hide what the passes take.
    model = on_gpu(shape, **({"num_experts": 64} if "A3B" in shape else {}))
    planned = predict(config, model.config, Hardware.parse("1xH200-141G,128G-host"), samples=False)
    trainer = LocalTrainer(
        model,
        reference=None,
        loss=make_policy_loss(),
        optimizer=config.optimizer,
        batching=config.batching,
        temperature=1.0,
        needs_entropy=False,
        routing="own",
        num_steps=10,
    )
    response = DOCUMENT - 16
    samples = [
        TrainSample(torch.randint(0, 32768, (DOCUMENT,)).tolist(), response, [1] * response, 1e-4, 1.0)
        for _ in range(16)
    ]
    assert torch.cuda.memory_allocated() == pytest.approx(planned.phase("load").tensor_bytes, rel=0.02)
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        trainer.step(samples)
    torch.cuda.synchronize()
    measured, wanted = torch.cuda.max_memory_allocated(), planned.phase("backward").tensor_bytes
    print(f"{shape} {order}: measured {measured / 2**30:.2f} GiB, planned {wanted / 2**30:.2f}")
    assert wanted == pytest.approx(measured, rel=WITHIN)


def load_prepare() -> ModuleType:
    """The quickstart's generator of checkpoints and data."""
    path = ROOT / "recipes" / "quickstart" / "prepare.py"
    spec = importlib.util.spec_from_file_location("quickstart_prepare", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write_model(folder: Path, **shape: Any) -> None:
    """The quickstart's architecture and tokenizer, of this shape; the model never ends a response by itself."""
    prepare = load_prepare()
    prepare.make_checkpoint(folder, 0)
    config = prepare.make_config() | shape
    prepare.write_json(folder / "config.json", config)
    weights = {}
    for name, dims in prepare.weight_shapes(config).items():
        drawn = torch.ones(dims) if len(dims) == 1 else torch.randn(dims, device="cuda") * dims[-1] ** -0.5
        weights[name] = drawn.to(torch.bfloat16).cpu()
    head = weights["lm_head.weight"].mul_(20)
    head[: len(prepare.SPECIAL_TOKENS)] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_every_phase_of_a_run_takes_what_is_planned(tmp_path: Path) -> None:
    """`lockstep train` with a sampler, a reference model and state in host memory: 1.3 billion parameters."""
    experts = {"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
    model = tmp_path / "model"
    write_model(model, hidden_size=2048, num_hidden_layers=4, max_position_embeddings=4096, **experts, **heads)
    load_prepare().write_rows(tmp_path / "data.jsonl", load_prepare().make_prompt_rows("train", 64, 0))
    command = [
        sys.executable, "-m", "lockstep", "train", "--hf-checkpoint", str(model), "--params-dtype", "bfloat16",
        "--prompt-data", str(tmp_path / "data.jsonl"), "--input-key", "prompt", "--label-key", "label",
        "--rm-type", "random", "--num-rollout", "2", "--rollout-batch-size", "8", "--n-samples-per-prompt", "4",
        "--rollout-max-prompt-len", "48", "--rollout-max-response-len", "2000", "--use-kl-loss",
        "--kl-loss-coef", "0.01", "--use-dynamic-batch-size", "--max-tokens-per-gpu", "8192",
        "--recompute-granularity", "full", "--optimizer-cpu-offload", "--overlap-cpu-optimizer-d2h-h2d",
        "--logprob-diff-limit", "100", "--save", str(tmp_path / "save"), "--run-dir", str(tmp_path / "run"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() + done.stdout.splitlines() if "highest GiB" in line]
    for line in dict.fromkeys(lines):
        print(line)
        phases = {name: (float(got), float(planned)) for name, got, planned in PEAK.findall(line)}
        assert set(phases) == {"load", "rollout", "log_probs", "train", "save"}
        for name, (got, planned) in phases.items():
            assert planned == pytest.approx(got, rel=WITHIN), f"{name}: {line}"
    assert len(set(lines)) == 2, "of the GPU and of the host"
