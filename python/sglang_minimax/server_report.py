"""What a server that is up says of itself: one block in its log, and an entry in ``/server_info``.

Both are read from the model that was built and from the engine's own switches, asked the way that a forward pass
asks them; nothing here predicts. Which heads and experts a rank holds comes from the arithmetic that the model and
the planner share, and the words are the planner's, so that what was planned can be laid beside what runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

from sglang_minimax import __version__, sharding
from sglang_minimax.adjustments import EngineModule, EngineObject
from sglang_minimax.overlay import ENGINE_VERSION
from sglang_minimax.plan import paths as planned
from sglang_minimax.plan.paths import Path
from sglang_minimax.plan.report import RankHolds, divided
from sglang_minimax.server_arguments import (
    ARCHITECTURE,
    EP_SIZE_REASON,
    is_minimax,
    logger,
    reason_of_server_against_fused_all_reduce,
)

KEY = "sglang_minimax"
"""The name of our entry in ``/server_info``, and in each of its ``internal_states``."""

BLOCK_BEGINS = f"{ARCHITECTURE} on"


# ----------------------------------------------------------------------------------------------- the layout


@dataclass(frozen=True)
class Division:
    """How the ranks of one pipeline stage divide heads and experts, and how many of each the model has."""

    q_heads: int
    kv_heads: int
    experts: sharding.ExpertShape
    tp: int
    pp: int
    ep: int
    dp_groups: int
    attention_ranks: int
    ranks: list[RankHolds]
    stages: list[range]


def division(model: EngineObject, server_args: EngineObject) -> Division:
    """The layout of a running server.

    Args:
        model: the ``MiniMaxM2ForCausalLM`` of one rank.
        server_args: the engine's, as they are in that rank.
    """
    from sglang.srt.layers.minimax_sharding import expert_shape_of

    config, args = model.config, server_args
    dp_groups = args.dp_size if args.enable_dp_attention else 1
    attention_ranks = sharding.attention_tp_size(args.tp_size, dp_groups, args.attn_cp_size)
    shards = sharding.shard_attention(config.num_attention_heads, config.num_key_value_heads, attention_ranks)
    experts = expert_shape_of(config, args.ep_num_redundant_experts)
    return Division(
        q_heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        experts=experts,
        tp=args.tp_size,
        pp=args.pp_size,
        ep=args.ep_size,
        dp_groups=dp_groups,
        attention_ranks=attention_ranks,
        ranks=divided(
            shards, experts, args.tp_size, args.ep_size, attn_cp_size=args.attn_cp_size, moe_dp_size=args.moe_dp_size
        ),
        stages=[
            sharding.pipeline_layers(config.num_hidden_layers, stage, args.pp_size) for stage in range(args.pp_size)
        ],
    )


def in_words(layout: Division) -> list[str]:
    """The layout in a few lines: ranks, heads, replicas, experts, layers, and a drawing of the ranks."""
    from sglang_minimax.plan.rendering import draw_ranks

    first = layout.ranks[0]
    q, kv, held, columns = (
        last - begin + 1 for begin, last in (first.q_heads, first.kv_heads, first.experts, first.expert_columns)
    )
    groups = f"in each of {layout.dp_groups} groups of requests" if layout.dp_groups > 1 else "for all requests"
    shared = f"each KV head is on {first.kv_replicas} ranks" if first.kv_replicas > 1 else "no KV head is replicated"
    experts = layout.experts
    lines = [
        f"ranks: TP {layout.tp}, PP {layout.pp}; attention over {_ranks(layout.attention_ranks)} {groups}",
        f"heads a rank: {q} of {layout.q_heads} q heads, {kv} of {layout.kv_heads} KV heads; {shared}",
        f"experts a rank: {held} of {experts.num_experts}, {columns} of the {experts.width} columns of each",
    ]
    if layout.pp > 1:
        ends = (f"stage {i} has {layers[0]}-{layers[-1]}" for i, layers in enumerate(layout.stages))
        lines.append(f"layers: {', '.join(ends)}")
    return [*lines, *(line for line in draw_ranks(layout.ranks) if line)]


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


# ------------------------------------------------------------------------------------------------ the paths


def chosen_paths(runner: EngineObject) -> list[Path]:
    """What the model of this rank takes, and why.

    Args:
        runner: the engine's ``ModelRunner``, its model loaded and its attention backend made.
    """
    model, args = runner.model.model, runner.server_args
    first, last = model.layers[model.start_layer], model.layers[model.end_layer - 1]
    return [
        _ep_size(args),
        qk_norm_path(first.self_attn),
        _fused_all_reduce(first, args),
        _expert_sum(first, last, args),
        *_prefill_paths(runner.model, first.self_attn, runner.model_config.dtype),
        *_kernel_paths(first, runner.model_config.dtype),
        _fp4_all_gather(args),
        _a2a_backend(),
        _attention_backend(runner),
    ]


def qk_norm_path(attention: EngineObject) -> Path:
    """How this layer norms q and k: in launches of their own, or in the one kernel that it was built with."""
    from sglang.srt.layers.minimax_attention_inputs import reason_against_fusing

    if attention.q_norm is None:
        return planned.qk_norm(None, None, None, stores=False)
    ranks, fused = attention.q_norm.shards.num_ranks, attention.fused_inputs
    node_ranks = None if attention.node is None else attention.node.world_size
    if fused is None:
        reason = reason_against_fusing(attention.q_norm, attention.rotary_emb, attention.q_norm.head_dim)
        return planned.qk_norm(ranks, reason, None, stores=False, node_ranks=node_ranks)
    return planned.qk_norm(ranks, None, fused.operator.reason_against_exchange, fused.stores, node_ranks)


def _ep_size(args: EngineObject) -> Path:
    reason = getattr(args, EP_SIZE_REASON, None)
    if args.moe_a2a_backend != "none":
        why = f"--moe-a2a-backend {args.moe_a2a_backend} takes all ranks for EP"
    elif reason is not None:
        why = f"chosen, since --ep was left out: {reason}"
    else:
        why = "as given, or left at the engine's default"
    return Path("EP", str(args.ep_size), why)


def _fused_all_reduce(layer: EngineObject, args: EngineObject) -> Path:
    return planned.fused_all_reduce(*_fused_up_to(layer), _reason_against_fused_all_reduce(args))


def _fused_up_to(layer: EngineObject) -> tuple[int | None, int | None]:
    """Tokens of one launch of the model's own, and of FlashInfer's kernel, where that is on."""
    from sglang.srt.layers import communicator

    ours = layer.layer_communicator.all_reduce_norm
    if ours is not None:
        return ours.max_tokens, None
    on = communicator.apply_flashinfer_allreduce_fusion(1)
    return None, communicator.FUSE_ALLREDUCE_MAX_BATCH_SIZE if on else None


def _reason_against_fused_all_reduce(args: EngineObject) -> str:
    from sglang.srt.layers import communicator
    from sglang.srt.utils import get_device_name

    if args.enforce_disable_flashinfer_allreduce_fusion:
        return "--enforce-disable-flashinfer-allreduce-fusion"
    reason = reason_of_server_against_fused_all_reduce(
        args,
        device_name=get_device_name() or "",
        hopper_or_blackwell=communicator._is_sm90_supported or communicator._is_sm100_supported,
    )
    if reason is None and not communicator._is_flashinfer_available:
        reason = "FlashInfer is not installed"
    return reason or "FlashInfer could not make its workspace on every rank"


def _expert_sum(first: EngineObject, last: EngineObject, args: EngineObject) -> Path:
    """Asks the model's own decision for the kinds of batches that can make it differ."""
    from sglang.srt.layers.dp_attention import DpPaddingMode
    from sglang.srt.models.minimax_m2_moe import ExpertReduction

    name = "sum over experts"
    if args.tp_size == args.moe_dp_size:
        return Path(name, "none", "one rank holds all experts")

    def who(layer: EngineObject, padding: EngineObject = DpPaddingMode.MAX_LEN, tokens: int = 1) -> str:
        batch = SimpleNamespace(
            dp_padding_mode=padding, input_ids=SimpleNamespace(shape=(tokens,)), nsa_cp_metadata=None
        )
        return {
            ExpertReduction.MODEL: f"the model's all-reduce over {args.tp_size // args.moe_dp_size} ranks",
            ExpertReduction.NEXT_NORM: "in the next layer's norm",
            ExpertReduction.REDUCE_SCATTER: "reduce-scatter",
            ExpertReduction.DISPATCHER: f"the dispatcher's {'reduce-scatter' if _a2a_is_none() else 'combine'}",
        }[ExpertReduction.of(layer.layer_communicator, batch)]

    taken = who(first)
    fused_up_to = max((tokens for tokens in _fused_up_to(first) if tokens is not None), default=1)
    others = {
        "where DP ranks are not padded to one length": who(first, DpPaddingMode.SUM_LEN),
        f"above {fused_up_to} tokens": who(first, tokens=fused_up_to + 1),
        "in the last layer": who(last),
    }
    differing = [f"{when}: {other}" for when, other in others.items() if other != taken]
    return Path(name, taken, "; ".join(differing) or "in every layer and for every batch")


def _kernel_paths(layer: EngineObject, dtype: EngineObject) -> list[Path]:
    """Which of this layer's products have kernels of the model's own, and up to how many tokens.

    Args:
        layer: a decoder layer.
        dtype: of its activations, which is the default while a layer is built.
    """
    from sglang.srt.model_loader.utils import set_default_torch_dtype

    attention, experts = layer.self_attn, layer.block_sparse_moe
    with set_default_torch_dtype(dtype):
        return [
            _projection("qkv projection", attention.project_qkv, attention.qkv_proj),
            _decode_attention(attention),
            _projection("output projection", attention.project_output, attention.o_proj),
            _router(experts),
            _expert_kernels(experts),
        ]


_ABOVE = "above that, the engine's"
_ABOVE_QUANTISED = f"{_ABOVE} product, of activations quantised by a kernel of the model's"


def _projection(name: str, projects: EngineObject, linear: EngineObject) -> Path:
    from sglang.srt.layers import minimax_fp8_linear as fp8

    reason = fp8.reason_against_server() or fp8.reason_against_layer(linear)
    if not isinstance(projects, fp8.Fp8Linear) or reason is not None:
        return Path(name, "the engine's layer", reason or "its weights were others when it was built")
    above = _ABOVE_QUANTISED if fp8.choose_product(linear) else _ABOVE
    return Path(name, f"quantised and multiplied in one kernel up to {projects.max_tokens} tokens", above)


def _decode_attention(attention: EngineObject) -> Path:
    from sglang.srt.layers import minimax_decode_attention as decode

    if attention.decode_attention is not None:
        above = "the attention backend's for more, for drafts that are verified, and for a KV cache of another dtype"
        return Path("decode attention", f"one launch of the model's up to {decode.MAX_REQUESTS} requests", above)
    attn, inputs = attention.attn, attention.fused_inputs
    is_stored = inputs is not None and inputs.stores
    reason = decode.reason_against_layer(attn.tp_q_head_num, attn.tp_k_head_num, attn.head_dim, is_stored)
    return Path("decode attention", "the attention backend's", reason or decode.reason_against_server() or "")


def _prefill_paths(whole: EngineObject, attention: EngineObject, dtype: EngineObject) -> list[Path]:
    """What attends in prefills, and whether short ones are graphs of their own.

    Args:
        whole: the model with its head.
        attention: of one of its layers.
        dtype: of its activations, which is the default while a layer is built.
    """
    from sglang.srt.layers import minimax_prefill_attention as prefill
    from sglang.srt.layers import minimax_prefill_graphs as graphs
    from sglang.srt.model_loader.utils import set_default_torch_dtype

    with set_default_torch_dtype(dtype):
        against = prefill.reason_against_layer(attention) or prefill.reason_against_server()
        against_graphs = graphs.reason_against(whole.model)
    ours = f"one launch of the model's up to {prefill.MAX_REQUESTS} requests"
    above = "the attention backend's for more, for drafts that are verified, and for a KV cache of another dtype"
    return [
        Path("prefill attention", ours, above)
        if whole.prefill_attention is not None
        else Path("prefill attention", "the attention backend's", against or prefill.reason_against_backend() or ""),
        short_prefills(whole.prefill_graphs, against_graphs),
    ]


def short_prefills(graphs: EngineObject | None, reason_against: str | None) -> Path:
    """Whether short prefills are graphs of their own, by the model's ``PrefillGraphs``, or why it has none."""
    from sglang.srt.layers.minimax_prefill_graphs import MAX_LENGTH, MAX_TOKENS

    if graphs is None or not graphs.graphs:
        return Path(
            "short prefills", "as longer ones", (reason_against if graphs is None else graphs.reason_against) or ""
        )
    taken = f"one graph up to {min(max(graphs.graphs), MAX_TOKENS)} tokens of requests up to {MAX_LENGTH}"
    return Path("short prefills", taken, "above that, pieces of graphs with attention between them")


def _router(experts: EngineObject) -> Path:
    from sglang.srt.layers import minimax_router as router

    kernels = f"two kernels up to {router.MAX_TOKENS} tokens"
    if experts.router_logits is not router.fused_router_logits:
        return Path("router", "a float32 linear layer, then TopK", router.reason_against_logits(experts.gate) or "")
    if experts.route_at_once is None:
        return Path("router", f"logits in {kernels}, then TopK", router.reason_against_route(experts.topk) or "")
    return Path("router", f"logits and choice in {kernels}", _ABOVE)


def _expert_kernels(experts: EngineObject) -> Path:
    from sglang.srt.layers import minimax_expert_kernels, minimax_experts_prefill
    from sglang.srt.layers.moe import get_moe_runner_backend

    backend = get_moe_runner_backend().value
    kind = f"{type(experts.experts).__name__}, {type(experts.experts.quant_method).__name__}"
    if experts.run_experts is minimax_expert_kernels.engine_experts:
        return Path("expert kernels", backend, kind)
    limit = minimax_expert_kernels.max_tokens(experts.experts)
    above = f"{backend} above that"
    if experts.run_experts.args[1] is minimax_experts_prefill.experts_of_many_tokens:
        above += ", on activations quantised by kernels of the model's"
    return Path("expert kernels", f"two or four of the model's up to {limit} tokens", f"{above}; {kind}")


def _fp4_all_gather(args: EngineObject) -> Path:
    from sglang.srt.layers import communicator

    if communicator.should_use_flashinfer_cutlass_moe_fp4_allgather():
        return planned.fp4_all_gather(None)
    reason = planned.reason_against_fp4_all_gather(
        nvfp4=args.quantization == "modelopt_fp4",
        dp_groups=args.dp_size if args.enable_dp_attention else 1,
        ep=args.ep_size,
        moe_runner_backend=args.moe_runner_backend,
        moe_a2a_backend=args.moe_a2a_backend,
    )
    return planned.fp4_all_gather(reason or "the engine's own switch for it is off")


def _a2a_backend() -> Path:
    from sglang.srt.layers.moe import get_moe_a2a_backend

    return planned.a2a_backend(get_moe_a2a_backend().value)


def _a2a_is_none() -> bool:
    from sglang.srt.layers.moe import get_moe_a2a_backend

    none: bool = get_moe_a2a_backend().is_none()
    return none


def _attention_backend(runner: EngineObject) -> Path:
    prefill, decode = runner.prefill_attention_backend_str, runner.decode_attention_backend_str
    taken = prefill if prefill == decode else f"{prefill} for prefill, {decode} for decode"
    return Path("attention backend", taken, f"made as {type(runner.attn_backend).__name__}")


# ------------------------------------------------------------------------------------------- what is said


def log_block(runner: EngineObject) -> str:
    """The block of the log, several lines."""
    lines = in_words(division(runner.model, runner.server_args))
    lines += [f"{path.name}: {path.taken} ({path.why})" for path in chosen_paths(runner)]
    num_ranks = runner.server_args.tp_size * runner.server_args.pp_size
    title = f"{BLOCK_BEGINS} {_ranks(num_ranks)}, by sglang-minimax {__version__}:"
    return "\n  ".join([title, *lines])


def server_info(runner: EngineObject) -> dict[str, Any]:
    """Our entry of ``/server_info``, for JSON. Ends of spans, [first, last], are both included."""
    layout = division(runner.model, runner.server_args)
    return {
        "version": __version__,
        "engine_version": ENGINE_VERSION,
        "paths": {path.name: {"taken": path.taken, "why": path.why} for path in chosen_paths(runner)},
        "ranks": [asdict(rank) for rank in layout.ranks],
    }


def speak_for_scheduler(module: EngineModule) -> None:
    """The block once the first rank is ready to serve, and our entry in each answer about a scheduler's state."""
    scheduler = module.Scheduler
    get_init_info, get_internal_state = scheduler.get_init_info, scheduler.get_internal_state

    @functools.wraps(get_init_info)
    def init_info(self: EngineObject) -> Any:
        if _is_ours(self) and not (self.tp_rank or self.pp_rank or self.dp_rank):
            logger.info("%s", log_block(self.tp_worker.model_runner))
        return get_init_info(self)

    @functools.wraps(get_internal_state)
    def internal_state(self: EngineObject, request: EngineObject) -> Any:
        answer = get_internal_state(self, request)
        if _is_ours(self):
            # A new dict: the engine answers with the attributes of its server arguments themselves.
            answer.internal_state = {**answer.internal_state, KEY: server_info(self.tp_worker.model_runner)}
        return answer

    scheduler.get_init_info, scheduler.get_internal_state = init_info, internal_state


def _is_ours(scheduler: EngineObject) -> bool:
    """Whether it serves the overlay's model, and none that SGLANG_EXTERNAL_MODEL_PACKAGE has under its name."""
    if not is_minimax(scheduler.model_config):
        return False
    from sglang.srt.models.minimax_m2 import MiniMaxM2ForCausalLM

    return isinstance(scheduler.tp_worker.model_runner.model, MiniMaxM2ForCausalLM)


def speak_over_http(module: EngineModule) -> None:
    """``/server_info``, and by it ``/get_server_info``, with our entry beside the engine's."""
    original = module.server_info
    routes = module.app.router.routes
    [at] = [i for i, route in enumerate(routes) if getattr(route, "endpoint", None) is original]

    @functools.wraps(original)
    async def with_ours() -> dict[str, Any]:
        return lifted(await original())

    module.app.get(routes[at].path)(with_ours)
    routes[at] = routes.pop()
    module.server_info = with_ours


def speak_for_engine(module: EngineModule) -> None:
    """The same for a program that uses the engine without HTTP: ``Engine.get_server_info``."""
    original: Callable[[EngineObject], dict[str, Any]] = module.Engine.get_server_info

    @functools.wraps(original)
    def with_ours(self: EngineObject) -> dict[str, Any]:
        return lifted(original(self))

    module.Engine.get_server_info = with_ours


def lifted(info: Mapping[str, Any]) -> dict[str, Any]:
    """``info`` with our entry on top as well, where the schedulers have one: that of the first that answered.

    The DP ranks' entries differ in nothing, since paths follow from what all ranks have in common.
    """
    entries = [state[KEY] for state in info["internal_states"] if KEY in state]
    return {**info, KEY: entries[0]} if entries else {**info}


ADJUSTMENTS = [
    ("sglang.srt.managers.scheduler", speak_for_scheduler),
    ("sglang.srt.entrypoints.http_server", speak_over_http),
    ("sglang.srt.entrypoints.engine", speak_for_engine),
]
