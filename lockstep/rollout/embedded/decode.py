"""A decoding step of the shared model: one token for each row of a batch, with nothing that the host must wait for.

B rows of a batch, M blocks of a table, L sparse layers, S experts per token, V vocabulary; N query heads, K key/value
heads, H head dim; of the delta rule: V value heads, J value head dim, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.kernels.causal_conv import causal_conv_step
from lockstep.kernels.decode_experts import MOST_TOKENS, decode_experts
from lockstep.kernels.decode_linears import linears, swiglu_linear
from lockstep.kernels.experts import grouped_experts
from lockstep.kernels.gated_delta_rule import gated_delta_step
from lockstep.kernels.paged_attention import norm_rotate_store, paged_decode, store_kv
from lockstep.kernels.sample import sample_tokens
from lockstep.models import LanguageModel
from lockstep.models.layers.attention import Attention
from lockstep.models.layers.block import Block
from lockstep.models.layers.mixer import NormsAndAttends
from lockstep.models.layers.mlp import GatedMLP
from lockstep.models.layers.moe import Experts, RecordRoutesAtOnce, Router
from lockstep.models.layers.norm import RMSNorm
from lockstep.rollout.embedded.caches import Caches
from lockstep.rollout.embedded.decode_state import DecodeState
from lockstep.rollout.embedded.sampler import stream_uniform


class CachedRows(NormsAndAttends):
    """`TokenMixer` over one new token of each row."""

    def __init__(self, caches: Caches, state: DecodeState, rows_B: Tensor, positions_B: Tensor) -> None:
        self.caches = caches
        is_real_B = rows_B != state.spare
        self.block_tables_BM = state.block_tables_RM.index_select(0, rows_B)
        blocks_B = self.block_tables_BM.gather(1, (positions_B // state.block_size)[:, None]).squeeze(1)
        slots_B = blocks_B.long() * state.block_size + positions_B % state.block_size
        self.slots_B = slots_B.where(is_real_B, -1)
        self.lengths_B = (positions_B + 1).where(is_real_B, 0).int()
        self.state_slots_B = state.state_slots_R.index_select(0, rows_B)

    def attend(self, attention_index: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        cache = self.caches.kv[attention_index]
        store_kv(k_TKH, v_TKH, cache, self.slots_B)
        return paged_decode(q_TNH, cache, self.block_tables_BM, self.lengths_B)

    def norm_and_attend(
        self,
        attention_index: int,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        norms: tuple[RMSNorm, RMSNorm],
        rotary: tuple[Tensor, Tensor],
    ) -> Tensor:
        cache, (q_norm, k_norm) = self.caches.kv[attention_index], norms
        weights, eps, offset = (q_norm.weight, k_norm.weight), q_norm.eps, q_norm.weight_offset
        q_TNH = norm_rotate_store(q_TNH, k_TKH, v_TKH, *weights, eps, offset, rotary, cache, self.slots_B)
        return paged_decode(q_TNH, cache, self.block_tables_BM, self.lengths_B)

    def convolve(self, delta_index: int, x_TC: Tensor, weight_CW: Tensor) -> Tensor:
        return causal_conv_step(x_TC, weight_CW, self.caches.conv[delta_index], self.state_slots_B)

    def delta_rule(
        self, delta_index: int, q_TKH: Tensor, k_TKH: Tensor, v_TVJ: Tensor, log_decay_TV: Tensor, beta_TV: Tensor
    ) -> Tensor:
        pool = self.caches.delta[delta_index]
        return gated_delta_step(q_TKH, k_TKH, v_TVJ, log_decay_TV, beta_TV, pool, self.state_slots_B)


class DecodeStep:
    """The step for batches of one size. It may be captured as two graphs: up to the logits, and sampling.

    Their tensors stay where they are: the next replay writes over what this one left in them.

    Args:
        pool: of graphs' memory; None captures nothing.
    """

    def __init__(self, model: LanguageModel, caches: Caches, state: DecodeState, size: int, pool: Any) -> None:
        self.model, self.caches, self.state = model, caches, state
        self.rows_B = torch.full((size,), state.spare, dtype=torch.int64, device=state.device)
        self.logits_BV = torch.empty(0)
        self.routes_BLS: Tensor | None = None
        self.tokens_B = self.log_probs_B = torch.empty(0)
        self._graphs: list[torch.cuda.CUDAGraph] = []
        if pool is not None:
            self._capture(pool)

    def compute(self) -> None:
        """From the rows' newest tokens to logits and routes; keys, values and states are in the caches then."""
        if self._graphs:
            self._graphs[0].replay()
        else:
            with self._computing():
                self._compute()

    def sample(self) -> None:
        """Draw the tokens of rows from which nothing is cut, and feed them back."""
        if self._graphs:
            self._graphs[1].replay()
        else:
            self._sample()

    def feed_back(self, tokens_B: Tensor) -> None:
        """Make these the newest tokens of the first rows."""
        state, rows_B = self.state, self.rows_B[: len(tokens_B)]
        positions_B = state.positions_R.index_select(0, rows_B) + 1
        state.positions_R.index_copy_(0, rows_B, positions_B.where(rows_B != state.spare, 0))
        state.tokens_R.index_copy_(0, rows_B, tokens_B)

    def uniforms(self) -> Tensor:
        """The random numbers of the tokens that come, `[B]`."""
        state = self.state
        positions_B = state.positions_R.index_select(0, self.rows_B) + 1
        return stream_uniform(state.keys_R.index_select(0, self.rows_B), positions_B)

    def _computing(self) -> AbstractContextManager[None]:
        return computing_few_rows(self.model, len(self.rows_B))

    def _compute(self) -> None:
        state, model = self.state, self.model
        positions_B = state.positions_R.index_select(0, self.rows_B)
        mixer = CachedRows(self.caches, state, self.rows_B, positions_B)
        routes = RecordRoutesAtOnce()
        # None of the parts is called as a module: that would run hooks which wait for updates, and no graph holds that.
        x_BD, update_BD = model.model.embed_tokens.forward(state.tokens_R.index_select(0, self.rows_B)), None
        rotary = model.rotary(positions_B)
        for block in model.model.layers.values():
            assert isinstance(block, Block)
            x_BD, update_BD = block.update(x_BD, update_BD, rotary, mixer, routes)
        hidden_BD = model.model.norm.with_residual(x_BD, update_BD)[1]
        self.logits_BV = linears(hidden_BD, [model.lm_head.weight])[0]
        if routes.layers:
            self.routes_BLS = routes.stacked().to(torch.int16)

    def _sample(self) -> None:
        temperatures_B = self.state.temperatures_R.index_select(0, self.rows_B)
        self.tokens_B, self.log_probs_B = sample_tokens(self.logits_BV, temperatures_B, self.uniforms())
        self.feed_back(self.tokens_B)

    def _capture(self, pool: Any) -> None:
        """Run once on spare rows, so that kernels are compiled, then record."""
        with self._computing():
            self._compute()
            self._sample()
            torch.cuda.current_stream().synchronize()
            for part in (self._compute, self._sample):
                graph = torch.cuda.CUDAGraph()
                # Other threads of the process may use the GPU meanwhile.
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    part()
                self._graphs.append(graph)


class DecodeSteps:
    """The steps of all batch sizes, each made when it is needed for the first time.

    Args:
        sizes: of batches that get a step of their own; a batch is padded to the next one. A larger batch is computed
            as it is, without a graph.
        captures: steps become graphs.
        step: how a step computes.
    """

    def __init__(
        self,
        model: LanguageModel,
        caches: Caches,
        state: DecodeState,
        sizes: list[int],
        *,
        captures: bool,
        step: type[DecodeStep] = DecodeStep,
    ) -> None:
        self._step_class = step
        self.model, self.caches, self.state = model, caches, state
        self.sizes = sorted(size for size in sizes if size <= state.spare)
        self._steps: dict[int, DecodeStep] = {}
        self._made_for: tuple[int, ...] = ()
        self._pool = torch.cuda.graph_pool_handle() if captures else None

    def for_rows(self, count: int) -> DecodeStep:
        size = next((size for size in self.sizes if size >= count), None)
        if size is None:
            return self._step_class(self.model, self.caches, self.state, count, None)
        if size not in self._steps:
            self._steps[size] = self._step_class(self.model, self.caches, self.state, size, self._pool)
        return self._steps[size]

    def have_moved(self) -> bool:
        """Whether tensors lie elsewhere than those of what was captured: wider block tables, other weights."""
        return self._addresses() != self._made_for

    def forget(self) -> None:
        """Drop what was captured: from now on it is made for the addresses of today."""
        if self._pool is not None:
            torch.cuda.synchronize()  # the last step may be running
            self._pool = torch.cuda.graph_pool_handle()  # the old pool ends with its last graph
        self._steps.clear()
        self._made_for = self._addresses()

    def _addresses(self) -> tuple[int, ...]:
        return (self.state.block_tables_RM.data_ptr(), *(p.data_ptr() for p in self.model.parameters()))


def default_sizes(most: int) -> list[int]:
    """Every size up to 8, then steps of about an eighth: padding costs little, and capturing takes time and memory."""
    sizes = [*range(1, 9), *range(16, 65, 8), *range(80, 257, 16), *range(288, most, 32)]
    return [size for size in sizes if size < most] + [most]


@contextmanager
def computing_few_rows(model: LanguageModel, count: int) -> Iterator[None]:
    """Let experts and linear layers compute as they do best for so many rows."""
    replaced: list[tuple[Any, str, Any]] = []
    for module in model.model.layers.modules():
        if isinstance(module, Experts) and count <= MOST_TOKENS and module.compute is grouped_experts:
            replaced.append((module, "compute", decode_experts))
        elif isinstance(module, Attention) and _is_plain(module.q_proj):
            weights = [module.q_proj.weight, module.k_proj.weight, module.v_proj.weight]
            replaced.append((module, "project", partial(linears, weights=weights)))
        elif isinstance(module, GatedMLP):
            gate, up = module.gate_proj.weight, module.up_proj.weight
            replaced.append((module, "activate", partial(swiglu_linear, gate_ID=gate, up_ID=up)))
        elif count == 1 and isinstance(module, Router):
            replaced.append((module, "logits", partial(_linear, weight=module.weight)))
        elif count == 1 and _is_plain(module):
            replaced.append((module, "forward", partial(_linear, weight=module.weight)))
    before = [vars(module).get(name) for module, name, _ in replaced]
    for module, name, function in replaced:
        vars(module)[name] = function
    try:
        yield
    finally:
        for (module, name, _), own in zip(replaced, before, strict=True):
            if own is None:
                del vars(module)[name]
            else:
                vars(module)[name] = own


def _is_plain(module: nn.Module) -> bool:
    """Whether it is a matrix and nothing else."""
    return type(module) is nn.Linear and [name for name, _ in module.named_parameters()] == ["weight"]


def _linear(x_TD: Tensor, weight: Any) -> Tensor:
    return linears(x_TD, [weight])[0]
