"""Piecewise CUDA graphs, the engine's default for prefill, of the FP8 checkpoint with every kernel of ours chosen.

The engine's own runner compiles the model, cuts it into pieces and serves prompts from them, padded to its sizes. On a
host without a GPU each piece runs as it is instead of being captured, and what our operators would launch is plain
torch. The operators, the choices inside of them and what the compiler makes of the model are those of a GPU.
"""

from __future__ import annotations

import numpy as np
from layouts import simulations
from layouts.harness import run_layout
from layouts.matrix import Oracles
from layouts.rows import NUM_LAYERS, STEPS, TOLERANCE
from sglang.srt.layers import minimax_router

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


def test_prompts_of_the_fp8_checkpoint_in_one_graph_for_all_sizes(tmp_path, monkeypatch):
    oracles = Oracles(tmp_path)
    checkpoint, _, completions = oracles.of("FP8 blocks")
    simulations.piecewise_graphs(monkeypatch)
    simulations.fp8_kernels(monkeypatch)
    simulations.all_reduce_norm(monkeypatch)
    simulations.one_kernel(monkeypatch)
    result = run_layout(
        checkpoint, tp=2, prompts_by_dp_rank=[oracles.prompts], steps=STEPS, probe=watch_graphs,
        forced_tokens=[[completion.tokens for completion in completions]],
        server_arguments={"enforce_piecewise_cuda_graph": True, "piecewise_cuda_graph_tokens": SIZES},
    )  # fmt: skip
    for completion, got in zip(completions, result.logprobs[0], strict=True):
        expected = np.array([[logprob for _, logprob in sorted(step)] for step in completion.top])
        assert np.abs(got - expected).max() < TOLERANCE
    for compiled, operators, prefills, said in result.probed:
        assert {name: said[name] for name in TAKEN} == TAKEN
        # Once serving, the engine cannot compile again: what it took for a constant would be an error there.
        assert compiled == 1, "the compiler took a number of tokens, or something of a batch, for a constant"
        assert operators == OPERATORS
        assert len(prefills) > 2 and not set(prefills) & set(SIZES), "batches that are padded to a size"
