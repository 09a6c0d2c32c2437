"""Every layout, as data: the table of which ``matrix.py`` runs a row, and the small models and devices of its rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from layouts import simulations

from sglang_minimax.checkpoints import SmallModel

STEPS = 6
CHUNK = 16
NUM_LAYERS = 3
IN_FP8 = "FP8 blocks"  # of SHAPES the model whose checkpoint is quantised
TOLERANCE = 1e-4  # natural log; float32, another order of summation
SHARE = 0.9  # of the differences in bfloat16: near ties of the router, which rounding tips over, make the others large

PROMPT_LENGTHS = (5, 21, 40, 9)  # one chunk, two, three, one
SHARED_PREFIX = 33  # tokens that the fifth prompt has in common with the third
THIRD, FIFTH = 2, 4
PREFILL_TURNS = 6  # in so many the third prompt is in the cache
MORE_SETS = 4  # of five prompts, for a server whose answers to the first leave a doubt


@dataclass(frozen=True)
class Device:
    """Where the ranks run, and what goes with it.

    sizes: of every model, in place of those in ``SHAPES``.
    sizes_in_fp8: of the model in FP8 blocks, in place of both.
    arguments: further fields of the engine's ``ServerArgs``.
    has: simulations that are not needed there, since it has what they stand for.
    """

    name: str
    dtype: str = "float32"
    sizes: dict[str, int] = field(default_factory=dict)
    sizes_in_fp8: dict[str, int] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    has: tuple[Callable, ...] = ()
    timeout_seconds: float = 110

    def model_of(self, shape: str) -> SmallModel:
        """The model of ``SHAPES`` as it is served there."""
        sizes = self.sizes | (self.sizes_in_fp8 if shape == IN_FP8 else {})
        return replace(SHAPES[shape], dtype=self.dtype, **sizes)


CPU = Device("cpu")
GPUS = Device(
    "cuda",
    "bfloat16",
    {"head_dim": 128, "hidden_size": 512, "intermediate_size": 384},
    # A block of 128 on each of four ranks, and all experts chosen: FP8 would tip many a near tie of the router over.
    {"intermediate_size": 512, "num_local_experts": 8, "num_experts_per_tok": 8},
    {"attention_backend": "triton", "disable_cuda_graph": True, "disable_piecewise_cuda_graph": True},
    has=(simulations.fp8_in_plain_torch,),
    timeout_seconds=400,  # the first to run a kernel compiles it
)


def small(**sizes) -> SmallModel:
    defaults = dict(
        num_hidden_layers=NUM_LAYERS, hidden_size=128, head_dim=32, num_local_experts=16, intermediate_size=96,
        vocab_size=768,
    )  # fmt: skip
    return SmallModel(**(defaults | sizes))


SHAPES = {
    "8 KV heads": small(num_key_value_heads=8),
    "4 KV heads": small(num_key_value_heads=4),
    "2 KV heads": small(num_key_value_heads=2),
    "1 KV head": small(num_key_value_heads=1),
    "48 heads, 3 KV heads": small(num_attention_heads=48, num_key_value_heads=3, head_dim=8),
    "24 heads, 1 KV head": small(num_attention_heads=24, num_key_value_heads=1, head_dim=8),
    "13 experts": small(num_key_value_heads=2, num_local_experts=13),
    IN_FP8: small(num_attention_heads=4, num_key_value_heads=2, head_dim=128, num_local_experts=4,
                  intermediate_size=512, hidden_size=256),
}  # fmt: skip

ONE = ((0, 1, 2, 3),)
ON_TWO = ((0, 1), (2, 3))
ON_FOUR = ((0,), (1,), (2,), (3,))
ON_EIGHT = ((0,), (1,), (), (2,), (), (), (3,), ())


@dataclass(frozen=True)
class Row:
    """A layout, what it is given to do, and what must be seen of it.

    placed: for each DP rank, which prompts it has.
    arrivals: the turn in which each prompt arrives, by prompt; 0 where it is not said.
    lengths: tokens to decode, by prompt; ``STEPS`` where it is not said.
    chunk: tokens of a prompt in one turn, at most.
    arguments: further fields of the engine's ``ServerArgs``.
    simulation: the stand-in of :mod:`layouts.simulations` that takes the place of what only GPUs have.
    reduced_by: for each layer, who sums the experts' output, over all passes; None: MODEL, and under DP attention in
        other passes REDUCE_SCATTER.
    meets: what at least one rank must meet. "EXTEND" and the like are forward modes; "IDLE/SUM_LEN" is a mode and a
        padding; "EXTEND+DECODE+IDLE" are modes of different ranks in the same pass; "stages" are overlapped ones;
        "copies" is one expert that two of its places computed in one pass.
    captures: layers whose outputs an EAGLE3 draft model asks for, compared with transformers' hidden states.
    on_gpus: fields of ``ServerArgs`` on GPUs only, over those that every row has there.

    Every row takes a prefix from the cache: where it does not place the fifth prompt itself, this comes to the DP rank
    of the third, whose prefix it shares, once that is in the cache, for two tokens.
    """

    what: str
    shape: str = "8 KV heads"
    tp: int = 1
    dp: int = 1
    ep: int = 1
    pp: int = 1
    placed: tuple[tuple[int, ...], ...] = ONE
    arrivals: dict[int, int] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    chunk: int = CHUNK
    arguments: dict[str, Any] = field(default_factory=dict)
    simulation: Callable | None = None
    reduced_by: tuple[frozenset[str], ...] | None = None
    meets: tuple[str, ...] = ()
    captures: tuple[int, ...] = ()
    on_gpus: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not any(FIFTH in own for own in self.placed):
            placed = tuple((*own, FIFTH) if THIRD in own else own for own in self.placed)
            own = {"placed": placed, "lengths": {FIFTH: 2} | self.lengths}
            own["arrivals"] = {FIFTH: self.arrivals.get(THIRD, 0) + PREFILL_TURNS} | self.arrivals
            for name, value in own.items():
                object.__setattr__(self, name, value)

    @property
    def ranks(self) -> int:
        return self.tp * self.pp

    @property
    def layout(self) -> str:
        sizes = [("TP", self.tp), ("DP", self.dp), ("EP", self.ep), ("PP", self.pp)]
        return " ".join(f"{name}{size}" for name, size in sizes if size > 1 or name == "TP")

    def simulation_on(self, device: Device) -> Callable | None:
        return None if self.simulation in device.has else self.simulation

    @property
    def evidence(self) -> str:
        if self.simulation is None:
            return "CPU ranks"
        return "CPU ranks, simulated: " + SIMULATED[self.simulation]


SIMULATED = {
    simulations.fused_all_reduce: "FlashInfer's fused all-reduce + norm",
    simulations.all_reduce_norm: "all-reduce + norm in one launch, in plain torch",
    simulations.all_reduce_norm_of_parts: "all-reduce + norm in one launch, and parts that it adds, in plain torch",
    simulations.fp4_all_gather: "FP4 all-gather, not quantised",
    simulations.token_exchange: "the a2a backend's exchange",
    simulations.exchange_in_order: "the a2a backend's exchange",
    simulations.stages_in_order: "stages in order",
    simulations.fp8_in_plain_torch: "products with the loaded FP8 weights times their scales",
}

A2A = {"moe_a2a_backend": "customized"}
OVERLAPPED = {**A2A, "enable_two_batch_overlap": True}
# Padded batches the engine cannot decode in two halves: the fifth prompt comes last, and is not decoded.
ONE_TOKEN_LAST = {"arrivals": {FIFTH: 12}, "lengths": {FIFTH: 1}}
TWO_NODES = {"nnodes": 2}
MIXED = {"enable_mixed_chunk": True}
REDUNDANT = {"ep_num_redundant_experts": 4}
# Which of the 16 experts lies at each of 20 places, another order in each layer.
PLACES = [[(7 * place + layer) % 16 for place in range(20)] for layer in range(NUM_LAYERS)]
SHUFFLED = {"init_expert_location": json.dumps({"physical_to_logical_map": PLACES}), "ep_dispatch_algorithm": "static"}
EXPERTS_TWICE = {"moe_dp_size": 2}
AT_RANDOM = {"ep_dispatch_algorithm": "dynamic"}


def everywhere(*who: str) -> tuple[frozenset[str], ...]:
    return (frozenset(who),) * NUM_LAYERS


MODEL_OR_SCATTER = everywhere("MODEL", "REDUCE_SCATTER")
DISPATCHED = everywhere("DISPATCHER")
NEXT_NORM = (frozenset({"NEXT_NORM"}),) * (NUM_LAYERS - 1) + (frozenset({"MODEL"}),)
NEXT_NORM_OF_FEW = (frozenset({"NEXT_NORM", "MODEL"}),) * (NUM_LAYERS - 1) + (frozenset({"MODEL"}),)

ROWS = {
    # Tensor parallel.
    "tp1": Row("one rank", "2 KV heads"),
    "tp2_kv8": Row("4 KV heads a rank", tp=2),
    "tp4_kv8": Row("2 KV heads a rank", tp=4),
    "tp8_kv8": Row("1 KV head a rank", tp=8),
    "tp16_kv8": Row("each KV head on 2 ranks", tp=16),
    "tp4_kv2": Row("each KV head on 2 ranks", "2 KV heads", tp=4),
    "tp4_kv1": Row("the KV head on all ranks", "1 KV head", tp=4),
    "tp8_kv4": Row("each KV head on 2 ranks", "4 KV heads", tp=8),
    "tp8_kv2": Row("each KV head on 4 ranks", "2 KV heads", tp=8),
    "tp6_kv3": Row("48 heads on 6 ranks, each KV head on 2", "48 heads, 3 KV heads", tp=6),
    "tp3_kv3": Row("48 heads on 3 ranks", "48 heads, 3 KV heads", tp=3),
    "tp3_kv1": Row("24 heads on 3 ranks, the KV head on all", "24 heads, 1 KV head", tp=3),
    "tp4_13_experts": Row("an odd number of experts", "13 experts", tp=4),
    # Two nodes, each with half of the ranks: no sum of QK norm goes from one to the other.
    "tp2_2_nodes": Row("a rank a node", tp=2, arguments=TWO_NODES),
    "tp4_kv8_2_nodes": Row("2 KV heads a rank, 2 ranks a node", tp=4, arguments=TWO_NODES),
    "tp4_kv2_2_nodes": Row("each KV head on both ranks of a node", "2 KV heads", tp=4, arguments=TWO_NODES),
    "tp4_kv1_2_nodes": Row("the KV head on both nodes, so sums are over these", "1 KV head", tp=4,
                           arguments=TWO_NODES),
    "tp16_kv8_2_nodes": Row("each KV head on 2 ranks, 8 ranks a node", tp=16, arguments=TWO_NODES),
    "tp8_dp2_4_nodes": Row("two groups of two nodes each, one idle at times", "2 KV heads", tp=8, dp=2,
                           placed=((), (0, 1, 2, 3)), arguments={"nnodes": 4}),
    "tp4_fp8_2_nodes": Row("each KV head on both ranks of a node", IN_FP8, tp=4, arguments=TWO_NODES,
                           simulation=simulations.fp8_in_plain_torch),
    # DP attention.
    "tp4_dp2": Row("attention TP 2", "2 KV heads", tp=4, dp=2, placed=ON_TWO),
    "tp4_dp2_uneven": Row("3 prompts beside 1", "2 KV heads", tp=4, dp=2, placed=((0, 1, 2), (3,))),
    "tp4_dp2_one_idle": Row("a DP rank without prompts", "2 KV heads", tp=4, dp=2, placed=((), (0, 1, 2, 3)),
                            meets=("IDLE/SUM_LEN", "IDLE/MAX_LEN")),
    "tp4_dp4": Row("attention TP 1", tp=4, dp=4, placed=ON_FOUR),
    "tp4_dp4_one_idle": Row("a DP rank without prompts", "2 KV heads", tp=4, dp=4, placed=((0,), (1, 2), (), (3,)),
                            meets=("IDLE/MAX_LEN", "DECODE/MAX_LEN")),
    "tp4_dp4_three_idle": Row("three DP ranks without prompts", "2 KV heads", tp=4, dp=4,
                              placed=((), (), (0, 1, 2, 3), ()), reduced_by=everywhere("MODEL"),
                              meets=("EXTEND/SUM_LEN", "DECODE/SUM_LEN", "IDLE/SUM_LEN")),
    "tp8_dp8_ep8": Row("the registered job's layout", tp=8, dp=8, ep=8, placed=ON_EIGHT,
                       meets=("EXTEND+DECODE+IDLE",)),
    "tp16_dp2": Row("attention TP 8", tp=16, dp=2, placed=ON_TWO),
    "tp16_dp4_kv2": Row("replicas inside an attention group", "2 KV heads", tp=16, dp=4,
                        placed=((0, 1), (2,), (), (3,))),
    "tp4_dp4_staggered": Row("one rank extends, one decodes, one idles", "2 KV heads", tp=4, dp=4,
                             placed=((0, 3), (1,), (2,), ()), arrivals={1: 1, 2: 3, 3: 12},
                             meets=("EXTEND+DECODE+IDLE", "EXTEND/SUM_LEN", "DECODE/MAX_LEN", "IDLE/SUM_LEN",
                                    "DECODE/SUM_LEN", "IDLE/MAX_LEN")),
    "tp4_dp2_empties": Row("a DP rank's last prompt ends first", "2 KV heads", tp=4, dp=2, placed=((0, 3), (1, 2)),
                           lengths={0: 2, 3: 3}, meets=("DECODE+IDLE",)),
    # What a batch can hold.
    "tp2_arrivals": Row("prompts arrive among decodes", tp=2, arrivals={1: 2, 2: 4, 3: 5}, lengths={0: 3}),
    "tp2_mixed": Row("chunks and decodes in one batch", tp=2, arrivals={1: 2, 2: 3}, arguments=MIXED, meets=("MIXED",)),
    "tp4_prefix": Row("a prefix from the cache, and all its steps", "2 KV heads", tp=4, placed=((0, 1, 2, 4),),
                      arrivals={4: 6}),
    "tp4_dp2_prefix": Row("a prefix from the cache, whose first prompt has ended", "2 KV heads", tp=4, dp=2,
                          placed=((0, 1), (2, 4)), arrivals={4: 12}, lengths={2: 4}),
    # Experts.
    "tp4_ep2": Row("experts in 2 groups of 2 ranks", "2 KV heads", tp=4, ep=2),
    "tp4_ep4": Row("experts in 4 groups", "2 KV heads", tp=4, ep=4),
    "tp4_dp2_ep2": Row("EP under DP attention", "2 KV heads", tp=4, dp=2, ep=2, placed=ON_TWO),
    "tp4_dp4_ep4": Row("EP under DP attention", "2 KV heads", tp=4, dp=4, ep=4, placed=ON_FOUR),
    "tp4_ep4_redundant": Row("4 experts twice", "2 KV heads", tp=4, ep=4, arguments=REDUNDANT),
    "tp4_dp4_ep4_redundant": Row("4 experts twice, under DP attention", "2 KV heads", tp=4, dp=4, ep=4, placed=ON_FOUR,
                                 arguments=REDUNDANT),
    "tp2_ep2_redundant": Row("4 experts twice", tp=2, ep=2, arguments=REDUNDANT),
    "tp2_ep2_eplb": Row("experts in any order, 4 twice, each rank asks the nearest", tp=2, ep=2,
                        arguments={**A2A, **REDUNDANT, **SHUFFLED}, reduced_by=DISPATCHED,
                        simulation=simulations.token_exchange, meets=("copies",)),
    "tp2_ep2_eplb_dynamic": Row("experts in any order, 4 twice, asked at random", tp=2, ep=2,
                                arguments={**A2A, **REDUNDANT, **SHUFFLED, **AT_RANDOM}, reduced_by=DISPATCHED,
                                simulation=simulations.token_exchange, meets=("copies",)),
    "tp4_dp2_eplb": Row("experts in any order, 4 twice, each rank asks the nearest", "2 KV heads", tp=4, dp=2, ep=4,
                        placed=ON_TWO, arguments={**A2A, **REDUNDANT, **SHUFFLED}, reduced_by=DISPATCHED,
                        simulation=simulations.token_exchange, meets=("copies",)),
    "tp4_dp4_eplb_dynamic": Row("experts in any order, 4 twice, asked at random", "2 KV heads", tp=4, dp=4, ep=4,
                                placed=ON_FOUR, arguments={**A2A, **REDUNDANT, **SHUFFLED, **AT_RANDOM},
                                reduced_by=DISPATCHED, simulation=simulations.token_exchange, meets=("copies",)),
    "tp4_moe_dp2": Row("the experts on 2 ranks and again on 2", "2 KV heads", tp=4, arguments=EXPERTS_TWICE,
                       reduced_by=everywhere("MODEL")),
    "tp4_moe_dp2_next_norm": Row("the same, and the next norm does not sum", "2 KV heads", tp=4,
                                 arguments=EXPERTS_TWICE, simulation=simulations.fused_all_reduce,
                                 reduced_by=everywhere("MODEL")),
    "tp4_dp2_moe_dp2": Row("the same, under DP attention", "2 KV heads", tp=4, dp=2, placed=((0, 1, 2), (3,)),
                           arguments=EXPERTS_TWICE, reduced_by=everywhere("MODEL")),
    # What else divides attention, or the language-model head.
    "tp4_cp2": Row("context parallelism", "2 KV heads", tp=4, arguments={"attn_cp_size": 2}),
    "tp4_dp4_head": Row("the head on each DP rank", "2 KV heads", tp=4, dp=4, placed=((0,), (1, 2), (), (3,)),
                        arguments={"enable_dp_lm_head": True}),
    "tp4_dp2_head": Row("the head on each DP rank's two ranks", "2 KV heads", tp=4, dp=2, placed=ON_TWO,
                        arguments={"enable_dp_lm_head": True}),
    # Pipeline, below the scheduler.
    "tp2_pp2": Row("two stages", tp=2, pp=2),
    "tp4_pp2_kv2": Row("two stages, replicas", "2 KV heads", tp=4, pp=2, arrivals={1: 2, 2: 4}),
    # The engine's Triton attention looks for layer 0 in each stage's KV cache, and fails in the last of three.
    "tp2_pp3": Row("a layer a stage", tp=2, pp=3,
                   on_gpus={"attention_backend": "torch_native", "disable_cuda_graph": True}),
    "tp2_dp2_pp2": Row("two stages under DP attention", tp=2, dp=2, pp=2, placed=ON_TWO),
    # Who sums the experts' output, where it is not the model or the reduce-scatter of the rows above.
    "tp2_next_norm": Row("the next norm", tp=2, simulation=simulations.fused_all_reduce, reduced_by=NEXT_NORM),
    "tp4_next_norm": Row("the next norm", "2 KV heads", tp=4, simulation=simulations.fused_all_reduce,
                         reduced_by=NEXT_NORM),
    "tp4_ep4_next_norm": Row("the next norm", "2 KV heads", tp=4, ep=4, simulation=simulations.fused_all_reduce,
                             reduced_by=NEXT_NORM),
    "tp4_ep2_next_norm": Row("the next norm", "2 KV heads", tp=4, ep=2, simulation=simulations.fused_all_reduce,
                             reduced_by=NEXT_NORM),
    "tp4_pp2_next_norm": Row("the next norm, but not behind a stage", "2 KV heads", tp=4, pp=2,
                             simulation=simulations.fused_all_reduce,
                             reduced_by=tuple(map(frozenset, ({"MODEL"}, {"NEXT_NORM"}, {"MODEL"})))),
    "tp2_one_launch": Row("our next norm, of few tokens", tp=2, simulation=simulations.all_reduce_norm,
                          reduced_by=NEXT_NORM_OF_FEW),
    "tp4_ep2_one_launch": Row("our next norm, of few tokens in parts", "2 KV heads", tp=4, ep=2,
                              simulation=simulations.all_reduce_norm_of_parts, reduced_by=NEXT_NORM_OF_FEW),
    "tp2_pp2_one_launch": Row("our next norm, of few tokens, but not behind a stage", tp=2, pp=2,
                              simulation=simulations.all_reduce_norm,
                              reduced_by=tuple(map(frozenset, ({"MODEL"}, {"NEXT_NORM", "MODEL"}, {"MODEL"})))),
    "tp2_one_launch_eagle3": Row("our next norm, of few tokens; outputs of all layers for a draft model", tp=2,
                                 simulation=simulations.all_reduce_norm_of_parts, reduced_by=NEXT_NORM_OF_FEW,
                                 captures=(0, 1, 2)),
    "tp4_dp4_fp4": Row("the dispatcher", "2 KV heads", tp=4, dp=4, ep=4, placed=ON_FOUR,
                       simulation=simulations.fp4_all_gather, reduced_by=DISPATCHED),
    "tp4_dp4_fp4_one_idle": Row("the dispatcher", "2 KV heads", tp=4, dp=4, ep=4, placed=((0, 1), (), (2,), (3,)),
                                simulation=simulations.fp4_all_gather, reduced_by=DISPATCHED),
    "tp2_a2a": Row("the dispatcher", tp=2, ep=2, arguments=A2A, simulation=simulations.token_exchange,
                   reduced_by=DISPATCHED),
    "tp4_dp2_a2a": Row("the dispatcher", "2 KV heads", tp=4, dp=2, ep=4, placed=ON_TWO, arguments=A2A,
                       simulation=simulations.token_exchange, reduced_by=DISPATCHED),
    "tp4_dp2_a2a_one_idle": Row("the dispatcher", "2 KV heads", tp=4, dp=2, ep=4, placed=((), (0, 1, 2, 3)),
                                arguments=A2A, simulation=simulations.token_exchange, reduced_by=DISPATCHED),
    "tp4_dp4_a2a": Row("the dispatcher", "2 KV heads", tp=4, dp=4, ep=4, placed=ON_FOUR, arguments=A2A,
                       simulation=simulations.token_exchange, reduced_by=DISPATCHED),
    "tp4_dp4_a2a_one_idle": Row("the dispatcher", "2 KV heads", tp=4, dp=4, ep=4, placed=((0, 1), (), (2,), (3,)),
                                arguments=A2A, simulation=simulations.token_exchange, reduced_by=DISPATCHED),
    # Two-batch overlap.
    "tp2_overlap": Row("two halves of a batch", tp=2, ep=2, arguments=OVERLAPPED, **ONE_TOKEN_LAST,
                       simulation=simulations.token_exchange, reduced_by=DISPATCHED, meets=("stages",)),
    "tp4_dp2_overlap": Row("two halves of a batch", "2 KV heads", tp=4, dp=2, ep=4, placed=ON_TWO, arguments=OVERLAPPED,
                           chunk=64, **ONE_TOKEN_LAST, simulation=simulations.token_exchange,
                           reduced_by=DISPATCHED, meets=("stages",)),
    "tp4_dp2_stages": Row("the stages of one batch, without a dispatcher", "2 KV heads", tp=4, dp=2, placed=ON_TWO,
                          simulation=simulations.stages_in_order),
    "tp2_stages_a2a": Row("the stages of one batch", tp=2, ep=2, arguments=A2A,
                          simulation=simulations.exchange_in_order, reduced_by=DISPATCHED, meets=("stages",)),
    "tp4_dp4_stages_a2a": Row("the stages of one batch, one idle", "2 KV heads", tp=4, dp=4, ep=4,
                              placed=((0, 1), (), (2,), (3,)), arguments=A2A,
                              simulation=simulations.exchange_in_order, reduced_by=DISPATCHED, meets=("stages",)),
    # EAGLE3.
    "tp4_eagle3": Row("outputs of all layers for a draft model", "2 KV heads", tp=4, captures=(0, 1, 2)),
    "tp4_dp2_eagle3": Row("outputs of all layers for a draft model", "2 KV heads", tp=4, dp=2, placed=((0, 1, 2), (3,)),
                          captures=(0, 1, 2)),
    "tp4_dp4_eagle3": Row("outputs of two layers for a draft model, one idle", "2 KV heads", tp=4, dp=4,
                          placed=((0,), (1, 2), (), (3,)), captures=(0, 1)),
    # FP8 blocks of 128 x 128, against the checkpoint that they stand for.
    "tp2_fp8": Row("1 KV head of 128 a rank", IN_FP8, tp=2, simulation=simulations.fp8_in_plain_torch),
    "tp4_fp8": Row("each KV head on 2 ranks", IN_FP8, tp=4, simulation=simulations.fp8_in_plain_torch),
    "tp4_ep2_fp8": Row("experts in 2 groups", IN_FP8, tp=4, ep=2, simulation=simulations.fp8_in_plain_torch),
    "tp4_dp2_fp8": Row("DP attention", IN_FP8, tp=4, dp=2, placed=ON_TWO,
                       simulation=simulations.fp8_in_plain_torch),
}  # fmt: skip
