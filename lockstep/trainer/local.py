"""The training engine of one process and one device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lockstep.algorithms import Loss
from lockstep.checkpoint.hf import OnBytes, save_hf_model
from lockstep.checkpoint.tensors import load_tensors, save_tensors
from lockstep.config import BatchingOptions, OptimizerOptions
from lockstep.exact import log_probs_for, packed_documents
from lockstep.models import LanguageModel
from lockstep.models.layers.moe import ChooseExperts, RecordRoutes
from lockstep.trainer.backward import BackwardOrder, ByLayer, ByMicroBatch, Pass
from lockstep.trainer.batch import MicroBatch, TrainSample, pack_by_count, pack_by_tokens
from lockstep.trainer.blocks import require_the_same_blocks
from lockstep.trainer.counts import Counts
from lockstep.trainer.engine import LogProbs, StepResult
from lockstep.trainer.optimizer import Optimizer, learning_rate
from lockstep.trainer.routes import CompareRoutes, ReplayRoutes, choose_experts


class LocalTrainer(Counts):
    """Forward, backward and update on one device.

    Args:
        reference: frozen model for the KL loss, or None.
        temperature: the sampler's; logits are divided by it here too.
        needs_entropy: report (and let the loss use) the entropy of every prediction.
        routing: whose experts serve training: the router's own (compared with the sampler's, where recorded), the
            sampler's ("rollout", R3), or those of the pass that computed the old log-probs ("old", R2).
        num_steps: optimizer steps of the whole run, for the learning-rate schedule.
        on_micro_batch: called after each micro-batch with its number of samples, for progress.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        reference: LanguageModel | None,
        loss: Loss,
        optimizer: OptimizerOptions,
        batching: BatchingOptions,
        temperature: float,
        needs_entropy: bool,
        routing: Literal["own", "rollout", "old"],
        num_steps: int,
        on_micro_batch: Callable[[int], None] = lambda _: None,
    ) -> None:
        super().__init__()
        self.model = model
        self.reference = reference
        self.loss = loss
        self.optimizer: Optimizer = Optimizer(model, optimizer, settles=batching.backward_order == "layer")
        self.optimizer_options = optimizer
        self.batching = batching
        self.temperature = temperature
        self.needs_entropy = needs_entropy
        self.routing = routing
        self.num_steps = num_steps
        self.on_micro_batch = on_micro_batch
        self._backward: BackwardOrder = ByMicroBatch(recompute=batching.recompute_granularity is not None)
        if batching.backward_order == "layer":
            self._backward = ByLayer(self.optimizer.gradients.settle)
        if self.optimizer.is_streamed:
            self._update_before_use()

    def _update_before_use(self) -> None:
        """Let each part of the model wait for its own weights only: a streamed update hides behind the next forward."""
        decoder = self.model.model
        named_parts: list[tuple[str, nn.Module]] = [
            ("model.embed_tokens", decoder.embed_tokens),
            *((f"model.layers.{key}", block) for key, block in decoder.layers.items()),
            ("model.norm", decoder.norm),
        ]
        for prefix, part in named_parts:
            names = [f"{prefix}.{name}" for name, _ in part.named_parameters()]
            if part is decoder.norm:  # the last part that is called: lm_head is read as a weight after it
                names += [name for name in self.optimizer.parameters if name.startswith("lm_head.")]
            part.register_forward_pre_hook(lambda *_, names=names: self.optimizer.wait(names))

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    @torch.no_grad()
    def log_probs(self, samples: Sequence[TrainSample], *, reference: bool = False) -> list[LogProbs]:
        model = self.model
        if reference:
            assert self.reference is not None, "no reference model was loaded"
            model = self.reference
        results: list[LogProbs | None] = [None] * len(samples)
        for members in self._micro_batches(samples, self.batching.log_probs_max_tokens_per_gpu):
            batch = MicroBatch.build([samples[i] for i in members], self.device)
            recorded_TLS = None if reference else batch.routed_experts_TLS
            choose = choose_experts(recorded_TLS, replays=self.routing == "rollout")
            records = RecordRoutes(choose) if self.routing == "old" and not reference else None
            documents = packed_documents(model)(batch.lengths, self.device)
            hidden_TD = model(batch.input_ids_T, batch.positions_T, documents, records or choose)
            policy_R, _ = self._project(model, batch, hidden_TD, with_entropy=False)
            for index, result in zip(members, _per_sample(batch, policy_R, choose), strict=True):
                results[index] = result
            if records is not None and records.layers:
                for index, routes in zip(members, records.stacked().cpu().split(batch.lengths), strict=True):
                    samples[index].routed_experts = routes.numpy()
            self.on_micro_batch(len(members))
        return [result for result in results if result is not None]

    def step(self, samples: Sequence[TrainSample]) -> StepResult:
        results: list[LogProbs | None] = [None] * len(samples)
        totals: dict[str, float] = {}

        def finish(members: list[int], batch: MicroBatch, choose: ChooseExperts, hidden_TD: Tensor) -> Tensor:
            policy_R, entropy_R = self._project(self.model, batch, hidden_TD, with_entropy=self.needs_entropy)
            output = self.loss(batch.loss_inputs(policy_R, entropy_R))
            for name, value in output.metrics.items():
                totals[name] = totals.get(name, 0.0) + float(value)
            for index, result in zip(members, _per_sample(batch, policy_R.detach(), choose), strict=True):
                results[index] = result
            self.on_micro_batch(len(members))
            return output.loss

        def passes() -> Iterator[Pass]:
            for members in self._micro_batches(samples, self.batching.max_tokens_per_gpu):
                batch = MicroBatch.build([samples[i] for i in members], self.device)
                choose = choose_experts(batch.routed_experts_TLS, replays=self.routing != "own")
                keeps_attention = self.batching.recompute_granularity == "selective"
                documents = packed_documents(self.model)(batch.lengths, self.device, keeps_attention=keeps_attention)
                done = partial(finish, members, batch, choose)
                yield Pass(batch.input_ids_T, batch.positions_T, documents, choose, done)

        self._backward.run(self.model, passes())
        lr = learning_rate(self.optimizer_options, self.num_steps_done, num_steps=self.num_steps)
        updates_before = self.optimizer.num_updates
        grad_norm = self.optimizer.start_step(lr)
        metrics = self._count_step(
            totals, grad_norm=grad_norm, lr=lr, updates_before=updates_before, num_samples=len(samples)
        )
        return StepResult(metrics, [result for result in results if result is not None])

    @contextmanager
    def rollout_weights(self) -> Iterator[LanguageModel]:
        """The trainer's own parameters."""
        self.optimizer.wait(self.optimizer.parameters)
        yield self.model

    def finish_update(self) -> None:
        self.optimizer.synchronize()

    def update_reference(self) -> None:
        assert self.reference is not None, "no reference model was loaded"
        self.optimizer.wait(self.optimizer.parameters)
        self.reference.load_state_dict(self.model.state_dict())
        self._reference_moved = True

    def save(self, folder: Path, *, with_optimizer: bool = True) -> None:
        save_tensors(folder, dict(self._state(with_optimizer)))

    def load(self, folder: Path, *, with_optimizer: bool = True) -> None:
        state = dict(self._state(with_optimizer))
        require_the_same_blocks(folder, state)
        load_tensors(folder, state)
        if not with_optimizer:
            self.optimizer.restart()

    def export(self, folder: Path, *, source: Path, on_bytes: OnBytes | None = None) -> None:
        with self.rollout_weights() as model:
            save_hf_model(model, folder, source=source, on_bytes=on_bytes)

    def _state(self, with_optimizer: bool) -> Iterator[tuple[str, Tensor]]:
        self.optimizer.wait(self.optimizer.parameters)
        yield from ((f"model.{name}", p.detach()) for name, p in self.model.named_parameters())
        if with_optimizer:
            yield from ((f"optimizer.{name}", tensor) for name, tensor in self.optimizer.named_state())
        if self.reference is not None and self._reference_moved:
            yield from ((f"reference.{name}", p.detach()) for name, p in self.reference.named_parameters())

    def _micro_batches(self, samples: Sequence[TrainSample], max_tokens: int | None) -> list[list[int]]:
        if self.batching.use_dynamic_batch_size and max_tokens:
            return pack_by_tokens([len(s.tokens) for s in samples], max_tokens)
        return pack_by_count(len(samples), self.batching.micro_batch_size)

    def _project(
        self, model: LanguageModel, batch: MicroBatch, hidden_TD: Tensor, *, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        return log_probs_for(model)(
            hidden_TD[batch.rows_R],
            model.lm_head.weight,
            batch.targets_R,
            temperature=self.temperature,
            kept=batch.kept,
            chunk_rows=self.batching.log_probs_chunk_size if self.batching.log_probs_chunk_size > 0 else None,
            with_entropy=with_entropy,
        )


def _per_sample(batch: MicroBatch, log_probs_R: Tensor, choose: ChooseExperts) -> list[LogProbs]:
    differs: list[Tensor | None] = [None] * len(batch.lengths)
    if isinstance(choose, CompareRoutes | ReplayRoutes):
        differs = [
            flips.cumsum(0)[len(flips) - 1 - response : len(flips) - 1] > 0
            for flips, response in zip(choose.differs_T.cpu().split(batch.lengths), batch.response_lengths, strict=True)
        ]
    return [
        LogProbs(log_probs, differ)
        for log_probs, differ in zip(log_probs_R.cpu().split(batch.response_lengths), differs, strict=True)
    ]
