"""Piecewise CUDA graphs, the engine's default for prefill, of the FP8 checkpoint with every kernel of ours chosen.

The engine's own runner compiles the model, cuts it into pieces and serves prompts from them, padded to its sizes. On a
host without a GPU each piece runs as it is instead of being captured, and what our operators would launch is plain
torch. The operators, the choices inside of them and what the compiler makes of the model are those of a GPU.
"""

from __future__ import annotations

import numpy as np
import pytest
from layouts import simulations
from layouts.harness import run_layout
from layouts.matrix import Oracles, distributions
from layouts.rows import CHUNK, NUM_LAYERS, STEPS, TOLERANCE
from sglang.srt.layers import minimax_prefill_attention, minimax_prefill_graphs, minimax_router

from sglang_minimax import server_report

SIZES = [8, 16, 64, 128]  # tokens of the graphs: above 64 projections and experts are those for many
OPERATORS = {
    "minimax_fp8_linear": 2 * NUM_LAYERS,
    "minimax_stored_attention_inputs": NUM_LAYERS,
    "unified_attention_with_output": NUM_LAYERS,
    "minimax_all_reduce_norm": 2 * NUM_LAYERS - 1,  # behind the last experts comes the engine's
    "minimax_route": NUM_LAYERS,
    "minimax_experts_of_many": NUM_LAYERS,
}


TAKEN = {
    "qkv projection": "quantised and multiplied in one kernel up to 64 tokens",
    "output projection": "quantised and multiplied in one kernel up to 64 tokens",
    "router": f"logits and choice in two kernels up to {minimax_router.MAX_TOKENS} tokens",
    "expert kernels": "two or four of the model's up to 64 tokens",
}


def watch_graphs(runner):
    """A probe: how often the engine compiled, which operators a graph calls, how many tokens each prefill had, and
    what a server would say of itself."""
    from sglang.srt.compilation.compilation_counter import compilation_counter

    graphs, prefills = runner.piecewise_cuda_graph_runner, []
    replay = graphs.replay

    def watched(forward_batch, **kwargs):
        prefills.append(len(forward_batch.input_ids))
        return replay(forward_batch, **kwargs)

    graphs.replay = watched
    said = {path.name: path.taken for path in server_report.chosen_paths(runner)}
    return lambda: (compilation_counter.num_graphs_seen, simulations.operators_compiled, prefills, said)


def probed_beside_the_reference(tmp_path, monkeypatch, probe, simulated=(), **layout) -> list:
    """What ``probe`` says of each rank, after prompts of the FP8 checkpoint were answered as the reference answers."""
    oracles = Oracles(tmp_path)
    checkpoint, _, completions = oracles.of("FP8 blocks")
    simulations.piecewise_graphs(monkeypatch)
    simulations.fp8_kernels(monkeypatch)
    simulations.all_reduce_norm(monkeypatch)
    simulations.one_kernel(monkeypatch)
    for more in simulated:
        more(monkeypatch)
    result = run_layout(
        checkpoint, tp=2, prompts_by_dp_rank=[oracles.prompts], steps=STEPS, probe=probe, **layout,
        forced_tokens=[[completion.tokens for completion in completions]],
        server_arguments={"enforce_piecewise_cuda_graph": True, "piecewise_cuda_graph_tokens": SIZES},
    )  # fmt: skip
    for completion, got in zip(completions, result.logprobs[0], strict=True):
        assert np.abs(got - distributions(completion)).max() < TOLERANCE
    return result.probed


def test_prompts_of_the_fp8_checkpoint_in_one_graph_for_all_sizes(tmp_path, monkeypatch):
    for compiled, operators, prefills, said in probed_beside_the_reference(tmp_path, monkeypatch, watch_graphs):
        assert {name: said[name] for name in TAKEN} == TAKEN
        # Once serving, the engine cannot compile again: what it took for a constant would be an error there.
        assert compiled == 1, "the compiler took a number of tokens, or something of a batch, for a constant"
        assert operators == OPERATORS
        assert len(prefills) > 2 and not set(prefills) & set(SIZES), "batches that are padded to a size"


LIMITS = {
    "tokens": (minimax_prefill_graphs, "MAX_TOKENS", 16),
    "length": (minimax_prefill_graphs, "MAX_LENGTH", 32),
    "requests": (minimax_prefill_attention, "MAX_REQUESTS", 2),
    "requests of a graph": (minimax_prefill_attention, "GRAPH_REQUESTS", 2),
}


@pytest.mark.parametrize("limited", [None, *LIMITS])
def test_short_prompts_are_one_graph_and_others_are_pieces(limited, tmp_path, monkeypatch):
    """Between pieces attention is ours too, but for more requests than it takes."""
    limits = {}
    for name, (module, constant, lower) in LIMITS.items():
        limits[name] = lower if name == limited else getattr(module, constant)
        monkeypatch.setattr(module, constant, limits[name])
    simulated = simulations.prefill_attention, simulations.prefill_graphs
    probe = simulations.watch_prefills
    for prefills in probed_beside_the_reference(tmp_path, monkeypatch, probe, simulated, chunk=CHUNK):
        for one in prefills:
            is_taken = one.requests <= limits["requests"]
            fits = one.tokens <= limits["tokens"] and one.longest <= limits["length"]
            is_whole = is_taken and fits and one.requests <= limits["requests of a graph"]
            assert one.is_graph == is_whole and one.launches == NUM_LAYERS * (is_taken and not is_whole), one
        assert {one.is_graph for one in prefills} == ({True, False} if limited else {True})
