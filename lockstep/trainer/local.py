"""The training engine of one process and one device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor, nn

from lockstep.checkpoint.hf import OnBytes, save_hf_model
from lockstep.exact import log_probs_for, packed_documents
from lockstep.models import LanguageModel
from lockstep.models.layers.moe import ChooseExperts, RecordRoutes
from lockstep.trainer.backward import BackwardOrder, ByLayer, ByMicroBatch, Pass
from lockstep.trainer.base import Trainer, TrainerOptions, per_sample
from lockstep.trainer.batch import MicroBatch, TrainSample
from lockstep.trainer.engine import LogProbs, StepResult
from lockstep.trainer.optimizer import Optimizer
from lockstep.trainer.routes import CompareRoutes, ReplayRoutes, choose_experts


class LocalTrainer(Trainer):
    """Forward, backward and update on one device.

    Args:
        reference: frozen model for the KL loss, or None.
    """

    def __init__(
        self, model: LanguageModel, *, reference: LanguageModel | None, **options: Unpack[TrainerOptions]
    ) -> None:
        super().__init__(model, reference, options)
        by_layer = self.batching.backward_order == "layer"
        self.optimizer = Optimizer(model, self.optimizer_options, settles=by_layer)
        self._backward: BackwardOrder = ByMicroBatch(recompute=self.batching.recompute_granularity is not None)
        if by_layer:
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
        model = self._model(reference)
        results: list[LogProbs | None] = [None] * len(samples)
        for members in self._bins([len(s.tokens) for s in samples], self.batching.log_probs_max_tokens_per_gpu):
            batch = MicroBatch.build([samples[i] for i in members], self.device)
            recorded_TLS = None if reference else batch.routed_experts_TLS
            choose = choose_experts(recorded_TLS, replays=self.routing == "rollout")
            records = RecordRoutes(choose) if self.routing == "old" and not reference else None
            documents = packed_documents(model)(batch.lengths, self.device)
            hidden_TD = model(batch.input_ids_T, batch.positions_T, documents, records or choose)
            policy_R, _ = self._project(model, batch, hidden_TD, with_entropy=False)
            for index, result in zip(members, per_sample(batch, policy_R, _flips(choose)), strict=True):
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
            loss = self._loss(batch, policy_R, entropy_R, totals)
            for index, result in zip(members, per_sample(batch, policy_R.detach(), _flips(choose)), strict=True):
                results[index] = result
            self.on_micro_batch(len(members))
            return loss

        def passes() -> Iterator[Pass]:
            for members in self._bins([len(s.tokens) for s in samples], self.batching.max_tokens_per_gpu):
                batch = MicroBatch.build([samples[i] for i in members], self.device)
                choose = choose_experts(batch.routed_experts_TLS, replays=self.routing != "own")
                keeps_attention = self.batching.recompute_granularity == "selective"
                documents = packed_documents(self.model)(batch.lengths, self.device, keeps_attention=keeps_attention)
                done = partial(finish, members, batch, choose)
                yield Pass(batch.input_ids_T, batch.positions_T, documents, choose, done)

        self._backward.run(self.model, passes())
        metrics = self._update(self.optimizer.start_step, totals, num_samples=len(samples))
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

    def _project(
        self, model: LanguageModel, batch: MicroBatch, hidden_TD: Tensor, *, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        return log_probs_for(model)(
            hidden_TD[batch.rows_R],
            model.lm_head.weight,
            batch.targets_R,
            temperature=self.temperature,
            kept=batch.kept,
            chunk_rows=self._chunk_rows,
            with_entropy=with_entropy,
        )


def _flips(choose: ChooseExperts) -> Tensor | None:
    return choose.differs_T if isinstance(choose, CompareRoutes | ReplayRoutes) else None
