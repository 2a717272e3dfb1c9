"""`lockstep plan`: prints what a run will take, and what to change where it does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lockstep.checkpoint.hf import read_hf_config
from lockstep.config import Config
from lockstep.config.model_flags import check_model_flags
from lockstep.errors import OptionError
from lockstep.models import read_model_config
from lockstep.plan.advice import Change, better_hardware, can_drop_offload, smallest_change, with_changes
from lockstep.plan.hardware import Hardware
from lockstep.plan.predict import Phase, Prediction, predict
from lockstep.plan.text import describe, recommend, verdict


def run_plan(config: Config, hardware_text: str | None, *, as_json: bool) -> int:
    """Print the plan; 0 when the run fits, 1 when it does not."""
    hf_config = read_hf_config(Path(config.model.hf_checkpoint))
    check_model_flags(config, hf_config)
    model = read_model_config(hf_config)
    if hardware_text is None:
        hardware = Hardware.of_this_machine(with_gpus=config.cluster.device != "cpu")
    else:
        hardware = Hardware.parse(hardware_text)
    _require_gpus(config, hardware)
    samples = has_sampler(config)
    prediction = predict(config, model, hardware, samples=samples)
    changes = () if prediction.fits else smallest_change(config, model, hardware, samples=samples)
    changed = predict(with_changes(config, changes), model, hardware, samples=samples)
    hint = "" if prediction.fits or changes else better_hardware(config, model, hardware, samples=samples)
    drops = prediction.fits and can_drop_offload(config, model, prediction, samples=samples)
    if as_json:
        print(json.dumps(_as_data(prediction, changes, changed, hint), indent=2))
    else:
        lines = [*describe(config, prediction), "", verdict(prediction)]
        if changes:
            lines += [*recommend(changes), f"Then: {verdict(changed)}"]
        if hint:
            lines.append(hint)
        if drops:
            where = f", divided over {prediction.num_gpus} of them" if prediction.num_gpus > 1 else ""
            lines.append(
                f"The optimizer's state fits on the GPUs too{where}: without --optimizer-cpu-offload it is faster."
            )
        print("\n".join(lines))
    return 0 if prediction.fits else 1


def has_sampler(config: Config) -> bool:
    """Whether the run has an engine with caches of its own; SGLang's memory is its servers' matter."""
    is_sft = config.algorithm.loss_type == "sft_loss"
    evaluates = bool(config.eval.eval_prompt_data) or config.eval.eval_config is not None
    samples = not config.debug.samples_nothing and (not is_sft or evaluates)
    engine = config.rollout.rollout_engine
    return samples and engine == "embedded" and not config.cluster.has_replicas(engine)


def _require_gpus(config: Config, hardware: Hardware) -> None:
    wanted = config.cluster.actor_num_gpus_per_node
    if hardware.num_gpus and wanted > hardware.num_gpus:
        raise OptionError(
            "--actor-num-gpus-per-node",
            wanted,
            f"the machine has {hardware.num_gpus}.",
            "Use at most as many, or name other --hardware.",
        )
    if config.cluster.device == "cuda" and not hardware.num_gpus:
        raise OptionError(
            "--device", "cuda", "the machine has no GPU.", "Name one with --hardware, or use --device cpu."
        )


def _as_data(prediction: Prediction, changes: tuple[Change, ...], changed: Prediction, hint: str) -> dict[str, Any]:
    return {
        "fits": prediction.fits,
        "gpu_limit_bytes": prediction.hardware.gpu_bytes,
        "host_limit_bytes": prediction.host_limit,
        "num_gpus": prediction.num_gpus,
        "num_parameters": prediction.num_parameters,
        "kv_tokens": prediction.kv_tokens,
        "batches": vars(prediction.batches)
        | {
            "tokens_per_step": prediction.batches.tokens_per_step,
            "num_micro_batches": prediction.batches.num_micro_batches,
        },
        "phases": [_phase_data(phase) for phase in prediction.phases],
        "changes": [{"flags": change.flags, "costs": change.costs} for change in changes],
        "phases_after_changes": [_phase_data(phase) for phase in changed.phases] if changes else [],
        "hint": hint,
    }


def _phase_data(phase: Phase) -> dict[str, Any]:
    return {
        "name": phase.name,
        "moment": phase.moment,
        "gpu": phase.gpu,
        "gpu_bytes": phase.gpu_bytes,
        "host": phase.host,
        "host_bytes": phase.host_bytes,
    }
