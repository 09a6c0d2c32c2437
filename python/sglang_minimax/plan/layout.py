"""The flags a person would give the server, the rules that they must keep, and the nearest ones that do."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

from sglang_minimax import sharding
from sglang_minimax.plan.hardware import GPUS_PER_NODE, Gpu
from sglang_minimax.plan.shape import NVFP4_GROUP, ModelShape
from sglang_minimax.server_arguments import check_experts_of_all_ranks, settle_ep_size

KV_CACHE_DTYPES = {"auto": None, "bf16": 2, "bfloat16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1}
"""Bytes of one value by ``--kv-cache-dtype``; None: what the checkpoint says."""

MOE_RUNNER_BACKENDS = (
    "auto", "deep_gemm", "triton", "triton_kernel", "flashinfer_trtllm", "flashinfer_trtllm_routed",
    "flashinfer_cutlass", "flashinfer_mxfp4", "flashinfer_cutedsl", "cutlass",
)  # fmt: skip
"""What the engine takes for ``--moe-runner-backend``."""

ATTENTION_BACKENDS = {
    "fa3": ("hopper",),
    "flashinfer": ("hopper", "blackwell"),
    "triton": ("hopper", "blackwell", "cdna3"),
    "trtllm_mha": ("blackwell",),
    "aiter": ("cdna3",),
}
"""Architectures of GPUs by ``--attention-backend``, as the engine has it; of its others nothing is known here."""

TRTLLM_PAGE = 64  # tokens of a page of the KV cache under trtllm_mha, where no --page-size is given
TRTLLM_WIDTH = 128  # to whose multiples the engine pads an expert's width for flashinfer_trtllm_routed

A2A_OF_DEEP_GEMM = ("deepep", "mooncake", "nixl")
"""Values of ``--moe-a2a-backend`` behind which the engine has DeepGEMM's kernels alone."""


@dataclass(frozen=True)
class Flags:
    """What one would give the server, under the names of its flags; None where the engine is left to choose."""

    tp: int = 1
    dp: int = 1
    enable_dp_attention: bool = False
    ep: int | None = None
    pp: int = 1
    nnodes: int = 1
    kv_cache_dtype: str = "auto"
    mem_fraction_static: float | None = None
    context_length: int | None = None
    quantization: str | None = None
    moe_runner_backend: str = "auto"
    attention_backend: str | None = None
    moe_a2a_backend: str = "none"
    attn_cp_size: int = 1
    moe_dp_size: int = 1

    def words(self) -> list[str]:
        """The flags as given to the server, without those that say what the engine does anyway."""
        words = ["--tp", str(self.tp)]
        for flag, value, default in (
            ("--dp", self.dp, 1),
            ("--ep", self.ep, None),
            ("--pp-size", self.pp, 1),
            ("--attn-cp-size", self.attn_cp_size, 1),
            ("--moe-dp-size", self.moe_dp_size, 1),
            ("--nnodes", self.nnodes, 1),
            ("--quantization", self.quantization, None),
            ("--kv-cache-dtype", self.kv_cache_dtype, "auto"),
            ("--mem-fraction-static", self.mem_fraction_static, None),
            ("--context-length", self.context_length, None),
            ("--moe-runner-backend", self.moe_runner_backend, "auto"),
            ("--moe-a2a-backend", self.moe_a2a_backend, "none"),
            ("--attention-backend", self.attention_backend, None),
        ):
            if value != default:
                words += [flag, str(value)]
        return [*words, "--enable-dp-attention"] if self.enable_dp_attention else words


@dataclass(frozen=True)
class Layout:
    """Flags as the engine settles them, with the numbers that follow. Made by :func:`settle`.

    ep: the EP size in force; ``ep_chosen_because`` says why, where it is not the one given, or 1 by default.
    attention_ranks: ranks of one attention-TP group.
    dp_groups: groups of requests inside one server of ``tp * pp`` ranks: DP ranks under DP attention, else 1.
    servers: copies of the whole model that one command starts: ``--dp`` without DP attention.
    """

    flags: Flags
    ep: int
    ep_chosen_because: str | None
    attention_ranks: int
    dp_groups: int
    servers: int

    @property
    def tp(self) -> int:
        return self.flags.tp

    @property
    def pp(self) -> int:
        return self.flags.pp

    @property
    def gpus(self) -> int:
        return self.tp * self.pp * self.servers

    @property
    def expert_ranks(self) -> int:
        """Ranks that divide one expert's width."""
        return self.tp // (self.ep * self.flags.moe_dp_size)

    @property
    def vocabulary_ranks(self) -> int:
        """Ranks that divide the embedding; the head is always divided over all of TP."""
        return self.attention_ranks if self.dp_groups > 1 else self.tp

    @property
    def tp_ranks_per_node(self) -> int:
        """Ranks of one TP group that share a node."""
        return sharding.tp_ranks_per_node(self.tp, self.pp, self.flags.nnodes)


def reason_against_counterpart(layout: Layout, model: ModelShape) -> str | None:
    """Why the sums of QK norm go over the network between nodes, or None where each rank also projects the q and k of a
    rank of the other node. Only for attention TP over several nodes."""
    kv = sharding.shard_attention(model.num_attention_heads, model.num_key_value_heads, layout.attention_ranks).kv
    quantisation = model.quantisation
    return sharding.reason_against_counterpart(
        layout.attention_ranks,
        layout.tp_ranks_per_node,
        kv.replicas,
        loads_alike=quantisation.kind in ("none", "fp8") or not quantisation.attention,
    )


def has_counterpart(layout: Layout, model: ModelShape) -> bool:
    """Whether a rank holds the q and k rows of a rank of the other node too."""
    over_nodes = model.use_qk_norm and layout.attention_ranks > layout.tp_ranks_per_node
    return over_nodes and reason_against_counterpart(layout, model) is None


def settle(flags: Flags, model: ModelShape, gpu: Gpu) -> Layout:
    """The layout that the engine makes of ``flags``.

    Raises:
        ValueError: the first rule that fails, as a sentence. Memory is not looked at here.
    """
    for name in ("tp", "dp", "ep", "pp", "nnodes", "attn_cp_size", "moe_dp_size"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise ValueError(f"--{'pp-size' if name == 'pp' else name.replace('_', '-')} {value} must be at least 1")
    dp_groups = flags.dp if flags.enable_dp_attention else 1
    attention_ranks = sharding.attention_tp_size(flags.tp, dp_groups, flags.attn_cp_size)
    if flags.attn_cp_size > 1:
        sharding.attention_tp_size(flags.tp, flags.dp, flags.attn_cp_size)  # as the engine asks of copies too
    against_context = sharding.reason_against_context_parallelism(dp_groups, flags.attn_cp_size)
    if against_context is not None:
        raise ValueError(against_context)
    sharding.shard_attention(model.num_attention_heads, model.num_key_value_heads, attention_ranks)
    ep, why = _settle_ep(flags, model)
    sharding.check_vocabulary(model.vocab_size, flags.tp)  # the head; the ranks of the embedding divide these
    layout = Layout(
        flags=flags,
        ep=ep,
        ep_chosen_because=why,
        attention_ranks=attention_ranks,
        dp_groups=dp_groups,
        servers=flags.dp // dp_groups,
    )
    for rule in (
        _weights_rule(layout, model),
        _placement_rule(layout, model),
        _engine_rule(layout, model, gpu),
        _experts_rule(layout, model, gpu),
        _attention_rule(layout, model, gpu),
    ):
        if rule is not None:
            raise ValueError(rule)
    return layout


def _settle_ep(flags: Flags, model: ModelShape) -> tuple[int, str | None]:
    """The EP size in force, and why, where it is not the one given, or 1 by default."""
    tp, a2a, moe_dp = flags.tp, flags.moe_a2a_backend, flags.moe_dp_size
    if a2a != "none":
        check_experts_of_all_ranks(model.experts, tp, a2a, moe_dp)
        return tp, None if tp == (flags.ep or 1) else f"--moe-a2a-backend {a2a} takes all ranks for EP"
    ep = settle_ep_size(model.experts, tp, flags.ep or 1, flags.ep is None, moe_dp)
    return ep, None if ep == (flags.ep or 1) else model.experts.reason_against(tp, 1, moe_dp)


def _weights_rule(layout: Layout, model: ModelShape) -> str | None:
    quantisation = model.quantisation
    width = model.intermediate_size // layout.expert_ranks
    if quantisation.kind == "nvfp4" and width % NVFP4_GROUP:
        return f"the expert width a rank, {width}, is not a multiple of the {NVFP4_GROUP} values of an NVFP4 scale"
    if quantisation.kind != "fp8" or not quantisation.attention:
        return None
    shards = sharding.shard_attention(model.num_attention_heads, model.num_key_value_heads, layout.attention_ranks)
    rows, columns = quantisation.block
    for what, heads in (("q", shards.q.heads_per_rank), ("k and v", shards.kv.heads_per_rank)):
        values = heads * model.head_dim
        cut_columns = what == "q" and layout.attention_ranks > 1  # of the output projection
        if values % rows or (cut_columns and values % columns):
            return (
                f"a rank's {what} projection, {heads} heads of {model.head_dim}, is not a multiple of the "
                f"quantisation block {rows} x {columns}"
            )
    return None


def _placement_rule(layout: Layout, model: ModelShape) -> str | None:
    flags, gpus = layout.flags, layout.gpus
    if flags.pp > model.num_hidden_layers:
        return f"--pp-size {flags.pp} is more than the {model.num_hidden_layers} layers"
    if layout.servers > 1 and flags.nnodes > 1:
        return f"--dp {flags.dp} without --enable-dp-attention starts copies of the server, on one node only"
    if gpus % flags.nnodes:
        return f"{gpus} GPUs (--tp times --pp-size) are not a multiple of --nnodes {flags.nnodes}"
    if flags.pp % flags.nnodes and flags.nnodes % flags.pp:
        return f"--pp-size {flags.pp} and --nnodes {flags.nnodes}: one must be a multiple of the other"
    if layout.servers > 1 and gpus > GPUS_PER_NODE:
        return (
            f"--dp {flags.dp} without --enable-dp-attention starts {flags.dp} copies of the server on one node, {gpus} "
            f"GPUs, and a node has {GPUS_PER_NODE}: give --enable-dp-attention, or a smaller --dp"
        )
    if gpus // flags.nnodes > GPUS_PER_NODE:
        return (
            f"{gpus} GPUs on {flags.nnodes} node(s) are {gpus // flags.nnodes} a node, and a node has {GPUS_PER_NODE}: "
            f"--nnodes {-(-gpus // GPUS_PER_NODE)}"
        )
    return None


def _engine_rule(layout: Layout, model: ModelShape, gpu: Gpu) -> str | None:
    flags = layout.flags
    if flags.kv_cache_dtype not in KV_CACHE_DTYPES:
        return f"--kv-cache-dtype {flags.kv_cache_dtype} is not planned; these are: {', '.join(KV_CACHE_DTYPES)}"
    if flags.context_length is not None and not 1 <= flags.context_length <= model.max_position_embeddings:
        return (
            f"--context-length {flags.context_length} must be between 1 and the model's "
            f"{model.max_position_embeddings} positions"
        )
    if flags.mem_fraction_static is not None and not 0 < flags.mem_fraction_static < 1:
        return f"--mem-fraction-static {flags.mem_fraction_static} must be between 0 and 1"
    if model.quantisation.kind == "nvfp4" and gpu.architecture != "blackwell":
        return f"NVFP4 weights need a Blackwell GPU, and {gpu.name} is none: --gpu b200, or a checkpoint in FP8"
    if flags.moe_dp_size > 1 and flags.pp > 1:
        return f"--moe-dp-size {flags.moe_dp_size} and --pp-size {flags.pp}: the engine takes one or the other"
    return None


def _experts_rule(layout: Layout, model: ModelShape, gpu: Gpu) -> str | None:
    """The kernels of the experts, and what brings tokens to them."""
    flags, kind = layout.flags, model.quantisation.kind
    runner, a2a = flags.moe_runner_backend, flags.moe_a2a_backend
    if runner in ("flashinfer_trtllm", "flashinfer_mxfp4", "triton_kernel"):
        return (
            f"--moe-runner-backend {runner} chooses the experts by other rules than MiniMax-M2's sigmoid scores with a "
            f"selection bias: leave it out"
        )
    method = {"fp8": "fp8", "nvfp4": "modelopt_fp4"}.get(kind)
    blackwell = gpu.architecture == "blackwell"
    width = model.intermediate_size // layout.expert_ranks
    against_runner = sharding.reason_against_runner(method, runner, layout.tp, layout.ep, blackwell, a2a, width)
    if against_runner is not None:
        return against_runner
    if runner == "flashinfer_cutlass" and (ep := flags.ep or layout.ep) not in (1, layout.tp):
        return f"--moe-runner-backend flashinfer_cutlass needs --ep 1 or --ep {layout.tp}, and not {ep}"
    if not gpu.is_hopper_or_blackwell and (
        runner == "flashinfer_cutlass" or (kind == "fp8" and runner not in ("auto", "triton"))
    ):
        return f"--moe-runner-backend {runner} is for NVIDIA GPUs, and {gpu.name} is none: leave it out"
    if runner == "flashinfer_trtllm_routed" and width % TRTLLM_WIDTH:
        return (
            f"--moe-runner-backend {runner} pads the expert width a rank, {width}, to a multiple of {TRTLLM_WIDTH}, "
            f"which is not planned: leave it out"
        )
    against_a2a = sharding.reason_against_a2a_backend(a2a, flags.pp, layout.attention_ranks, layout.servers)
    if against_a2a is not None:
        return against_a2a
    if a2a in A2A_OF_DEEP_GEMM:
        if kind == "fp8" and gpu.is_hopper_or_blackwell and runner in ("auto", "deep_gemm"):
            return None
        return (
            f"--moe-a2a-backend {a2a} is planned for FP8 experts on NVIDIA GPUs and --moe-runner-backend auto or "
            f"deep_gemm: behind it the engine has DeepGEMM's kernels, and ends at its first batch without. Leave it out"
        )
    if a2a == "flashinfer" and not (kind == "nvfp4" and runner == "flashinfer_cutlass"):
        return "--moe-a2a-backend flashinfer needs NVFP4 experts and --moe-runner-backend flashinfer_cutlass"
    if a2a not in ("none", "flashinfer"):
        return f"--moe-a2a-backend {a2a} is not planned; these are: {', '.join(A2A_OF_DEEP_GEMM)}, flashinfer"
    return None


def _attention_rule(layout: Layout, model: ModelShape, gpu: Gpu) -> str | None:
    flags = layout.flags
    backend = attention_backend(flags, gpu)
    if backend not in ATTENTION_BACKENDS:
        return f"--attention-backend {backend} is not planned; these are: {', '.join(ATTENTION_BACKENDS)}"
    if gpu.architecture not in ATTENTION_BACKENDS[backend]:
        theirs = ", ".join(name for name, there in ATTENTION_BACKENDS.items() if gpu.architecture in there)
        return f"--attention-backend {backend} has no kernels for {gpu.name}; these have: {theirs}"
    if backend == "trtllm_mha":
        if flags.kv_cache_dtype == "fp8_e5m2":
            return (
                f"--kv-cache-dtype fp8_e5m2 on {gpu.name}: FlashInfer has no kernel for it in trtllm_mha, the engine's "
                f"default there: take fp8_e4m3, or leave it out"
            )
        chunk = gpu.chunked_prefill_size // layout.dp_groups
        if chunk % TRTLLM_PAGE:
            return (
                f"--dp {flags.dp} makes {chunk} tokens a chunk of {gpu.chunked_prefill_size}, which is not a multiple "
                f"of the {TRTLLM_PAGE} of a page under trtllm_mha: take a --dp that is a power of two, or "
                f"--attention-backend flashinfer"
            )
    if backend == "triton":
        stages = [sharding.pipeline_layers(model.num_hidden_layers, stage, flags.pp) for stage in range(flags.pp)]
        return sharding.reason_against_stages_of_triton(stages)
    return None


def attention_backend(flags: Flags, gpu: Gpu) -> str:
    """The attention backend that the engine takes, for prefill and decode."""
    default = {"hopper": "fa3", "blackwell": "trtllm_mha", "cdna3": "aiter"}[gpu.architecture]
    backend = flags.attention_backend or default
    if backend == "fa3" and flags.kv_cache_dtype == "fp8_e5m2":
        return "triton"  # FlashAttention-3 reads no other FP8 than e4m3
    return backend


def neighbours(flags: Flags, most_gpus: int) -> list[Flags]:
    """Other flags that lay the model over up to ``most_gpus`` GPUs: first those that keep the most of what was asked
    for, and of these those that change least."""
    asked = {flags.tp, flags.dp, flags.pp, flags.ep or 1, flags.nnodes, flags.attn_cp_size, flags.moe_dp_size}
    sizes = sorted(size for size in {1, 2, 4, 8, 16, 32} | asked if 1 <= size <= most_gpus)
    others: dict[Flags, None] = {}
    for tp, pp, means in itertools.product(sizes, sorted({1, 2, 4, 8, flags.pp, flags.nnodes}), _means(flags)):
        if not 1 <= tp * pp <= most_gpus:
            continue
        divisors = [size for size in sizes if tp % size == 0]
        nodes = -(-tp * pp // GPUS_PER_NODE)
        for ep, dp, nnodes in itertools.product((flags.ep, None, *divisors), divisors, (flags.nnodes, nodes)):
            other = replace(means, tp=tp, dp=dp, pp=pp, ep=ep, nnodes=nnodes, enable_dp_attention=dp > 1)
            others[other] = None
        if flags.dp > 1 and not flags.enable_dp_attention:
            others[replace(means, tp=tp, pp=pp, nnodes=1)] = None  # copies of the server, as was asked for
    others |= dict.fromkeys(replace(flags, kv_cache_dtype=dtype) for dtype in _OTHER_KV_CACHES)
    others[replace(flags, attention_backend="flashinfer")] = None
    others.pop(flags, None)
    return sorted(others, key=lambda other: _change(flags, other))


def _means(flags: Flags) -> list[Flags]:
    """``flags``; without one of those that a layout can do without; and without any."""
    defaults = {name: getattr(_DEFAULTS, name) for name in (*_KERNELS, "attn_cp_size", "moe_dp_size")}
    without_one = (replace(flags, **{name: value}) for name, value in defaults.items())
    return list(dict.fromkeys((flags, *without_one, replace(flags, **defaults))))


_DEFAULTS = Flags()
_OTHER_KV_CACHES = ("fp8_e4m3", "auto")
_KERNELS = {"moe_runner_backend", "moe_a2a_backend", "attention_backend"}


def _change(flags: Flags, other: Flags) -> tuple[object, ...]:
    """How much ``other`` changes: what was asked for, how many flags, the number of GPUs, and by what factor.

    A kernel is a means, and is given up before the layout is; the KV cache's dtype only where no layout goes with it.
    """

    def factor(one: int | None, two: int | None) -> float:
        return abs(math.log2(max(one or 1, 1) / max(two or 1, 1)))

    def gpus(of: Flags) -> int:
        return of.tp * of.pp * (1 if of.enable_dp_attention else of.dp)

    changed = {name for name, value in vars(flags).items() if value != getattr(other, name)}
    given_up = {name for name in changed if getattr(flags, name) != getattr(_DEFAULTS, name)}
    return (
        len(given_up),
        (flags.kv_cache_dtype, *_OTHER_KV_CACHES).index(other.kv_cache_dtype),
        len(given_up - _KERNELS),
        len(changed) + ("pp" in changed),  # a pipeline is another way to serve, more than another number
        abs(gpus(flags) - gpus(other)),
        sum(factor(getattr(flags, name), getattr(other, name)) for name in ("tp", "dp", "ep", "pp", "nnodes")),
        other.words(),
    )
