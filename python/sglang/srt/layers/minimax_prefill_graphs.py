"""Short prefills as one CUDA graph each, captured beside the engine's pieces of them.

The engine cuts a prefill's graph at every attention, and launches that between two pieces. Of few tokens a layer's
kernels are done sooner than the host has launched its attention, and the prefill takes as long as the host does. With
:mod:`minimax_prefill_attention` nothing is cut: the layers of a short prefill are one graph for each of the engine's
sizes, whose attention reads the batch from memory. Batches that it does not take, and longer ones, are served from the
engine's pieces.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from sglang.srt.compilation import piecewise_context_manager
from sglang.srt.distributed import get_world_group
from sglang.srt.layers import minimax_prefill_attention as prefill
from sglang.srt.layers.minimax_log import log_once
from sglang.srt.server_args import get_global_server_args

MAX_TOKENS = 1024  # of a batch; of more, a layer's kernels take longer than the host
MAX_LENGTH = 8192  # of a request, with the tokens in the KV cache: each CTA goes over all of them
SWITCH = "SGLANG_MINIMAX_PREFILL_GRAPHS"  # 0: the engine's pieces serve all prefills


def run_model(
    whole: Any,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    forward_batch: Any,
    input_embeds=None,
    pp_proxy_tensors=None,
) -> Any:
    """What the layers of ``whole``, a model with its head, give for a batch; of a prefill by the way chosen for it."""
    attention, graphs = whole.prefill_attention, whole.prefill_graphs
    output = graphs(input_ids, positions, forward_batch) if graphs is not None and input_embeds is None else None
    if output is not None:
        return output
    with attention.of(forward_batch, len(input_ids)) if attention is not None else nullcontext():
        return whole.model(input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors)


def choose_prefill_graphs(model: Any) -> PrefillGraphs | None:
    """The graphs of a model's short prefills, or None: the engine's pieces serve all, where there are any.

    Called once, when the layers are built, under the model's default dtype, which is that of its activations.
    Collective over all ranks: one that captured nothing would leave the others waiting in what they capture.
    """
    reason = next(filter(None, get_world_group().all_gather_object(reason_against(model))), None)
    if reason is not None:
        log_once(f"Short prefills have no graph of their own, since {reason}.")
        return None
    return PrefillGraphs(model)


def reason_against(model: Any) -> str | None:
    """The first of the server's choices, or of the model's, that these graphs do not go with, as a clause, or None."""
    arguments = get_global_server_args()
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    if arguments.disable_piecewise_cuda_graph:
        return "prefills have no graphs here"
    if arguments.enforce_piecewise_cuda_graph:
        return "--enforce-piecewise-cuda-graph is for what the engine keeps graphs of prefills away from"
    if arguments.piecewise_cuda_graph_compiler != "eager":
        return f"--piecewise-cuda-graph-compiler {arguments.piecewise_cuda_graph_compiler} takes other kernels"
    if arguments.enable_return_hidden_states:
        return "--enable-return-hidden-states needs the engine's own"
    attention = model.layers[model.start_layer].self_attn
    return prefill.reason_against_layer(attention) or prefill.reason_against_server()


class PrefillGraphs:
    """A model's short prefills; made by :func:`choose_prefill_graphs`.

    The graphs are captured while the engine captures its pieces, for its sizes of up to ``MAX_TOKENS`` tokens, and read
    the same inputs, which the engine fills.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.dtype = model, torch.get_default_dtype()
        self.batch: prefill.PrefillBatch | None = None
        self.graphs: dict[int, tuple[Callable[[], None], torch.Tensor]] = {}
        self.reason_against: str | None = f"the engine has no pieces of up to {MAX_TOKENS} tokens"

    def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any) -> torch.Tensor | None:
        """The model's output for a prefill that has a graph, [tokens, hidden_size], which the next prefill overwrites;
        or None: the engine's pieces, if this is a batch of theirs, are to serve it, or be captured."""
        if piecewise_context_manager.get_pcg_capture_stream() is not None:
            self._capture(input_ids, positions, forward_batch)
            return None
        if not piecewise_context_manager.is_in_piecewise_cuda_graph():
            return None
        found = self.graphs.get(len(input_ids))
        if self.batch is None or found is None or not self.takes(forward_batch):
            return None
        replay, output = found
        self.batch.describe(forward_batch, len(input_ids))
        replay()
        return output

    def takes(self, forward_batch: Any) -> bool:
        """Whether a batch, of the tokens of a graph, is one for it.

        Where a prefix's keys are fetched while layers run (LMCache), the pool waits for each layer's when it is asked,
        and a graph does not ask."""
        return (
            prefill.is_prefill_of(forward_batch, self.dtype)
            and forward_batch.batch_size <= prefill.GRAPH_REQUESTS
            and forward_batch.token_to_kv_pool.layer_transfer_counter is None
            and int(forward_batch.seq_lens_cpu.max()) <= MAX_LENGTH
        )

    def _capture(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any) -> None:
        tokens = len(input_ids)
        if tokens > MAX_TOKENS or tokens in self.graphs:
            return
        self.reason_against = self._reason_against_capture(forward_batch)
        if self.reason_against is not None:
            log_once(f"Short prefills have no graph of their own, since {self.reason_against}.")
            return
        if self.batch is None:
            up_to = f"up to {MAX_TOKENS} tokens in {prefill.GRAPH_REQUESTS} requests of up to {MAX_LENGTH}"
            log_once(f"Prefills of {up_to} are one CUDA graph each. {SWITCH}=0 turns it off.")
            self.batch = prefill.PrefillBatch(forward_batch.req_to_token_pool.req_to_token)
        batch = self.batch
        batch.describe(forward_batch, tokens)

        def run() -> torch.Tensor:
            with _out_of_pieces(), prefill.captured_for(batch):
                return type(self.model).forward(self.model, input_ids, positions, forward_batch)

        run()  # compiles what is not compiled yet
        self.graphs[tokens] = captured(run)

    def _reason_against_capture(self, forward_batch: Any) -> str | None:
        if not prefill.is_prefill_of(forward_batch, self.dtype):
            pool = forward_batch.token_to_kv_pool
            return f"the KV cache is a {type(pool).__name__} of {pool.dtype}, and activations are {self.dtype}"
        if self.model.layers_to_capture:
            return "a draft model reads the outputs of layers"
        return None


def captured(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """A graph of ``run``, as what replays it, and its output; on the stream of the engine's pieces, from one pool.

    The pool is that of the engine's pieces: that of decode's graphs is not there where a server has none of these.
    """
    from sglang.srt.model_executor.piecewise_cuda_graph_runner import get_global_graph_memory_pool

    graph, stream = torch.cuda.CUDAGraph(), piecewise_context_manager.get_pcg_capture_stream()
    with torch.cuda.graph(graph, pool=get_global_graph_memory_pool(), stream=stream):
        output = run()
    return graph.replay, output


@contextmanager
def _out_of_pieces():
    """The engine's modules take the ways of a step that is captured as a whole, as those of a decode step are."""
    manager = piecewise_context_manager
    before, manager._in_piecewise_cuda_graph = manager._in_piecewise_cuda_graph, False
    try:
        yield
    finally:
        manager._in_piecewise_cuda_graph = before
