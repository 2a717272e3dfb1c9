"""The training engine of many processes: the same steps as one process takes, on shards.

All ranks run the same calls on the same samples. Each computes the micro-batches of its data-parallel place, on its own
rows, heads, experts and layers, and all ranks return the results of all samples.

T rows of a padded pack, C of them on this rank's context-parallel place, S of those on its tensor-parallel place, R
predictions, D model width, L sparse layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from lockstep.kernels.packed import PackedDocuments
from lockstep.models import LanguageModel
from lockstep.models.language_model import RunLayer, run_layer
from lockstep.models.layers.mixer import TokenMixer
from lockstep.models.layers.moe import ChooseExperts, MoE, RecordRoutes, top_k_experts
from lockstep.parallel.context import ContextMixer
from lockstep.parallel.layers import GatheredLayers
from lockstep.parallel.local import local_part
from lockstep.parallel.log_probs import log_probs_of_pack
from lockstep.parallel.mesh import Meshes
from lockstep.parallel.pipeline import FromPreviousStage, Pipeline
from lockstep.parallel.rows import RankRows
from lockstep.parallel.shard import ShardedParameter, sharded_parameters
from lockstep.parallel.whole import WholeModel
from lockstep.trainer.backward import ByLayer, Pass
from lockstep.trainer.base import Trainer, TrainerOptions, per_sample
from lockstep.trainer.batch import MicroBatch, TrainSample
from lockstep.trainer.engine import LogProbs, StepResult
from lockstep.trainer.routes import CompareRoutes, ReplayRoutes, choose_experts
from lockstep.trainer.shards import ShardOptimizer

_NOTHING = TrainSample(
    tokens=[0],
    response_length=0,
    loss_mask=[],
    rollout_log_probs=[],
    old_log_probs=torch.zeros(0),
    ref_log_probs=torch.zeros(0),
)
"""What an empty micro-batch holds: a token without predictions, which takes part in all exchanges."""


def deal_micro_batches(bins: list[list[int]], lengths: Sequence[int], num_ranks: int) -> list[list[list[int]]]:
    """Micro-batches of every data-parallel rank: as many for each, of similar size at the same time, some empty.

    Ranks wait for each other in every layer, so a micro-batch lasts as long as the largest of its time.
    """
    order = sorted(range(len(bins)), key=lambda i: (-sum(lengths[j] for j in bins[i]), i))
    dealt: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for start in range(0, len(bins), num_ranks):
        together = [bins[i] for i in order[start : start + num_ranks]]
        together += [[]] * (num_ranks - len(together))
        # Every other time the other way round, so that no rank always gets the largest.
        for rank, members in enumerate(together if start // num_ranks % 2 == 0 else reversed(together)):
            dealt[rank].append(members)
    return dealt


@dataclass(frozen=True)
class _Pack:
    """One micro-batch, as this rank sees it."""

    members: list[int]
    batch: MicroBatch
    rows: RankRows
    mixer: TokenMixer
    input_ids_C: Tensor
    positions_C: Tensor
    routed_experts_SLK: Tensor | None


class ParallelTrainer(Trainer):
    """Forward, backward and update over all ranks of a layout.

    Args:
        model: divided by `shard_model`.
        reference: frozen model for the KL loss, divided likewise, or None.
    """

    def __init__(
        self,
        model: LanguageModel,
        meshes: Meshes,
        *,
        reference: LanguageModel | None,
        device: torch.device,
        **options: Unpack[TrainerOptions],
    ) -> None:
        super().__init__(model, reference, options)
        self.meshes = meshes
        self.device = device
        by_layer = self.batching.backward_order == "layer"
        shards = list(sharded_parameters(model, meshes))
        self.optimizer: ShardOptimizer = ShardOptimizer(shards, self.optimizer_options, settles=by_layer)
        self._by_layer = self._make_by_layer(shards) if by_layer else None
        recomputes = self.batching.recompute_granularity is not None
        self._run_layer: RunLayer = partial(checkpoint, use_reentrant=False) if recomputes else run_layer

    def _make_by_layer(self, shards: list[ShardedParameter]) -> ByLayer:
        assert self.meshes.layout.pp_size == 1, "a stage would wait for all of the one before it"
        gradients = self.optimizer.gradients
        layers = GatheredLayers(self.model, {shard.name: shard for shard in shards}, gradients.take_part)

        def settle(names: list[str]) -> None:
            layers.reduce(names)
            gradients.settle(names)

        return ByLayer(settle, layers.gathered)

    @torch.no_grad()
    def log_probs(self, samples: Sequence[TrainSample], *, reference: bool = False) -> list[LogProbs]:
        model = self._model(reference)
        packs = self._packs(samples, self.batching.log_probs_max_tokens_per_gpu)
        policies: list[Tensor] = []
        routes: list[ChooseExperts] = []
        recorded: list[RecordRoutes] = []

        def forward(index: int, received: Tensor | None) -> Tensor:
            pack = packs[index]
            choose: ChooseExperts = top_k_experts
            if not reference:
                choose = choose_experts(pack.routed_experts_SLK, replays=self.routing == "rollout")
            routes.append(choose)
            recorded.append(RecordRoutes(choose))
            hidden_SD = self._hidden(model, pack, recorded[-1], received)
            if self.meshes.is_last_stage:
                policies.append(self._log_probs(model, pack, hidden_SD, with_entropy=False)[0])
            self.on_micro_batch(len(pack.members))
            return hidden_SD

        self._pipeline(model, packs).forward_only(forward)
        assert isinstance(model, FSDPModule)
        model.reshard()  # else the next forward would find the weights of before an update
        if self.routing == "old" and not reference:
            self._keep_routes(samples, packs, recorded)
        return self._results(packs, policies, routes)

    def step(self, samples: Sequence[TrainSample]) -> StepResult:
        keeps_attention = self.batching.recompute_granularity == "selective"
        packs = self._packs(samples, self.batching.max_tokens_per_gpu, keeps_attention=keeps_attention)
        totals: dict[str, float] = {}
        policies: list[Tensor] = []
        routes = [choose_experts(pack.routed_experts_SLK, replays=self.routing != "own") for pack in packs]

        def finish(pack: _Pack, hidden_SD: Tensor) -> Tensor:
            self.on_micro_batch(len(pack.members))
            if not self.meshes.is_last_stage:
                return hidden_SD
            policy_R, entropy_R = self._log_probs(self.model, pack, hidden_SD, with_entropy=self.needs_entropy)
            policies.append(policy_R.detach())
            return self._loss(pack.batch, policy_R, entropy_R, totals)

        def forward(index: int, received: Tensor | None) -> Tensor:
            return finish(packs[index], self._hidden(self.model, packs[index], routes[index], received))

        if self._by_layer is not None:
            self._by_layer.run(
                self.model,
                (
                    Pass(pack.input_ids_C, pack.positions_C, pack.mixer, choose, partial(finish, pack))
                    for pack, choose in zip(packs, routes, strict=True)
                ),
            )
        else:
            self._pipeline(self.model, packs).forward_backward(forward)
        parts = self._everybodys([totals] if self._speaks else [])
        totals = {name: sum(part[name] for part in parts) for name in parts[0]}
        metrics = self._update(self.optimizer.step, totals, num_samples=len(samples))
        return StepResult(metrics, self._results(packs, policies, routes))

    def rollout_weights(self) -> AbstractContextManager[LanguageModel]:
        """A whole model on every rank, gathered for as long as the context is open. Called by all ranks."""
        return self._whole.gathered()

    @cached_property
    def _whole(self) -> WholeModel:
        return WholeModel(self.model, self.device)

    def update_reference(self) -> None:
        assert self.reference is not None, "no reference model was loaded"
        policy = {shard.name: shard.local for shard in sharded_parameters(self.model, self.meshes)}
        for shard in sharded_parameters(self.reference, self.meshes):
            shard.local.copy_(policy[shard.name])
        self._reference_moved = True

    def _state(self, with_optimizer: bool) -> Iterator[tuple[str, Tensor]]:
        yield from (
            (f"model.{shard.name}", shard.stored.detach()) for shard in sharded_parameters(self.model, self.meshes)
        )
        if with_optimizer:
            yield from ((f"optimizer.{name}", tensor) for name, tensor in self.optimizer.sharded_state())
        if self.reference is not None and self._reference_moved:
            shards = sharded_parameters(self.reference, self.meshes)
            yield from ((f"reference.{shard.name}", shard.stored.detach()) for shard in shards)

    @property
    def _speaks(self) -> bool:
        """Whether this rank answers for its data-parallel place: the ranks that share its samples know the same."""
        return self.meshes.is_last_stage and self.meshes.cp_rank == 0 and self.meshes.tp_rank == 0

    def _packs(
        self, samples: Sequence[TrainSample], max_tokens: int | None, *, keeps_attention: bool = False
    ) -> list[_Pack]:
        """The micro-batches of this data-parallel place. `max_tokens` is what one context-parallel rank takes."""
        layout, lengths = self.meshes.layout, [len(s.tokens) for s in samples]
        bins = self._bins(lengths, max_tokens and max_tokens * layout.cp_size)
        mine = deal_micro_batches(bins, lengths, layout.dp_size)[self.meshes.dp_rank]
        return [self._pack(members, [samples[i] for i in members] or [_NOTHING], keeps_attention) for members in mine]

    def _pack(self, members: list[int], samples: list[TrainSample], keeps_attention: bool) -> _Pack:
        meshes, batch = self.meshes, MicroBatch.build(samples, self.device)
        rows = RankRows(batch.lengths, meshes.layout, meshes.cp_rank, meshes.tp_rank, self.device)
        mixer: TokenMixer = PackedDocuments(rows.lengths, self.device, keeps_attention=keeps_attention)
        if meshes.layout.cp_size > 1:
            mixer = ContextMixer(rows, meshes.group("cp"))
        positions_T = torch.cat([torch.arange(length, device=self.device) for length in rows.lengths])
        recorded = batch.routed_experts_TLS
        return _Pack(
            members=members,
            batch=batch,
            rows=rows,
            mixer=mixer,
            input_ids_C=rows.padded(batch.input_ids_T, 0)[rows.context_C],
            positions_C=positions_T[rows.context_C],
            routed_experts_SLK=None if recorded is None else rows.padded(recorded, -1)[rows.sequence_S],
        )

    def _pipeline(self, model: LanguageModel, packs: list[_Pack]) -> Pipeline:
        width, dtype = model.config.hidden_size, next(model.parameters()).dtype
        return Pipeline(self.meshes, [(len(pack.rows.sequence_S), width) for pack in packs], dtype, self.device)

    def _hidden(self, model: LanguageModel, pack: _Pack, choose: ChooseExperts, received: Tensor | None) -> Tensor:
        """This stage's last hidden states `[S, D]`."""
        embed: Any = model.model.embed_tokens
        if isinstance(embed, FromPreviousStage):
            embed.received = received
        hidden_SD: Tensor = model(pack.input_ids_C, pack.positions_C, pack.mixer, choose, self._run_layer)
        return hidden_SD

    def _log_probs(
        self, model: LanguageModel, pack: _Pack, hidden_SD: Tensor, *, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        return log_probs_of_pack(
            hidden_SD,
            local_part(model.lm_head.weight),
            pack.rows,
            pack.batch.rows_R,
            pack.batch.targets_R,
            self.meshes,
            temperature=self.temperature,
            kept=pack.batch.kept,
            chunk_rows=self._chunk_rows,
            with_entropy=with_entropy,
        )

    def _results(self, packs: list[_Pack], policies: list[Tensor], routes: list[ChooseExperts]) -> list[LogProbs]:
        """Of all samples, on all ranks. `policies` is filled on the last stage only."""
        found: list[tuple[int, LogProbs]] = []
        for index, pack in enumerate(packs):
            flips = self._flips(pack, routes[index])
            if self._speaks:
                found += zip(pack.members, per_sample(pack.batch, policies[index], flips), strict=False)
        return [result for _, result in sorted(self._everybodys(found), key=lambda item: item[0])]

    def _flips(self, pack: _Pack, choose: ChooseExperts) -> Tensor | None:
        """Tokens `[T]` of the pack whose experts differ from the recorded ones, on whichever rank or stage."""
        if not isinstance(choose, CompareRoutes | ReplayRoutes):
            return None
        flips_T = torch.zeros(pack.rows.num_rows, dtype=torch.int32, device=self.device)
        flips_T[pack.rows.sequence_S] = choose.differs_T.int()
        dist.all_reduce(flips_T, dist.ReduceOp.MAX, group=self.meshes.replica_group)
        return flips_T

    def _keep_routes(self, samples: Sequence[TrainSample], packs: list[_Pack], recorded: list[RecordRoutes]) -> None:
        """Put the experts of every token and sparse layer on all ranks' samples, whichever trains on them."""
        config = self.model.config
        if not config.num_sparse_layers:
            return
        blocks: Any = self.model.model.layers.values()
        here = [block.moe_index for block in blocks if isinstance(block.mlp, MoE)]
        found = []
        for pack, records in zip(packs, recorded, strict=True):
            shape = (pack.rows.num_rows, config.num_sparse_layers, config.num_experts_per_tok)
            routes_TLK = torch.full(shape, -1, device=self.device)
            for moe_index, chosen_SK in zip(here, records.layers, strict=True):
                routes_TLK[pack.rows.sequence_S, moe_index] = chosen_SK
            dist.all_reduce(routes_TLK, dist.ReduceOp.MAX, group=self.meshes.replica_group)
            if self._speaks:
                per_sample = routes_TLK.to(torch.int16).cpu().split(pack.rows.lengths)
                found += list(zip(pack.members, per_sample, strict=False))
        for index, routes in self._everybodys(found):
            samples[index].routed_experts = routes.numpy()

    def _everybodys(self, found: list[Any]) -> list[Any]:
        """What the speakers of all data-parallel places have found."""
        parts: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, found)
        return [item for part in parts for item in part]
