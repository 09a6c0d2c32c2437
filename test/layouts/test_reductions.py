"""The experts' output is reduced exactly once, whoever does it: the answers are transformers', and a spy says who did.

Reduced twice, or not at all, the first token of a prompt is wrong already.
"""

from __future__ import annotations

import collections

import pytest
from layouts import simulations
from layouts.harness import run_layout
from sglang.srt.models import minimax_m2

from sglang_minimax.checkpoints import SmallModel, write_checkpoint
from sglang_minimax.reference import Reference

SHAPE = SmallModel(num_hidden_layers=3, num_key_value_heads=2, num_local_experts=8, vocab_size=512)
STEPS = 6
PROMPTS = [[300, 301, 302, 303, 304], [7], list(range(100, 121)), [5, 6, 7, 400]]
A2A = {"moe_a2a_backend": "customized"}
OVERLAPPED = {**A2A, "enable_two_batch_overlap": True}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), SHAPE)
    return checkpoint, Reference(checkpoint).greedy(PROMPTS, STEPS)


def watch_reductions(runner):
    """A probe: who reduced, by layer, how often the model itself did, and how many layers ran as overlapped stages."""
    seen = {"who": collections.defaultdict(set), "all-reduces": 0, "routed": 0, "stages": 0}
    forward, all_reduce = minimax_m2.MiniMaxM2MoE.forward, minimax_m2.MiniMaxM2MoE._all_reduce
    op_experts = minimax_m2.MiniMaxM2MoE.op_experts

    def watched_forward(self, hidden_states, forward_batch, reduction):
        seen["who"][self.layer_id].add(reduction.name)
        seen["routed"] += reduction is minimax_m2.ExpertReduction.MODEL
        return forward(self, hidden_states, forward_batch, reduction)

    def watched_all_reduce(self, output):
        seen["all-reduces"] += 1
        return all_reduce(self, output)

    def watched_op_experts(self, state):
        seen["stages"] += 1
        return op_experts(self, state)

    minimax_m2.MiniMaxM2MoE.forward = watched_forward
    minimax_m2.MiniMaxM2MoE._all_reduce = watched_all_reduce
    minimax_m2.MiniMaxM2MoE.op_experts = watched_op_experts
    return lambda: {**seen, "who": dict(seen["who"])}


def run(oracle, placed, **options) -> list[dict]:
    """Runs the layout with prompts ``placed`` on its DP ranks, compares every answer, and returns what was seen."""
    checkpoint, expected = oracle
    result = run_layout(
        checkpoint,
        dp=len(placed),
        prompts_by_dp_rank=[[PROMPTS[index] for index in own] for own in placed],
        steps=STEPS,
        probe=watch_reductions,
        timeout_s=120,
        **options,
    )
    for own, tokens, logprobs in zip(placed, result.tokens, result.logprobs, strict=True):
        for index, answer, rows in zip(own, tokens, logprobs, strict=True):
            assert answer == expected[index].tokens
            chosen = [float(row[token]) for row, token in zip(rows, answer, strict=True)]
            assert chosen == pytest.approx(expected[index].logprobs, abs=1e-4)
    for seen in result.probed:
        assert seen["all-reduces"] == seen["routed"]
    return result.probed


ONE = [(0, 1, 2, 3)]
TWO, TWO_ONE_IDLE = [(0, 1), (2, 3)], [(), (0, 1, 2, 3)]
FOUR, FOUR_ONE_IDLE = [(0,), (1,), (2,), (3,)], [(0, 1), (), (2,), (3,)]


@pytest.mark.parametrize("tp", [2, 4])
def test_the_model_itself(oracle, tp):
    for seen in run(oracle, ONE, tp=tp):
        assert seen["who"] == {layer: {"MODEL"} for layer in range(3)}
        assert seen["all-reduces"] > 0


@pytest.mark.parametrize("placed", [FOUR, FOUR_ONE_IDLE], ids=["busy", "one idle"])
def test_reduce_scatter_where_ranks_are_padded_to_one_length(oracle, placed):
    """Decode steps of busy ranks are padded and scattered; chunks of a prefill are not, and are all-reduced."""
    for seen in run(oracle, placed, tp=4):
        assert seen["who"] == {layer: {"MODEL", "REDUCE_SCATTER"} for layer in range(3)}


@pytest.mark.parametrize("options", [{"tp": 2}, {"tp": 4}, {"tp": 4, "ep": 4}, {"tp": 4, "ep": 2}], ids=str)
def test_the_next_norm_but_never_behind_the_last_layer(oracle, monkeypatch, options):
    simulations.fused_all_reduce(monkeypatch)
    for seen in run(oracle, ONE, **options):
        assert seen["who"] == {0: {"NEXT_NORM"}, 1: {"NEXT_NORM"}, 2: {"MODEL"}}


@pytest.mark.parametrize("placed", [FOUR, FOUR_ONE_IDLE], ids=["busy", "one idle"])
def test_fp4_all_gather(oracle, monkeypatch, placed):
    simulations.fp4_all_gather(monkeypatch)
    for seen in run(oracle, placed, tp=4, ep=4):
        assert seen["who"] == {layer: {"DISPATCHER"} for layer in range(3)}
        assert seen["all-reduces"] == 0


@pytest.mark.parametrize(
    ("tp", "placed"), [(2, ONE), (4, TWO), (4, TWO_ONE_IDLE), (4, FOUR), (4, FOUR_ONE_IDLE)], ids=str
)
def test_a2a_backend(oracle, monkeypatch, tp, placed):
    simulations.token_exchange(monkeypatch)
    for seen in run(oracle, placed, tp=tp, ep=tp, server_arguments=A2A):
        assert seen["who"] == {layer: {"DISPATCHER"} for layer in range(3)}
        assert seen["all-reduces"] == 0 and seen["stages"] == 0


@pytest.mark.parametrize(("tp", "placed"), [(2, ONE), (4, TWO)], ids=str)
def test_a2a_backend_in_overlapped_stages(oracle, monkeypatch, tp, placed):
    simulations.token_exchange(monkeypatch)
    for seen in run(oracle, placed, tp=tp, ep=tp, server_arguments=OVERLAPPED):
        assert seen["all-reduces"] == 0 and seen["stages"] > 0
