"""AdamW with fp32 master weights, exact clipping and Megatron's learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lockstep.config import OptimizerOptions


def learning_rate(options: OptimizerOptions, step: int, *, num_steps: int) -> float:
    """Rate of optimizer step `step` (from 0): linear warm-up, then constant, linear or cosine decay to min_lr.

    Source: Megatron-LM's OptimizerParamScheduler; there step 0 of a warm-up runs at rate 0, here at lr / warm-up.
    """
    decay_steps = options.lr_decay_iters or num_steps
    warmup = options.lr_warmup_iters
    if options.lr_warmup_fraction is not None:
        warmup = int(options.lr_warmup_fraction * decay_steps)
    if step < warmup:
        return options.lr * (step + 1) / warmup
    if options.lr_decay_style == "constant":
        return options.lr
    progress = min(1.0, (step - warmup) / max(1, decay_steps - warmup))
    remaining = 1.0 - progress if options.lr_decay_style == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return options.min_lr + (options.lr - options.min_lr) * remaining


class Optimizer:
    """Updates a model's parameters; fp32 parameters are their own masters, others have an fp32 master each.

    Gradients accumulate in fp32 (`main_grads`), whatever the parameters' type. Weight decay is decoupled and spares
    vectors (norms and biases), as in Megatron.
    """

    def __init__(self, model: nn.Module, options: OptimizerOptions) -> None:
        self.options = options
        self.parameters = dict(model.named_parameters())
        self.masters = {
            name: p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
            for name, p in self.parameters.items()
        }
        for name, parameter in self.parameters.items():
            if parameter is not self.masters[name]:
                parameter.register_post_accumulate_grad_hook(_accumulate_into(self.masters[name]))
        decayed = [m for m in self.masters.values() if m.dim() > 1]
        spared = [m for m in self.masters.values() if m.dim() <= 1]
        self.adam = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": options.weight_decay}, {"params": spared, "weight_decay": 0.0}],
            lr=options.lr,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_eps,
            fused=True,
        )
        self.num_updates = 0

    def step(self, lr: float) -> float:
        """Clip by the global norm, update, clear the gradients; returns the norm before clipping.

        When the norm is not finite nothing changes but the gradients, which are cleared: the caller sees the norm.
        """
        grads = [m.grad for m in self.masters.values() if m.grad is not None]
        grad_norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
        if torch.isfinite(grad_norm):
            if 0 < self.options.clip_grad < grad_norm:
                scale = self.options.clip_grad / (grad_norm + 1e-6)
                for grad in grads:
                    grad.mul_(scale)
            for group in self.adam.param_groups:
                group["lr"] = lr
            self.adam.step()
            self.num_updates += 1
            self._write_back()
        self.adam.zero_grad(set_to_none=True)
        return float(grad_norm)

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that a checkpoint must hold beside the weights; made (as zeros) where no step was taken yet."""
        for name, master in self.masters.items():
            state = self.adam.state[master]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
            for key in ("step", "exp_avg", "exp_avg_sq"):
                yield f"{key}.{name}", state[key]
            if master is not self.parameters[name]:
                yield f"master.{name}", master.detach()

    @torch.no_grad()
    def restart(self) -> None:
        """Forget the moments and take the parameters as they are now."""
        self.adam.state.clear()
        for name, parameter in self.parameters.items():
            if parameter is not self.masters[name]:
                self.masters[name].copy_(parameter)

    @torch.no_grad()
    def _write_back(self) -> None:
        for name, parameter in self.parameters.items():
            if parameter is not self.masters[name]:
                parameter.copy_(self.masters[name])


def _accumulate_into(master: Tensor):  # type: ignore[no-untyped-def]
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad.add_(parameter.grad)
        parameter.grad = None

    return hook
