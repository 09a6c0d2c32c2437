"""A model of one decode step, and the layouts of some hardware ranked by it.

The model, for a rank:

    step = max(bytes read / HBM rate, operations / FP8 rate) + collectives
           + layers * (launches beyond the bytes that they read + what DP attention adds)
           + what a step has once, and for each request

Launches are those of :mod:`sglang_minimax.plan.launches`, collectives those of :mod:`sglang_minimax.plan.collectives`.
Its assumptions, each of which :data:`ASSUMPTIONS` says in words: it ranks layouts, it does not promise times. Three
constants are fitted to three measured steps (:func:`fitted`); the other measured steps are predictions, and
:func:`errors` says how far off they are.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from sglang_minimax import sharding
from sglang_minimax.plan import collectives
from sglang_minimax.plan.hardware import GPUS, GPUS_PER_NODE, Gpu
from sglang_minimax.plan.launches import (
    ATTENTION,
    ENGINES,
    PROJECTIONS,
    QK_NORM,
    QK_NORM_ALL_REDUCE_US,
    for_context,
)
from sglang_minimax.plan.layout import Flags, Layout, has_counterpart, settle
from sglang_minimax.plan.memory import engine_reserve, kv_bytes_per_token, plan_memory, weight_bytes
from sglang_minimax.plan.paths import fp4_all_gather_reason
from sglang_minimax.plan.shape import ModelShape, read_model

HBM_SHARE = 0.9  # a copy on an H200 was measured at 4.3 TB/s of the datasheet's 4.8
CONTEXT_TOKENS = 8192  # of one request, where --context-length is left out
TABLE_GPU, TABLE_FLAGS = "h200", Flags(tp=4)  # of the launches' times

ASSUMPTIONS = (
    f"HBM gives {HBM_SHARE:.0%} of the datasheet's rate (a copy on an H200 was measured at 4.3 of 4.8 TB/s)",
    "weights of an expert are read once where a token of the batch goes to it; routing is even and independent, "
    "and the ranks wait for the EP group to which most experts of a batch fall",
    "a launch takes what plan/launches.py has for TP4 on H200, on every GPU and in every layout; of the projections, "
    "the router, the experts and attention, the part that their bytes do not explain",
    "launches follow each other without a gap: what one costs before it starts is in the times that were measured",
    "attention is a launch of ours, also where --attention-backend flashinfer leaves it to FlashInfer's (0 to 11 us a "
    "layer more, measured), and stock's the Triton backend's with 8 parts a request: beyond 512 tokens of a request it "
    "takes as long for each more, whatever the requests, or as long as HBM takes to read all their keys and "
    "values, whichever is longer",
    f"a collective inside a node takes {collectives.NODE_US:.0f} us on 2 to 8 GPUs (measured on four H200: an "
    "all-reduce of 98 kB), plus its bytes at the link's datasheet rate; the exchange of QK norm is in its launch",
    "a collective across nodes takes what NCCL's own model of its trees says (plan/collectives.py), over InfiniBand "
    "with an adapter a GPU; nothing of it was measured here",
    "two all-reduces a layer, of attention's and of the experts' output; an all-gather more under DP attention; one "
    "more, of QK norm's sums, where these cross nodes",
    "arithmetic runs at the datasheet's dense FP8 rate, beside the memory reads",
    "what a step has once (the host's work, logits, sampling) is a constant, and another for each further request, the "
    "same for both engines: fitted to stock's TP4 steps with 16 layers, batch 1 and 64",
    "what a layer has more under DP attention (norms, gathers and scatters in launches of their own, attention of all "
    "heads) is a constant: fitted to our TP4 DP4 EP4 step with one request a rank",
    "pipeline stages work on parts of the batch in turn, without gaps",
    "prefill and scheduling are left out",
)


@dataclass(frozen=True)
class MeasuredStep:
    """The median decode step that ``sglang-minimax bench`` measured: FP8 blocks, dummy weights, 34 tokens out.

    On H200 with CUDA 13.0, torch 2.11 and triton 3.6.0, ``--attention-backend triton`` and CUDA graphs; stock is sglang
    0.5.10.post1. All samples are in ``benchmark/results/``, in the file that ``record`` names.

    Dummy weights do not route evenly: all tokens of a batch go to few experts. So a step lies between the model's two
    predictions, for all tokens alike and for even routing, and near the first.

    engine: of :data:`sglang_minimax.plan.launches.ENGINES`.
    batch: requests of all DP groups.
    input_len: tokens of each request before the first step.
    ranks: where fewer ran than ``flags`` says, each with what such a rank holds.
    """

    engine: str
    num_layers: int
    input_len: int
    batch: int
    ms: float
    record: str
    flags: Flags = TABLE_FLAGS
    ranks: int | None = None

    @property
    def context(self) -> int:
        """Tokens of each request in the median step of 33."""
        return self.input_len + 17

    @property
    def layout(self) -> str:
        """TP4, for example, or TP4 DP4 EP4, or 2 ranks of TP4."""
        of = f"{self.ranks} ranks of " if self.ranks else ""
        return f"{of}TP{self.flags.tp}" + (f" DP{self.flags.dp} EP{self.flags.ep}" if self.flags.dp > 1 else "")

    @property
    def batch_name(self) -> str:
        """DP groups x the batch of each, if there are several."""
        groups = self.flags.dp
        return f"{groups} x {self.batch // groups}" if groups > 1 else str(self.batch)


_DP_FLAGS = Flags(tp=4, dp=4, ep=4, enable_dp_attention=True)


def _measured(
    record: str,
    num_layers: int,
    rows: dict[tuple[str, int], tuple[float, ...]],
    flags: Flags = TABLE_FLAGS,
    ranks: int | None = None,
) -> tuple[MeasuredStep, ...]:
    """``rows``: by engine and tokens in, milliseconds for as many of 1, 16 and 64 requests in each DP group."""
    return tuple(
        MeasuredStep(engine, num_layers, input_len, batch * flags.dp, ms, record, flags, ranks)
        for (engine, input_len), times in rows.items()
        for batch, ms in zip((1, 16, 64), times, strict=False)
    )


MEASURED = (
    # One host with eight H200, jobs of ours on the other four while TP4 ran.
    *_measured(
        "steps_tp4_62_layers_h200.json",
        62,
        {
            ("stock", 512): (8.03, 9.12, 10.81),
            ("earlier", 512): (4.19, 5.16, 7.86),
            ("stock", 128): (7.45, 8.66, 10.11),
            ("earlier", 128): (3.77, 4.65, 7.13),
        },
    ),
    # Another host, with four; the engines took turns.
    *_measured(
        "steps_tp4_16_layers_h200.json",
        16,
        {
            ("stock", 512): (2.58, 2.94, 3.69),
            ("earlier", 512): (1.67, 2.01, 2.88),
            ("stock", 128): (2.46, 2.82, 3.42),
            ("earlier", 128): (1.53, 1.84, 2.54),
        },
    ),
    # A third host, with four; the engines took turns.
    *_measured(
        "steps_tp4_16_layers_four_engines_h200.json",
        16,
        {
            ("stock", 512): (2.45, 3.36, 3.46),
            ("earlier", 512): (1.45, 1.73, 2.76),
            ("stock", 4096): (3.21, 4.18),
            ("earlier", 4096): (2.13, 2.49),
            ("stock", 65536): (15.08,),
            ("earlier", 65536): (13.77,),
        },
    ),
    # A fourth host, with two, after all-reduce + norm added parts and attention was a launch of its own: TP4's shards
    # on two ranks; TP2; and TP1 while other cores compiled. The engines took turns.
    *_measured(
        "steps_tp4_shards_16_layers_five_h200.json",
        16,
        {
            ("stock", 512): (2.49, 3.22, 3.17),
            ("ours", 512): (1.37, 1.60, 2.29),
            ("stock", 4096): (3.18, 4.03),
            ("ours", 4096): (1.29, 2.01),
        },
        ranks=2,
    ),
    *_measured(
        "steps_tp2_8_layers_h200.json",
        8,
        {
            ("stock", 512): (1.61, 2.02, 2.23),
            ("ours", 512): (1.45, 1.57, 2.02),
            ("stock", 4096): (1.95, 2.43),
            ("ours", 4096): (1.48, 1.96),
            ("stock", 32768): (4.75,),
            ("ours", 32768): (1.54,),
        },
        Flags(tp=2),
    ),
    *_measured(
        "steps_tp1_6_layers_h200.json",
        6,
        {
            ("stock", 512): (1.73, 1.85, 2.09),
            ("ours", 512): (1.56, 1.60, 1.96),
            ("stock", 4096): (1.99, 2.46),
            ("ours", 4096): (1.66, 1.80),
            ("stock", 32768): (3.83,),
            ("ours", 32768): (1.70,),
        },
        Flags(tp=1),
    ),
    *_measured("steps_tp4_dp4_ep4_62_layers_h200.json", 62, {("earlier", 128): (8.14, 10.17, 17.42)}, _DP_FLAGS),
)


def _one(engine: str, record: str, input_len: int, batch: int) -> MeasuredStep:
    (found,) = (
        step
        for step in MEASURED
        if (step.engine, step.record, step.input_len, step.batch) == (engine, record, input_len, batch)
    )
    return found


FITTED = (
    _one("stock", "steps_tp4_16_layers_h200.json", 512, 1),
    _one("stock", "steps_tp4_16_layers_h200.json", 512, 64),
    _one("earlier", "steps_tp4_dp4_ep4_62_layers_h200.json", 128, 4),
)
"""What the model's three constants are fitted to, in the order of :class:`Constants`."""


@dataclass(frozen=True)
class Constants:
    """What no launch explains.

    step_us: once a step, with its first request.
    request_us: for each further request, of all DP groups: every rank has the logits of them all.
    dp_layer_us: a layer under DP attention.
    """

    step_us: float = 0.0
    request_us: float = 0.0
    dp_layer_us: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.step_us:.0f} us a step, {self.request_us:.1f} us for each request after the first, "
            f"{self.dp_layer_us:.0f} us a layer under DP attention"
        )


@dataclass(frozen=True)
class Step:
    """One decode step of one server. Times in milliseconds; ``batch`` counts requests of all DP groups."""

    batch: int
    memory_ms: float
    arithmetic_ms: float
    collectives_ms: float
    launches_ms: float
    once_ms: float

    @property
    def ms(self) -> float:
        return max(self.memory_ms, self.arithmetic_ms) + self.collectives_ms + self.launches_ms + self.once_ms

    @property
    def tokens_per_s(self) -> float:
        return self.batch / self.ms * 1000


def predict(
    model: ModelShape,
    layout: Layout,
    gpu: Gpu,
    batch: int,
    context: int,
    constants: Constants | None = None,
    routed_alike: bool = False,
    engine: str = "ours",
    counterpart: bool | None = None,
) -> Step:
    """One step of ``batch`` requests that hold ``context`` tokens each.

    With pipeline stages, the time until each request has its next token: all stages, each on its part of the batch.

    Args:
        constants: what no launch explains; None: as fitted.
        routed_alike: all tokens go to the same experts, instead of evenly to all.
        engine: whose launches, of :data:`sglang_minimax.plan.launches.ENGINES`.
        counterpart: whether ranks project q and k of the other node too; None: where the model does.
    """
    constants = fitted() if constants is None else constants
    if counterpart is None:
        counterpart = engine != "stock" and has_counterpart(layout, model)
    part = math.ceil(batch / layout.pp)
    num_layers = model.num_hidden_layers
    requests = math.ceil(part / layout.dp_groups)
    rate = gpu.hbm_gb_per_s * 1e9 * HBM_SHARE
    touched = _experts_touched(model, 1 if routed_alike else part)
    read = sum(_bytes_read(model, layout, stage, touched, requests, context) for stage in range(layout.pp))
    if not counterpart:
        read -= num_layers * counterpart_bytes(model, layout)
    sums_cross = model.use_qk_norm and layout.attention_ranks > layout.tp_ranks_per_node and not counterpart
    launches_us = sum(launch_times_us(model, engine, requests, part, context).values())
    launches_us += _long_attention_us(model, layout, engine, requests, context, rate)
    if sums_cross and engine == "stock":
        launches_us -= QK_NORM_ALL_REDUCE_US
    if layout.dp_groups > 1:
        launches_us += constants.dp_layer_us
    reduced_us = _collectives_us(model, layout, gpu, part, sums_cross)
    return Step(
        batch,
        read / rate * 1e3,
        _operations(model, layout, part, requests, context) / (gpu.fp8_tflops * 1e12) * 1e3,
        (num_layers * reduced_us + (layout.pp - 1) * collectives.NODE_US) / 1e3,
        num_layers * launches_us / 1e3,
        (constants.step_us + constants.request_us * (batch - 1)) / 1e3,
    )


def launch_times_us(model: ModelShape, engine: str, requests: int, tokens: int, context: int) -> dict[str, float]:
    """By launch, microseconds of one layer beyond the bytes that it reads.

    Args:
        requests: tokens that attention has on a rank.
        tokens: tokens that the experts and the router have.
        context: tokens that each request holds.
    """
    by_requests = (PROJECTIONS, QK_NORM, ATTENTION)
    times = {}
    for launch in for_context(ENGINES[engine], context):
        us = launch.at(requests if launch.name in by_requests else tokens)
        times[launch.name] = max(0.0, us - _bytes_us(launch.reads))
    if not model.use_qk_norm:
        del times[QK_NORM]
    return times


def _long_attention_us(
    model: ModelShape, layout: Layout, engine: str, requests: int, context: int, rate: float
) -> float:
    """What a layer's attention takes for long requests beyond reading their keys and values at ``rate`` bytes a s."""
    (launch,) = (each for each in for_context(ENGINES[engine], context) if each.name == ATTENTION)
    more = context - launch.context
    layers = len(sharding.pipeline_layers(model.num_hidden_layers, 0, layout.pp))
    read_us = requests * more * kv_bytes_per_token(model, layout) / layers / rate * 1e6
    return max(0.0, launch.ns_per_token * more / 1e3 - read_us)


@functools.cache
def _bytes_us(weights: str) -> float:
    """How long HBM takes for a layer's ``weights`` in the layout that the launches' times are of."""
    if weights in ("", "experts"):
        return 0.0
    model, gpu = read_model("m2.5"), GPUS[TABLE_GPU]
    size = weight_bytes(model, settle(TABLE_FLAGS, model, gpu))[weights] / model.num_hidden_layers
    return size / (gpu.hbm_gb_per_s * 1e3 * HBM_SHARE)


def counterpart_bytes(model: ModelShape, layout: Layout) -> float:
    """Of one layer, the bytes of the rows that a rank holds for its counterpart on the other node."""
    alone = replace(layout, flags=replace(layout.flags, nnodes=1))
    more = weight_bytes(model, layout)["attention"] - weight_bytes(model, alone)["attention"]
    return more / len(sharding.pipeline_layers(model.num_hidden_layers, 0, layout.pp))


def _experts_touched(model: ModelShape, tokens: int) -> float:
    """The share of the experts that some of ``tokens`` tokens goes to, routing being even and independent."""
    return 1 - (1 - model.num_experts_per_tok / model.num_local_experts) ** tokens


def _bytes_read(model: ModelShape, layout: Layout, stage: int, touched: float, requests: int, context: int) -> float:
    weights = weight_bytes(model, layout, stage)
    # Of the embedding only the rows of the batch's tokens are read: nothing beside the rest.
    others = weights["attention"] + weights["router"] + weights["norms"] + weights["head"]
    cache = requests * context * kv_bytes_per_token(model, layout, stage)
    return weights["experts"] * _busiest_rank(model, layout, touched) + others + cache


def _busiest_rank(model: ModelShape, layout: Layout, touched: float) -> float:
    """The share of its experts that the busiest of the EP groups reads: the others wait for it.

    The usual bound on the mean of the largest of ``ep`` draws that are about normal, so rather too much.
    """
    held = model.num_local_experts // layout.ep
    return min(1.0, touched + math.sqrt(2 * math.log(layout.ep) * touched * (1 - touched) / held))


def _operations(model: ModelShape, layout: Layout, tokens: int, requests: int, context: int) -> float:
    """Multiplications and additions of one rank in all its stages."""
    shards = sharding.shard_attention(model.num_attention_heads, model.num_key_value_heads, layout.attention_ranks)
    q, kv = shards.q.heads_per_rank * model.head_dim, shards.kv.heads_per_rank * model.head_dim
    attention = requests * (2 * model.hidden_size * (2 * q + 2 * kv) + 4 * q * context)
    experts = tokens * model.num_experts_per_tok * 6 * model.hidden_size * model.intermediate_size / layout.tp
    head = tokens * 2 * model.hidden_size * sharding.padded_vocabulary(model.vocab_size) / layout.tp
    return model.num_hidden_layers * (attention + experts) + head


def _collectives_us(model: ModelShape, layout: Layout, gpu: Gpu, tokens: int, sums_cross: bool) -> float:
    """Collectives of one layer. ``sums_cross``: the sums of QK norm are reduced across nodes."""

    def one(ranks: int, size: float, sent: float) -> float:
        if ranks == 1:
            return 0.0
        in_node = layout.tp_ranks_per_node
        if ranks > in_node:
            return collectives.over_nodes_us(in_node, -(-ranks // in_node), size)
        return collectives.within_node_us(ranks, sent, gpu.link_gb_per_s)

    hidden = tokens * model.hidden_size * 2  # bytes of all tokens in bfloat16
    mine = hidden / layout.dp_groups
    sums = one(layout.attention_ranks, 8 * tokens / layout.dp_groups, 0.0) if sums_cross else 0.0
    total = sums + one(layout.attention_ranks, mine, 2 * mine)
    if layout.dp_groups == 1:
        return total + one(layout.tp, hidden, 2 * hidden)
    # In FP4: half a byte a value, and a byte for each 16 that share a scale, of two bytes each.
    gathered = hidden * 9 / 32 if fp4_all_gather_reason(layout) is None else hidden
    return total + one(layout.tp, gathered, gathered) + one(layout.tp, hidden, hidden)


@functools.cache
def fitted() -> Constants:
    """The model's constants, one after the other: what is left of each step of ``FITTED``."""

    def rest_us(measured: MeasuredStep, so_far: Constants) -> float:
        return (measured.ms - predict_measured(measured, so_far, routed_alike=True).ms) * 1e3

    first, many, dp = FITTED
    constants = Constants()
    constants = replace(constants, step_us=rest_us(first, constants))
    constants = replace(constants, request_us=rest_us(many, constants) / (many.batch - 1))
    return replace(constants, dp_layer_us=rest_us(dp, constants) / dp.num_layers)


def predict_measured(measured: MeasuredStep, constants: Constants | None = None, routed_alike: bool = False) -> Step:
    """The model's step for what was measured."""
    model, gpu = replace(read_model("m2.5"), num_hidden_layers=measured.num_layers), GPUS[TABLE_GPU]
    layout = settle(measured.flags, model, gpu)
    return predict(model, layout, gpu, measured.batch, measured.context, constants, routed_alike, measured.engine)


@dataclass(frozen=True)
class Error:
    """A measured step and the model's predictions of it in milliseconds, for even routing and for all tokens alike."""

    measured: MeasuredStep
    even_ms: float
    alike_ms: float

    @property
    def alike(self) -> float:
        """How much too long the model is, as a share of the measured step, where all tokens go alike."""
        return self.alike_ms / self.measured.ms - 1


def errors(measured: Iterable[MeasuredStep] = MEASURED) -> list[Error]:
    """How far the model is off the measured steps; it was fitted to those of ``FITTED``."""
    return [Error(step, predict_measured(step).ms, predict_measured(step, routed_alike=True).ms) for step in measured]


def largest_errors() -> dict[str, float]:
    """By layout and number of layers the largest :attr:`Error.alike` of the steps that nothing was fitted to."""
    found: dict[str, float] = {}
    for error in errors(step for step in MEASURED if step not in FITTED):
        kind = f"{error.measured.layout}, {error.measured.num_layers} layers"
        found[kind] = max(found.get(kind, 0.0), error.alike, key=abs)
    return found


@dataclass(frozen=True)
class Candidate:
    """A layout of the hardware: ``copies`` servers of it, and a step of each for the goal.

    context: tokens that each request of the step holds.
    """

    layout: Layout
    copies: int
    context: int
    kv_tokens: int
    step: Step

    @property
    def tokens_per_s(self) -> float:
        """Of all servers together."""
        return self.copies * self.step.tokens_per_s


def context_of(model: ModelShape, flags: Flags) -> int:
    """Tokens that each request of a search holds: as many as it may have, or fewer where nobody says."""
    return flags.context_length or min(CONTEXT_TOKENS, model.max_position_embeddings)


def search(model: ModelShape, gpu: Gpu, gpus: int, goal: str, flags: Flags) -> list[Candidate]:
    """The layouts that use all ``gpus``, best first.

    "latency": the shortest step of one request. "throughput": most tokens a second of all servers together, with as
    many requests of the context length as the KV cache holds, and at most as many as CUDA graphs are captured for: the
    graphs of a pipeline stage are for its part of the batch.

    Args:
        flags: what holds for every layout: KV-cache dtype, memory fraction, context length, quantisation, backend of
            the experts.
    """
    context = context_of(model, flags)
    found = []
    for layout in _layouts(model, gpu, gpus, flags):
        try:
            memory = plan_memory(model, layout, gpu)
        except ValueError:
            continue
        requests = memory.tokens // context
        if requests == 0:
            continue
        graphs = engine_reserve(gpu, layout).cuda_graph_max_bs * layout.pp
        batch = 1 if goal == "latency" else min(requests, graphs) * layout.dp_groups
        step = predict(model, layout, gpu, batch, context)
        found.append(Candidate(layout, gpus // layout.gpus, context, memory.tokens * layout.dp_groups, step))

    def rank(candidate: Candidate) -> tuple[object, ...]:
        # Where the model sees no difference: more room for the cache, then the plainer flags.
        first = candidate.step.ms if goal == "latency" else -candidate.tokens_per_s
        words = candidate.layout.flags.words()
        return (round(first, 3), -candidate.copies * candidate.kv_tokens, len(words), words)

    return sorted(found, key=rank)


def _layouts(model: ModelShape, gpu: Gpu, gpus: int, flags: Flags) -> Iterator[Layout]:
    """Every valid layout whose servers, together, take all the GPUs; an EP that would be chosen anyway is left out."""
    for size in _divisors(gpus):
        for pp in (1, 2, 4, 8):
            if size % pp:
                continue
            tp, nnodes = size // pp, -(-size // GPUS_PER_NODE)
            for dp in _divisors(tp):
                seen = set()
                for ep in (None, *_divisors(tp)):
                    asked = replace(
                        flags, tp=tp, pp=pp, dp=dp, ep=ep, nnodes=nnodes, enable_dp_attention=dp > 1,
                    )  # fmt: skip
                    if flags.moe_runner_backend == "auto" and model.quantisation.kind == "nvfp4" and ep == tp > 1:
                        asked = replace(asked, moe_runner_backend="flashinfer_cutlass")  # no other kernels take EP
                    try:
                        layout = settle(asked, model, gpu)
                    except ValueError:
                        continue
                    if (layout.ep, asked.moe_runner_backend) not in seen:
                        seen.add((layout.ep, asked.moe_runner_backend))
                        yield layout


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def as_data(candidates: list[Candidate]) -> dict[str, object]:
    """For JSON: the candidates in their order, the assumptions and the error against what was measured."""
    return {
        "layouts": [
            {
                "flags": " ".join(candidate.layout.flags.words()),
                "ep": candidate.layout.ep,
                "servers": candidate.copies,
                "context": candidate.context,
                "kv_tokens": candidate.kv_tokens,
                "step": {**dataclasses.asdict(candidate.step), "ms": candidate.step.ms},
                "tokens_per_s": candidate.tokens_per_s,
            }
            for candidate in candidates
        ],
        "assumptions": ASSUMPTIONS,
        "errors": [
            {
                "engine": error.measured.engine,
                "flags": " ".join(error.measured.flags.words()),
                "num_layers": error.measured.num_layers,
                "input_len": error.measured.input_len,
                "batch": error.measured.batch,
                "measured_ms": error.measured.ms,
                "record": error.measured.record,
                "fitted": error.measured in FITTED,
                "model_ms": error.even_ms,
                "model_ms_all_tokens_routed_alike": error.alike_ms,
            }
            for error in errors()
        ],
    }
