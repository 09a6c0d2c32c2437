"""Graphs of short prefills: what they are captured into, on a host that captures none."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.compilation import piecewise_context_manager
from sglang.srt.layers import minimax_prefill_graphs
from sglang.srt.model_executor import cuda_graph_runner, piecewise_cuda_graph_runner

DECODES, PIECES = (0, 3), (0, 7)


@pytest.mark.parametrize("pool_of_decode", [DECODES, None], ids=["decode has graphs", "--disable-cuda-graph"])
def test_all_graphs_are_from_the_pool_of_the_engines_pieces(monkeypatch, pool_of_decode):
    """Without a pool each would keep its own memory, some GB of them."""
    captures = []

    @contextlib.contextmanager
    def graph(graph, *, pool, stream):
        captures.append((pool, stream))
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: "replayed"))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(cuda_graph_runner, "global_graph_memory_pool", pool_of_decode)
    monkeypatch.setattr(piecewise_cuda_graph_runner, "global_graph_memory_pool", PIECES)
    with piecewise_context_manager.set_pcg_capture_stream("the stream of pieces"):
        replay, output = minimax_prefill_graphs.captured(lambda: "an output")
    assert (replay(), output) == ("replayed", "an output")
    assert captures == [(PIECES, "the stream of pieces")]
