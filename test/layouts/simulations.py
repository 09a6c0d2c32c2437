"""Stand-ins, exact and slow, for what only GPUs have: each takes a path through the model that a CPU would not.

They are put in place in the test's own process and reach the ranks through the fork. What a test shows with one of
these is that the model does its part on that path; the real kernel's numbers are not what is tested.
"""

from __future__ import annotations

import collections
import sys
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from sglang.srt.batch_overlap import two_batch_overlap
from sglang.srt.distributed import attention_tensor_model_parallel_all_reduce, get_tp_group
from sglang.srt.eplb.expert_location_dispatch import topk_ids_logical_to_physical
from sglang.srt.layers import (
    communicator,
    flashinfer_comm_fusion,
    minimax_attention_inputs,
    minimax_expert_kernels,
    minimax_experts,
    minimax_experts_prefill,
    minimax_fp8_linear,
    minimax_layer_communicator,
    minimax_prefill_attention,
    minimax_prefill_graphs,
    minimax_router,
)
from sglang.srt.layers.dp_attention import is_dp_attention_enabled
from sglang.srt.layers.minimax_all_reduce_norm import AllReduceNorm
from sglang.srt.layers.minimax_parts import Parts
from sglang.srt.layers.moe import fused_moe_native
from sglang.srt.layers.moe.fused_moe_triton import layer as fused_moe
from sglang.srt.layers.moe.token_dispatcher.base import BaseDispatcher
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput, StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput, TopK
from sglang.srt.layers.quantization import fp8
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.models import minimax_m2, minimax_m2_moe, minimax_m2_overlap


def fused_all_reduce(monkeypatch) -> None:
    """FlashInfer's all-reduce + residual + RMSNorm as three steps in float32, wherever the engine would use it."""

    def fused(input_tensor, residual, weight, eps, use_attn_tp_group=True, **_):
        assert use_attn_tp_group
        total = attention_tensor_model_parallel_all_reduce(input_tensor).float() + residual.float()
        normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * weight.float()
        return normed.to(input_tensor.dtype), total.to(residual.dtype)

    monkeypatch.setattr(
        communicator, "apply_flashinfer_allreduce_fusion", lambda tokens: tokens > 0 and not is_dp_attention_enabled()
    )
    monkeypatch.setattr(flashinfer_comm_fusion, "flashinfer_allreduce_residual_rmsnorm", fused)


ONE_LAUNCH_UP_TO = 8  # tokens: fewer than a chunk of a prompt, more than a batch of decodes


def all_reduce_norm(monkeypatch) -> None:
    """Our one launch of all-reduce + residual add + RMSNorm, by that operator's plain torch and a real all-reduce.

    It is taken up to a few tokens only, so that both ways are in one run.
    """

    def reason_against(norm) -> str | None:
        return "one rank" if get_tp_group().world_size == 1 else None

    monkeypatch.setattr(minimax_layer_communicator, "reason_against", reason_against)
    monkeypatch.setattr(
        minimax_layer_communicator, "build", lambda group, norm: AllReduceNorm(group, None, ONE_LAUNCH_UP_TO)
    )


def all_reduce_norm_of_parts(monkeypatch) -> None:
    """:func:`all_reduce_norm`, to which attention and experts leave parts, of which some are another rank's."""
    all_reduce_norm(monkeypatch)

    class InParts(minimax_fp8_linear.Fp8Linear):
        def __init__(self, linear) -> None:
            self.linear = linear

        def __call__(self, x):
            return self.linear(x)[0]

        def in_parts(self, x):
            return _parts_of_a_product(self(x))

    def run_experts(experts, hidden_states, topk_output, in_parts=False):
        whole = experts(hidden_states, topk_output)
        return _parts_of_experts(whole) if in_parts else whole

    monkeypatch.setattr(minimax_m2, "choose_projection", lambda owner, name: InParts(getattr(owner, name)))
    monkeypatch.setattr(minimax_m2_moe, "choose_expert_kernels", lambda experts: run_experts)


def _parts_of_a_product(whole: torch.Tensor) -> Parts:
    return Parts(torch.stack([0.25 * whole, 0.75 * whole]), dtype=whole.dtype)


def _parts_of_experts(whole: torch.Tensor) -> Parts:
    """Another rank's expert left the second of two, which was never written."""
    values = torch.stack([whole, torch.full_like(whole, torch.nan)])
    ids = torch.tensor([7, 8], dtype=torch.int32).expand(len(whole), 2)
    return Parts(values, ids, first_expert=6, experts=2, dtype=whole.dtype)


def token_exchange(monkeypatch) -> None:
    """An a2a backend: asked for as ``moe_a2a_backend="customized"``, which the engine has a name for and no code."""
    monkeypatch.setattr(fused_moe, "create_moe_dispatcher", TokenExchange)
    forward_native = TopK.forward_native

    def route(self, hidden_states, router_logits, *, num_token_non_padded=None, expert_location_dispatch_info=None):
        """A real backend does not send padding. The engine's top-k in plain torch cannot mark it: here it travels.

        Nor does it name the places of experts that lie elsewhere or more than once; the engine's own function does.
        """
        output = forward_native(self, hidden_states, router_logits)
        return output._replace(topk_ids=topk_ids_logical_to_physical(output.topk_ids, expert_location_dispatch_info))

    monkeypatch.setattr(TopK, "forward_native", route)


def fp4_all_gather(monkeypatch) -> None:
    """The FP4 all-gather's path with tokens that are gathered as they are, not quantised."""
    for module in (communicator, minimax_m2_moe):
        monkeypatch.setattr(module, "should_use_flashinfer_cutlass_moe_fp4_allgather", lambda: True)
    token_exchange(monkeypatch)


def stages_in_order(monkeypatch) -> None:
    """Every layer as the stages of two-batch overlap, one after the other, with the whole batch as the only half."""

    def forward_layers(self, positions, hidden_states, forward_batch, residual, captured):
        forward_batch.tbo_padded_len = len(positions)  # which the engine sets for real halves only
        layers = self.layers[self.start_layer : self.end_layer]
        return two_batch_overlap._model_forward_non_tbo(
            inputs=minimax_m2_overlap.first_inputs(positions, hidden_states, forward_batch, residual),
            operations_strategy=minimax_m2_overlap.stages_of(layers, forward_batch.forward_mode),
        )

    monkeypatch.setattr(minimax_m2.MiniMaxM2Model, "_forward_layers", forward_layers)


def exchange_in_order(monkeypatch) -> None:
    """:func:`token_exchange` through the stages of :func:`stages_in_order`."""
    token_exchange(monkeypatch)
    stages_in_order(monkeypatch)


def one_kernel(monkeypatch) -> None:
    """QK norm, RoPE and KV store as where one kernel does all three, by that operator's plain torch.

    What would run otherwise fails: the norm of its own and the store by attention.
    """

    def unexpected(*args, **kwargs):
        raise AssertionError("a norm or a store of its own was run where one kernel does both")

    monkeypatch.setattr(minimax_attention_inputs, "reason_against_one_kernel", lambda **_: None)
    monkeypatch.setattr(minimax_m2.MiniMaxM2RMSNormTP, "forward_qk", unexpected)
    monkeypatch.setattr(MHATokenToKVPool, "set_kv_buffer", unexpected)


def route_at_once(monkeypatch) -> None:
    """Logits and chosen experts as where the router's kernels give both, by that operator's plain torch."""

    def unexpected(*args, **kwargs):
        raise AssertionError("experts were chosen by TopK where the router's kernels do it")

    monkeypatch.setattr(minimax_m2_moe, "choose_route", lambda gate, topk: minimax_router.fused_route)
    monkeypatch.setattr(minimax_router, "minimax_route", minimax_router.route_reference)
    monkeypatch.setattr(TopK, "forward_native", unexpected)


def fp8_in_plain_torch(monkeypatch) -> None:
    """Weights in FP8 blocks, as the engine loaded them, times their scales: then float32 like any others.

    The engine's own FP8 products need a GPU, or AMX. Which part of weight and scales a rank holds is as it would be.
    """
    monkeypatch.setattr(fp8.Fp8Config, "get_supported_act_dtypes", classmethod(lambda cls: [torch.float32]))
    monkeypatch.setattr(fp8.Fp8LinearMethod, "process_weights_after_loading", lambda self, layer: _expand(layer, ""))
    monkeypatch.setattr(
        fp8.Fp8LinearMethod, "apply", lambda self, layer, x, bias=None: torch.nn.functional.linear(x, layer.weight)
    )

    def expand_experts(self, layer) -> None:
        _expand(layer, "w13_")
        _expand(layer, "w2_")

    def apply(self, layer, dispatch_output):
        output = fused_moe_native.moe_forward_native(
            layer, dispatch_output.hidden_states, dispatch_output.topk_output, layer.moe_runner_config
        )
        return StandardCombineInput(hidden_states=output)

    monkeypatch.setattr(fp8.Fp8MoEMethod, "process_weights_after_loading", expand_experts)
    monkeypatch.setattr(fp8.Fp8MoEMethod, "apply", apply)


def fp8_kernels(monkeypatch) -> None:
    """As where projections, router and experts take their FP8 kernels: their choices and operators, and the weights as
    they were loaded. What they launch is plain torch, in float32 and without rounding; so is what the engine would."""
    monkeypatch.setattr(fp8.Fp8Config, "get_supported_act_dtypes", classmethod(lambda cls: [torch.float32]))
    for method in (fp8.Fp8LinearMethod, fp8.Fp8MoEMethod):
        monkeypatch.setattr(method, "process_weights_after_loading", lambda self, layer: None)

    def linear(x, weight, scale, plan=None, in_parts=False):
        whole = torch.nn.functional.linear(x, _expanded(weight, scale))
        return _parts_of_a_product(whole) if in_parts else whole

    monkeypatch.setattr(minimax_fp8_linear, "reason_against_server", lambda: None)
    monkeypatch.setattr(minimax_fp8_linear, "fp8_linear", linear)
    monkeypatch.setattr(
        fp8.Fp8LinearMethod, "apply", lambda self, layer, x, bias=None: linear(x, layer.weight, layer.weight_scale_inv)
    )

    def choose(partials, bias, top_k, warps):
        eye = torch.eye(partials.shape[2])
        return minimax_router.route_reference(partials.sum(0), eye, bias, top_k)

    monkeypatch.setattr(minimax_router, "reason_against_logits", lambda gate: None)
    monkeypatch.setattr(minimax_router, "partial_logits", lambda x, weight, plan: (x @ weight.T)[None])
    monkeypatch.setattr(minimax_router, "choose_experts", choose)

    def experts(plan, *arguments, in_parts=False):
        whole = minimax_experts.experts_reference(*arguments).float()
        return _parts_of_experts(whole) if in_parts else whole

    def apply(self, layer, dispatch_output):
        weights = layer.w13_weight, layer.w13_weight_scale_inv, layer.w2_weight, layer.w2_weight_scale_inv
        routing = dispatch_output.topk_output
        output = experts(None, dispatch_output.hidden_states, routing.topk_weights, routing.topk_ids, *weights, 0)
        return StandardCombineInput(hidden_states=output)

    monkeypatch.setattr(minimax_expert_kernels, "reason_against_plans", lambda experts: None)
    for module in (minimax_experts, minimax_expert_kernels):
        monkeypatch.setattr(module, "run_plan", experts)
    monkeypatch.setattr(minimax_experts_prefill, "_one_pass", lambda *arguments: experts(None, *arguments, 0))
    monkeypatch.setattr(fp8.Fp8MoEMethod, "apply", apply)


operators_compiled: collections.Counter = collections.Counter()
"""How often the graphs that were compiled in this process call each operator of the engine's and ours."""


def piecewise_graphs(monkeypatch) -> None:
    """The engine's piecewise CUDA graphs, whose pieces run as they are and are never captured."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # as a host without a GPU is set up
    monkeypatch.setattr(torch._dynamo.config, "disable", False, raising=False)  # undone, it is gone for the next test
    without_cuda = ModuleType("weak_ref_tensor")
    without_cuda.weak_ref_tensors = lambda tensors: tensors
    monkeypatch.setitem(sys.modules, "sglang.srt.compilation.weak_ref_tensor", without_cuda)
    from sglang.srt.compilation import backend, cuda_piecewise_backend
    from sglang.srt.model_executor.piecewise_cuda_graph_runner import PiecewiseCudaGraphRunner

    monkeypatch.setattr(cuda_piecewise_backend, "is_in_pcg_torch_compile", lambda: True)
    monkeypatch.setattr(PiecewiseCudaGraphRunner, "capture", lambda self: None)
    monkeypatch.setattr(torch.cpu, "graph_pool_handle", lambda: (0, 0), raising=False)
    split = backend.split_graph

    def counted(graph, ops):
        called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        operators_compiled.update(name.removeprefix("sglang.") for name in called if name.startswith("sglang."))
        return split(graph, ops)

    monkeypatch.setattr(backend, "split_graph", counted)


def prefill_graphs(monkeypatch) -> None:
    """With :func:`piecewise_graphs` and :func:`prefill_attention`: short prefills have a graph each, of which a replay
    runs the layers again.

    The engine captures its sizes as it would; only a batch's description tells its requests, as in a graph."""
    from sglang.srt.compilation import piecewise_context_manager
    from sglang.srt.model_executor.piecewise_cuda_graph_runner import PiecewiseCudaGraphRunner

    def capture(runner) -> None:
        with piecewise_context_manager.set_pcg_capture_stream("a stream"):
            for num_tokens in reversed(runner.capture_num_tokens):
                runner.capture_one_batch_size(num_tokens)

    def captured(run):
        output = run().clone()
        return lambda: output.copy_(run()), output

    monkeypatch.setattr(PiecewiseCudaGraphRunner, "capture", capture)
    monkeypatch.setattr(minimax_prefill_graphs, "reason_against", lambda model: None)
    monkeypatch.setattr(minimax_prefill_graphs, "captured", captured)


def prefill_attention(monkeypatch) -> None:
    """Attention of prefills as on a GPU with Triton's backend, by plain torch over a batch's description."""

    def fill(batch, lengths, totals, rows, tokens) -> None:
        requests, batch.tokens = len(lengths), tokens
        batch.table[:] = torch.tensor([[tokens], [-tokens], [0]])
        batch.table[0, : requests + 1] = torch.tensor([0, *lengths.cumsum(0)])
        batch.table[1, :requests], batch.table[2, :requests] = totals - lengths, rows

    def attend(q, k_cache, v_cache, batch, plan=None) -> torch.Tensor:
        out = torch.zeros_like(q)
        starts, cached, rows = batch.table.tolist()
        kv_heads, head_dim = k_cache.shape[1:]
        for begin, end, before, row in zip(starts, starts[1:], cached, rows, strict=False):
            new, own = end - begin, batch.slots[row, : max(0, before + end - begin)].long()
            if not len(own):
                continue
            k, v = (cache[own].transpose(0, 1)[:, None] for cache in (k_cache, v_cache))
            heads = q[begin:end].view(new, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
            sees = torch.ones(new, len(own), dtype=torch.bool).tril(before)
            attended = torch.nn.functional.scaled_dot_product_attention(heads, k, v, attn_mask=sees)
            out[begin:end] = attended.permute(2, 0, 1, 3).reshape(new, -1)
        return out

    for reason in ("reason_against_layer", "reason_against_server", "reason_against_backend"):
        monkeypatch.setattr(minimax_prefill_attention, reason, lambda *_: None)
    monkeypatch.setattr(minimax_prefill_attention.PrefillBatch, "fill", fill)
    monkeypatch.setattr(minimax_prefill_attention, "prefill_attention", attend)


class Prefill(NamedTuple):
    """Its tokens with their padding, its requests and the longest of them with what is cached, whether it was a graph
    of its own, and how many layers' attention was a launch of ours beside graphs."""

    tokens: int
    requests: int
    longest: int
    is_graph: bool
    launches: int


def watch_prefills(runner):
    """A probe: which ways this rank's prefills took."""
    found: list[Prefill] = []
    replays, launches = [], []
    run_model, replay = minimax_m2.run_model, minimax_prefill_graphs.PrefillGraphs.__call__
    attend = minimax_prefill_attention.prefill_attention

    def counted_replay(self, *arguments):
        before = len(launches)
        output = replay(self, *arguments)
        if output is not None:
            replays.append(1)
            del launches[before:]  # of the layers, which a graph would have
        return output

    def counted_attention(*arguments):
        launches.append(1)
        return attend(*arguments)

    def watched(whole, input_ids, positions, forward_batch, *rest):
        before = len(replays), len(launches)
        output = run_model(whole, input_ids, positions, forward_batch, *rest)
        if forward_batch.forward_mode.is_extend():
            longest, requests = int(forward_batch.seq_lens_cpu.max()), forward_batch.batch_size
            is_graph = len(replays) > before[0]
            found.append(Prefill(len(input_ids), requests, longest, is_graph, len(launches) - before[1]))
        return output

    minimax_m2.run_model = watched
    minimax_prefill_graphs.PrefillGraphs.__call__ = counted_replay
    minimax_prefill_attention.prefill_attention = counted_attention
    return lambda: found


def _expanded(weight: torch.Tensor, scales: torch.Tensor, block: int = 128) -> torch.Tensor:
    """A weight of [..., rows, columns] times its scales of [..., row blocks, column blocks], float32."""
    spread = scales.float().repeat_interleave(block, dim=-2).repeat_interleave(block, dim=-1)
    return weight.float() * spread[..., : weight.shape[-2], : weight.shape[-1]]


def _expand(layer, prefix: str) -> None:
    """Multiplies a weight of [..., rows, columns] by its scales of [..., row blocks, column blocks], in place."""
    weight, scales = getattr(layer, prefix + "weight"), getattr(layer, prefix + "weight_scale_inv")
    assert weight.dtype == torch.float8_e4m3fn, f"{prefix}weight was loaded as {weight.dtype}"
    setattr(layer, prefix + "weight", torch.nn.Parameter(_expanded(weight, scales), requires_grad=False))


class TokenExchange(BaseDispatcher):
    """Every rank gets every rank's tokens, computes its own experts' part, and gives each rank its tokens' sum."""

    def __init__(self, config) -> None:
        super().__init__()
        group = get_tp_group()
        self.rank, self.ranks, self.group = group.rank_in_group, group.world_size, group.cpu_group
        first = self.rank * config.num_local_experts
        self.own = torch.full((config.num_experts,), -1)
        self.own[first : first + config.num_local_experts] = torch.arange(config.num_local_experts)
        self.sizes: dict[int, list[int]] = {}
        self.pending: dict[int, object] = {}

    def dispatch(self, hidden_states, topk_output) -> StandardDispatchOutput:
        self.dispatch_a(hidden_states, topk_output)
        return self.dispatch_b()

    def combine(self, combine_input) -> torch.Tensor:
        self.combine_a(combine_input)
        return self.combine_b()

    def dispatch_a(self, hidden_states, topk_output, tbo_subbatch_index=None) -> None:
        half = tbo_subbatch_index or 0
        sent: list = [None] * self.ranks
        mine = hidden_states.shape[0], topk_output.topk_ids.dtype, topk_output.topk_weights.dtype
        dist.all_gather_object(sent, mine, group=self.group)
        assert len({one[1:] for one in sent}) == 1, (
            f"ranks send routes of different dtypes, which NCCL takes for other numbers: {sent}"
        )
        self.sizes[half] = sizes = [one[0] for one in sent]
        gathered = [self._gather(part, sizes) for part in (hidden_states, topk_output.topk_weights)]
        ids = self.own[self._gather(topk_output.topk_ids.long(), sizes)]
        self.pending[half] = StandardDispatchOutput(
            gathered[0], None, StandardTopKOutput(gathered[1], ids.int(), topk_output.router_logits)
        )

    def dispatch_b(self, tbo_subbatch_index=None) -> StandardDispatchOutput:
        return self.pending.pop(tbo_subbatch_index or 0)

    def combine_a(self, combine_input: StandardCombineInput, tbo_subbatch_index=None) -> None:
        half = tbo_subbatch_index or 0
        total = combine_input.hidden_states.clone()
        dist.all_reduce(total, group=self.group)
        start = sum(self.sizes[half][: self.rank])
        self.pending[half] = total[start : start + self.sizes[half][self.rank]].clone()

    def combine_b(self, tbo_subbatch_index=None) -> torch.Tensor:
        return self.pending.pop(tbo_subbatch_index or 0)

    def _gather(self, part: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        parts = [part.new_empty(size, *part.shape[1:]) for size in sizes]
        for rank, received in enumerate(parts):
            if rank == self.rank:
                received.copy_(part)
            dist.broadcast(received, dist.get_global_rank(self.group, rank), group=self.group)
        return torch.cat(parts)
