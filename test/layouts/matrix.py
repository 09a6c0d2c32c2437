"""Every layout, as data, and the one function that runs a row of it against transformers in float32.

    python test/layouts/matrix.py                     runs all rows and prints the table
    python test/layouts/matrix.py --only tp16 dp4     the rows whose names contain one of these
    python test/layouts/matrix.py --write             all rows, and writes docs/proof.md
    python test/layouts/matrix.py --servers           each layout through the real server, see servers.py; with --write
                                                      into a table of their own
    python test/layouts/matrix.py --device cuda       the rows in which nothing is simulated, on this host's GPUs; with
                                                      --write into a table of their own, with --at-once N sooner; with
                                                      --keep FILE a run that is cut off goes on in the next one
    python test/layouts/matrix.py --device cuda --servers --stock
                                                      the same through the real server, and the stock engine's beside it

Each row is run on one process a rank. The ranks are given transformers' tokens whatever they would have chosen, so a
tie between two tokens can neither hide an error nor fake one, and the log-probabilities of all tokens of the vocabulary
are compared at every step. A row also says what its run must have met, so that it is worth what its name says.

On GPUs the model computes in bfloat16, with heads of 128, since their kernels have neither float32 nor heads of 8, and
what is in FP8 with the GPUs' own products. What that alone does to the reference, bfloat16 or activations in FP8,
bounds 90% of the differences there; who sums is the GPUs' own choice, and how often is counted as on a CPU. CUDA graphs
are off, for in a graph nothing can be counted: servers have them, with --servers, and in test/gpu/test_reference.py.
Where a row has more ranks than there are GPUs, these take turns, and NCCL connects them by sockets, see nodes.py.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file, which finds its neighbours by the path of its own folder only
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pytest
from layouts import simulations, spies
from layouts.harness import LayoutResult, run_layout
from layouts.rounding import activations_in_fp8

from sglang_minimax.checkpoints import SmallModel, write_checkpoint, write_fp8_blocks
from sglang_minimax.comparison import Tolerance, from_rounding
from sglang_minimax.reference import Completion, Reference

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


@dataclass(frozen=True)
class Outcome:
    """What running a row gave.

    largest_difference: of any log-probability from transformers', natural log.
    within: what the tolerance's share of the differences is within, and ``allowed`` what it may be.
    compared: how many log-probabilities that is.
    seconds: from the first rank's start to the last one's end, the reference not counted.
    faults: in words, what was not as it should be; empty if all was.
    """

    largest_difference: float
    within: float
    allowed: float
    compared: int
    seconds: float
    faults: list[str]

    @classmethod
    def of_failure(cls, faults: list[str]) -> Outcome:
        """A run that did not come to its end."""
        nothing = float("nan")
        return cls(nothing, nothing, nothing, 0, nothing, faults)


class Oracles:
    """Checkpoints, prompts and transformers' answers to them, each made once and when first asked for.

    Args:
        folder: where checkpoints are written.
        device: where transformers and the ranks run.
    """

    def __init__(self, folder: Path, device: Device = CPU) -> None:
        self.folder, self.device = folder, device
        self.prompts = five_prompts(seed=0)
        self.more_prompts = [five_prompts(seed) for seed in range(1, 1 + MORE_SETS)]
        self._made: dict = {}
        self._made_more: dict[str, tuple[list[Completion], Tolerance]] = {}
        self._in_use = threading.Lock()  # rows that run at once have one reference
        self._rounded: dict[str, Reference] = {}
        self._tolerances: dict[str, dict[bool, Tolerance]] = {}

    def of(self, shape: str) -> tuple[Path, Reference, list[Completion]]:
        """(checkpoint to serve, reference, its greedy completion of each prompt with all log-probabilities)."""
        if shape not in self._made:
            folder = self.folder / shape.replace(" ", "_").replace(",", "")
            model = self.device.model_of(shape)
            checkpoint = plain = write_checkpoint(folder, model)
            if shape == IN_FP8:
                checkpoint, plain = write_fp8_blocks(plain, folder / "fp8", folder / "meant")
            reference = Reference(plain, device=self.device.name)
            completions = reference.greedy(self.prompts, STEPS, top_k=SHAPES[shape].vocab_size)
            self._made[shape] = checkpoint, reference, completions
        return self._made[shape]

    def prepare(self, shape: str) -> None:
        """Makes what there is to be made for ``shape``."""
        self.of(shape)
        self.tolerance(shape)

    def tolerance(self, shape: str, chosen_only: bool = False) -> Tolerance:
        """How far log-probabilities may lie from the reference's: of all tokens, or of the chosen ones."""
        if self.device is CPU:
            return Tolerance(TOLERANCE, 1.0, "float32, another order of summation")
        if shape not in self._tolerances:
            _, _, precise = self.of(shape)
            rounded, what = self._scored_with_rounding(shape, self.prompts, precise)
            differences = [
                np.abs(distributions(one) - distributions(other)) for one, other in zip(precise, rounded, strict=True)
            ]
            scale = float(np.quantile(np.concatenate([one.ravel() for one in differences]), SHARE))
            why = f"3 times what {what} does to the reference, {scale:.3g}"
            of_chosen = from_rounding(precise, rounded, what)
            self._tolerances[shape] = {False: Tolerance(3 * scale, SHARE, why), True: of_chosen}
        return self._tolerances[shape][chosen_only]

    def more(self, shape: str) -> tuple[list[Completion], Tolerance]:
        """(completions of ``more_prompts``, one after the other; tolerance for the chosen tokens of all prompts)."""
        with self._in_use:
            if shape not in self._made_more:
                _, reference, first = self.of(shape)
                prompts = [prompt for five in self.more_prompts for prompt in five]
                more = reference.greedy(prompts, STEPS, top_k=2)
                precise = [*first, *more]
                rounded, what = self._scored_with_rounding(shape, [*self.prompts, *prompts], precise)
                self._made_more[shape] = more, from_rounding(precise, rounded, what)
            return self._made_more[shape]

    def _scored_with_rounding(
        self, shape: str, prompts: list[list[int]], precise: list[Completion]
    ) -> tuple[list[Completion], str]:
        """The reference's scores of the tokens of ``precise`` with the ranks' precision, and that in words."""
        model, tokens = self.device.model_of(shape), [completion.tokens for completion in precise]
        if shape != IN_FP8:
            return self.rounded(shape).score(prompts, tokens, top_k=model.vocab_size), self.device.dtype
        with activations_in_fp8(model):
            return self.of(shape)[1].score(prompts, tokens, top_k=model.vocab_size), "activations in FP8"

    def rounded(self, shape: str) -> Reference:
        """The reference in the ranks' dtype."""
        if shape not in self._rounded:
            checkpoint, _, _ = self.of(shape)
            self._rounded[shape] = Reference(checkpoint, dtype=self.device.dtype, device=self.device.name)
        return self._rounded[shape]

    def hidden_states(
        self, shape: str, tokens: list[int], layers: tuple[int, ...], rounded: bool = False
    ) -> np.ndarray:
        """float32 [tokens, len(layers) * hidden_size]: what comes out of transformers' ``layers``, 0-based.

        Args:
            rounded: computed in the ranks' dtype instead of float32.
        """
        import torch

        reference = self.rounded(shape) if rounded else self.of(shape)[1]
        entering_last_norm = []
        norm = reference.model.model.norm
        with self._in_use, torch.inference_mode():
            handle = norm.register_forward_pre_hook(lambda _, args: entering_last_norm.append(args[0]))
            ids = torch.tensor([tokens], device=self.device.name)
            output = reference.model(input_ids=ids, output_hidden_states=True, use_cache=False)
            handle.remove()
        # The first of them are the embeddings, and the last are normed, which the last layer's output is not.
        states = [*output.hidden_states[1:-1], *entering_last_norm]
        return torch.cat([states[layer][0] for layer in layers], dim=-1).float().cpu().numpy()


def five_prompts(seed: int) -> list[list[int]]:
    """One of each of ``PROMPT_LENGTHS``, and one that begins as the third does."""
    generator = np.random.default_rng(seed)
    prompts = [generator.integers(0, 700, length).tolist() for length in PROMPT_LENGTHS]
    return [*prompts, prompts[THIRD][:SHARED_PREFIX] + generator.integers(0, 700, 5).tolist()]


def distributions(completion: Completion) -> np.ndarray:
    """[steps, vocabulary]: log-probabilities in the order of the tokens."""
    return np.array([[logprob for _, logprob in sorted(step)] for step in completion.top])


def run_row(row: Row, oracles: Oracles) -> Outcome:
    """Runs ``row`` and compares everything that it answers with transformers.

    Raises:
        LayoutFailed: a rank failed, died or hung.
    """
    checkpoint, _, completions = oracles.of(row.shape)
    probe = Probes(spies.watch_passes, spies.CaptureForEagle3(list(row.captures)) if row.captures else None)
    device, started = oracles.device, time.monotonic()
    on_gpus = {} if device is CPU else row.on_gpus
    with _simulated(row.simulation_on(device)):
        result = run_layout(
            checkpoint,
            tp=row.tp,
            dp=row.dp,
            ep=row.ep,
            pp=row.pp,
            prompts_by_dp_rank=_placed(row, oracles.prompts),
            arrivals=_placed(row, row.arrivals, default=0),
            lengths=_placed(row, row.lengths, default=STEPS),
            forced_tokens=_placed(row, [completion.tokens for completion in completions]),
            chunk=row.chunk,
            hidden_states=bool(row.captures),
            server_arguments={"disable_radix_cache": False} | row.arguments | device.arguments | on_gpus,
            probe=probe,
            device=device.name,
            dtype=device.dtype,
            timeout_s=device.timeout_seconds,
        )
    seconds = time.monotonic() - started
    differences = np.concatenate([one.ravel() for one in _differences(row, result, completions)])
    faults = [fault for rank in result.probed for fault in _reduction_faults(row, rank["passes"])]
    faults += _unexpected_reducers(row, result) if device is CPU else []
    faults += [f"no rank met {what}" for what in (*row.meets, "prefix") if what not in _met(row, result)]
    faults += _capture_faults(row, result, oracles)
    tolerance, largest = oracles.tolerance(row.shape), float(differences.max())
    within = float(np.quantile(differences, tolerance.share))
    if not within < tolerance.limit:
        faults.append(f"log-probabilities differ by up to {largest:.2e}, {tolerance.share:.0%} by {within:.2e}")
    return Outcome(largest, within, tolerance.limit, differences.size, seconds, faults)


class Probes:
    """Two probes as one: what the passes did and, where asked for, what was captured."""

    def __init__(self, watch, capture) -> None:
        self.watch, self.capture = watch, capture

    def __call__(self, runner):
        passes = self.watch(runner)
        captured = self.capture(runner) if self.capture else lambda: None
        return lambda: {"passes": passes(), "captured": captured()}


@contextlib.contextmanager
def _simulated(simulation: Callable | None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        if simulation:
            simulation(monkeypatch)
        yield


def _placed(row: Row, by_prompt, default=None) -> list[list]:
    """``by_prompt``, a list or a dictionary with holes, as the DP ranks hold it."""
    get = (lambda index: by_prompt.get(index, default)) if isinstance(by_prompt, dict) else by_prompt.__getitem__
    return [[get(index) for index in own] for own in row.placed]


def _differences(row: Row, result: LayoutResult, completions: list[Completion]) -> Iterator[np.ndarray]:
    for own, answers in zip(row.placed, result.logprobs, strict=True):
        for index, got in zip(own, answers, strict=True):
            expected = distributions(completions[index])
            length = row.lengths.get(index, STEPS)
            assert got.shape == (length, expected.shape[1]), f"prompt {index}: {got.shape}"
            yield np.abs(got - expected[:length])


def _reduction_faults(row: Row, passes: list[dict]) -> Iterator[str]:
    """In every pass each layer's experts must be summed once over the ranks, as often as they ran."""
    layers = set(passes[0]["reduced"]) if passes else set()
    for number, seen in enumerate(passes):
        if set(seen["reduced"]) != layers or not layers:
            yield f"pass {number} ran the experts of layers {sorted(seen['reduced'])}, not {sorted(layers)}"
        for layer, (ran, summed) in seen["reduced"].items():
            if summed != (ran if row.tp > 1 else 0):
                yield f"pass {number}, layer {layer}: experts ran {ran} times and were summed {summed} times"


def _unexpected_reducers(row: Row, result: LayoutResult) -> Iterator[str]:
    expected = row.reduced_by or (MODEL_OR_SCATTER if row.dp > 1 else everywhere("MODEL"))
    found: dict[int, set[str]] = {}
    for seen in (seen for rank in result.probed for seen in rank["passes"]):
        for layer, who in seen["who"].items():
            found.setdefault(layer, set()).add(who)
    if not found:  # all of it in stages, which only a dispatcher sums
        assert expected == DISPATCHED
    for layer, who in found.items():
        if who != expected[layer]:
            yield f"layer {layer} was summed by {sorted(who)}, not {sorted(expected[layer])}"


def _met(row: Row, result: LayoutResult) -> set[str]:
    """What a row's ``meets`` may ask for."""
    met = {"prefix"} if any(length for lengths in result.cached for length in lengths) else set()
    for together in zip(*(rank["passes"] for rank in result.probed), strict=True):
        for seen in together:
            met |= {seen["mode"], f"{seen['mode']}/{seen['padding']}"}
            met |= {"stages"} if seen["stages"] else set()
        if "init_expert_location" in row.arguments:
            met |= {"copies"} if _copies_computed(together) else set()
        modes = {seen["mode"] for seen in together}
        met.add("+".join(mode for mode in ("EXTEND", "DECODE", "IDLE") if mode in modes))
    return met


def _copies_computed(together: tuple[dict, ...]) -> bool:
    """Whether in one pass of all ranks an expert was computed at two of its ``PLACES``."""
    for layer, experts in enumerate(PLACES):
        places = set().union(*(seen["places"].get(layer, set()) for seen in together))
        if len({experts[place] for place in places}) < len(places):
            return True
    return False


def _capture_faults(row: Row, result: LayoutResult, oracles: Oracles) -> Iterator[str]:
    """Every rank must have the hidden states of all tokens that went in: prompt, but for a prefix from the cache, and
    all but the last answered."""
    if not row.captures:
        return
    # Of all sequences together, as the log-probabilities: the first token of one may be a near tie of the router, which
    # all of its others then see, and it is a tenth of the tokens at most.
    found: list[np.ndarray] = []
    rounding: list[np.ndarray] = []
    attention_ranks = row.tp // row.dp
    for rank, probed in enumerate(result.probed):
        own = rank // attention_ranks
        sequences = [
            (oracles.prompts[index] + tokens[:-1], cached)
            for index, tokens, cached in zip(row.placed[own], result.tokens[own], result.cached[own], strict=True)
        ]
        captured = {tuple(tokens): states for tokens, states in probed["captured"]}
        if set(captured) != {tuple(sequence[cached:]) for sequence, cached in sequences}:
            yield f"rank {rank} captured {len(captured)} sequences, not the {len(sequences)} that went in"
            continue
        for sequence, cached in sequences:
            expected = oracles.hidden_states(row.shape, sequence, row.captures)[cached:]
            found.append(np.abs(captured[tuple(sequence[cached:])] - expected).ravel())
            if oracles.device is not CPU:
                rounded = oracles.hidden_states(row.shape, sequence, row.captures, rounded=True)[cached:]
                rounding.append(np.abs(rounded - expected).ravel())
    share, limit = 1.0, TOLERANCE
    if rounding:
        share, limit = SHARE, 3 * float(np.quantile(np.concatenate(rounding), SHARE))
    within = float(np.quantile(np.concatenate(found), share)) if found else float("nan")
    if not within < limit:
        yield f"{share:.0%} of captured hidden states differ by up to {within:.2e}, not {limit:.2e}"


if __name__ == "__main__":
    from layouts.proof import main

    sys.exit(main())
