"""Runs a checkpoint under one parallel layout, below the server: real ranks, real collectives, one batch.

:func:`run_layout` starts one process a rank. On a CPU they are forked from this process after it has imported
the engine, so that sixteen ranks cost seconds; on GPUs, where a process that uses CUDA cannot be forked, they
are spawned. Each rank builds the engine's ``ServerArgs`` and ``ModelRunner`` and steps through the same
batches that the engine's scheduler would form: prompts in chunks, then decode, with the DP ranks agreeing on
their token counts and taking IDLE batches where they have nothing to do.

    result = run_layout("path/to/checkpoint", tp=4, dp=2, prompts_by_dp_rank=[[[1, 2, 3]], []], steps=4)
    result.tokens[0][0]     # four greedy tokens of the first prompt of DP rank 0
    result.logprobs[0][0]   # float32 [4, vocab]: what those tokens were chosen from

A rank that fails, dies or hangs makes the run fail with that rank's traceback and its log, within the timeout,
and no process is left behind.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import importlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Prompt = Sequence[int]
Probe = Callable[[Any], Callable[[], Any]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """One run, as every rank sees it. ``dp`` above 1 means DP attention: attention TP is then ``tp / dp``."""

    checkpoint: str
    prompts_by_dp_rank: tuple[tuple[tuple[int, ...], ...], ...]
    tp: int = 1
    dp: int = 1
    ep: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    steps: int = 16
    chunk: int = 16
    forced_tokens: tuple[tuple[tuple[int, ...], ...], ...] | None = None
    server_arguments: tuple[tuple[str, Any], ...] = ()
    probe: Probe | None = None

    @property
    def prefill_rounds(self) -> int:
        """Rounds that the longest prompt of any DP rank takes; shorter prompts join in the later ones."""
        longest = max(len(prompt) for prompts in self.prompts_by_dp_rank for prompt in prompts)
        return -(-longest // self.chunk)


@dataclasses.dataclass(frozen=True)
class LayoutResult:
    """What the ranks answered. Indices: DP rank, then prompt.

    tokens: the tokens that were chosen (greedy) or forced, ``steps`` a prompt.
    logprobs: float32 [steps, vocab] a prompt; row i is the distribution that token i was taken from.
    probed: what each rank's probe returned, by rank; None without a probe.
    seconds: "start" (until the slowest rank has loaded the model), "run" and "total".
    """

    tokens: list[list[list[int]]]
    logprobs: list[list[np.ndarray]]
    probed: list[Any]
    seconds: dict[str, float]


class LayoutFailed(RuntimeError):
    """A rank failed, died or hung. The message holds the rank, its traceback and the end of its log."""


def run_layout(
    checkpoint: str | os.PathLike,
    *,
    prompts_by_dp_rank: Sequence[Sequence[Prompt]],
    tp: int = 1,
    dp: int = 1,
    ep: int = 1,
    dtype: str = "float32",
    device: str = "cpu",
    steps: int = 16,
    chunk: int = 16,
    forced_tokens: Sequence[Sequence[Sequence[int]]] | None = None,
    server_arguments: dict[str, Any] | None = None,
    probe: Probe | None = None,
    timeout_s: float = 300,
) -> LayoutResult:
    """Runs one batch of prompts through ``tp`` ranks and returns tokens and log-probabilities.

    Args:
        checkpoint: folder of a checkpoint in the published format.
        prompts_by_dp_rank: token ids; one list of prompts for each of the ``dp`` DP ranks, empty for an idle one.
        steps: tokens to decode for each prompt.
        chunk: at most so many tokens of a prompt go through the model at once.
        forced_tokens: indexed like the result's ``tokens``; fed back instead of the greedy ones.
        server_arguments: further fields of the engine's ``ServerArgs``.
        probe: called in each rank with its ``ModelRunner`` once the model is loaded; what it returns is called
            after the last step, and its value comes back in ``probed``. On GPUs it must be importable.
        timeout_s: seconds until the run is given up.

    Raises:
        LayoutFailed: a rank failed, died or hung, or ranks that hold the same requests disagree.
        ValueError: the arguments contradict each other.
    """
    if len(prompts_by_dp_rank) != dp:
        raise ValueError(f"prompts for {len(prompts_by_dp_rank)} DP ranks were given and dp is {dp}: give one list each")
    if tp % dp or tp % ep:
        raise ValueError(f"dp {dp} and ep {ep} must both divide tp {tp}")
    if not any(prompts_by_dp_rank):
        raise ValueError("every DP rank is idle: give at least one prompt")
    layout = Layout(
        checkpoint=os.fspath(checkpoint),
        prompts_by_dp_rank=_frozen(prompts_by_dp_rank),
        tp=tp,
        dp=dp,
        ep=ep,
        dtype=dtype,
        device=device,
        steps=steps,
        chunk=chunk,
        forced_tokens=None if forced_tokens is None else _frozen(forced_tokens),
        server_arguments=tuple((server_arguments or {}).items()),
        probe=probe,
    )
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="layout-") as logs:
        reports = _run_ranks(layout, Path(logs), timeout_s)
    tokens, logprobs = _by_dp_rank(layout, reports)
    seconds = {part: max(report["seconds"][part] for report in reports) for part in ("start", "run")}
    seconds["total"] = time.monotonic() - started
    return LayoutResult(tokens, logprobs, [report["probed"] for report in reports], seconds)


def _frozen(nested):
    return tuple(tuple(tuple(map(int, tokens)) for tokens in requests) for requests in nested)


def _by_dp_rank(layout: Layout, reports: list[dict]) -> tuple[list, list]:
    """One answer for each DP rank, after checking that the ranks which share its attention agree."""
    attn_tp = layout.tp // layout.dp
    tokens, logprobs = [], []
    for first in range(0, layout.tp, attn_tp):
        mine = reports[first]
        for rank in range(first + 1, first + attn_tp):
            if reports[rank]["tokens"] != mine["tokens"]:
                raise LayoutFailed(
                    f"ranks {first} and {rank} hold the same requests and chose other tokens: "
                    f"{mine['tokens']} and {reports[rank]['tokens']}"
                )
        tokens.append(mine["tokens"])
        logprobs.append(mine["logprobs"])
    return tokens, logprobs


# --- Processes: started, watched, ended ------------------------------------------------------------------


def _run_ranks(layout: Layout, logs: Path, timeout_s: float) -> list[dict]:
    import torch.distributed

    method = "fork" if layout.device == "cpu" else "spawn"
    if method == "fork":
        _import_engine()
    context = multiprocessing.get_context(method)
    # The store lives in this process and took its port from the system, so no other program can take it first.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks, readers = [], []
    try:
        for rank in range(layout.tp):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main, args=(layout, rank, store.port, logs / f"rank{rank}.log", writer), daemon=True
            )
            process.start()
            writer.close()  # so that the reader sees the end of a rank that died
            ranks.append(process)
            readers.append(reader)
        return _collect(ranks, readers, logs, timeout_s)
    finally:
        for process in ranks:
            process.kill()
        for process in ranks:
            process.join()


def _collect(ranks, readers, logs: Path, timeout_s: float) -> list[dict]:
    """Each rank's report, in rank order. The first rank that fails ends the wait: the others only wait for it."""
    deadline = time.monotonic() + timeout_s
    reports: dict[int, dict] = {}
    while len(reports) < len(ranks):
        waiting = {reader: rank for rank, reader in enumerate(readers) if rank not in reports}
        ready = multiprocessing.connection.wait(list(waiting), timeout=max(0, deadline - time.monotonic()))
        if not ready:
            raise LayoutFailed(_describe_hang(ranks, sorted(waiting.values()), logs, timeout_s))
        for reader in ready:
            rank = waiting[reader]
            try:
                report = reader.recv()
            except EOFError:
                ranks[rank].join()
                raise LayoutFailed(
                    f"rank {rank} died with exit code {ranks[rank].exitcode}\n{_log_end(logs, rank)}"
                ) from None
            if "error" in report:
                raise LayoutFailed(f"rank {rank} failed\n{report['error']}\n{_log_end(logs, rank)}")
            reports[rank] = report
    return [reports[rank] for rank in range(len(ranks))]


def _describe_hang(ranks, unfinished: list[int], logs: Path, timeout_s: float) -> str:
    """Which ranks have not answered, and where each stands: a hang shows in the ranks that stand elsewhere."""
    for rank in unfinished:
        if ranks[rank].is_alive():
            os.kill(ranks[rank].pid, signal.SIGUSR1)  # faulthandler writes the stack to the rank's log
    time.sleep(1)
    stacks = "\n".join(_log_end(logs, rank, lines=40) for rank in unfinished[:4])
    return f"rank(s) {unfinished} did not answer within {timeout_s:.0f} s\n{stacks}"


def _log_end(logs: Path, rank: int, lines: int = 15) -> str:
    path = logs / f"rank{rank}.log"
    text = path.read_text(errors="replace").splitlines() if path.exists() else []
    kept = [line for line in text if not line.startswith("[Gloo]")]
    return "\n".join([f"--- end of rank {rank}'s log", *kept[-lines:]])


def _rank_main(layout: Layout, rank: int, store_port: int, log: Path, writer) -> None:
    stream = open(log, "w", buffering=1)  # noqa: SIM115  stays open for as long as the process lives
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream
    faulthandler.enable(stream)
    faulthandler.register(signal.SIGUSR1, stream, all_threads=True)
    try:
        _prepare_process(layout, store_port)
        report = _run_rank(layout, rank)
    except BaseException:
        report = {"error": traceback.format_exc()}
    writer.send(report)
    writer.close()
    stream.flush()
    os._exit(0)  # a rank has nothing to clean up that its peers, or an interpreter shutting down, could not hang


def _prepare_process(layout: Layout, store_port: int) -> None:
    import logging

    import torch

    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(store_port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE="env://",
    )
    if layout.device == "cpu":
        # OpenMP's threads do not survive a fork: a rank that asked for more than its own would wait for them.
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, force=True)
    from sglang.srt.utils import kill_itself_when_parent_died

    kill_itself_when_parent_died()


def _import_engine() -> None:
    """Everything a rank uses, so that forked ranks share it."""
    for module in ("model_executor.model_runner", "managers.scheduler_dp_attn_mixin", "models.registry"):
        importlib.import_module(f"sglang.srt.{module}")


# --- In a rank -------------------------------------------------------------------------------------------


def _run_rank(layout: Layout, rank: int) -> dict:
    started = time.monotonic()
    batches = RankBatches(layout, rank)
    finish = layout.probe(batches.runner) if layout.probe else lambda: None
    loaded = time.monotonic()
    batches.run()
    return {
        "tokens": batches.tokens,
        "logprobs": [np.stack(rows) for rows in batches.logprobs],
        "probed": finish(),
        "seconds": {"start": loaded - started, "run": time.monotonic() - loaded},
    }


def server_args_of(layout: Layout):
    """The engine's ``ServerArgs`` for ``layout``: its own defaults but for sizes, which follow from the batch."""
    from sglang.srt.server_args import ServerArgs

    requests = max(map(len, layout.prompts_by_dp_rank))
    tokens = max(sum(len(p) + layout.steps for p in prompts) for prompts in layout.prompts_by_dp_rank)
    arguments = dict(
        model_path=layout.checkpoint,
        skip_tokenizer_init=True,
        device=layout.device,
        dtype=layout.dtype,
        tp_size=layout.tp,
        ep_size=layout.ep,
        dp_size=layout.dp,
        enable_dp_attention=layout.dp > 1,
        max_running_requests=(requests + 1) * layout.dp,
        max_total_tokens=tokens + 256,
        disable_radix_cache=True,
        random_seed=0,
    )
    return ServerArgs(**(arguments | dict(layout.server_arguments)))


class RankBatches:
    """One rank's model runner and the batches it steps through."""

    def __init__(self, layout: Layout, rank: int) -> None:
        from sglang.srt.layers.moe import initialize_moe_config
        from sglang.srt.layers.quantization.fp4_utils import initialize_fp4_gemm_config
        from sglang.srt.layers.quantization.fp8_utils import initialize_fp8_gemm_config

        self.layout = layout
        self.dp_rank = rank // (layout.tp // layout.dp)
        self.prompts = layout.prompts_by_dp_rank[self.dp_rank]
        self.tokens: list[list[int]] = [[] for _ in self.prompts]
        self.logprobs: list[list[np.ndarray]] = [[] for _ in self.prompts]
        self.server_args = server_args_of(layout)
        for initialize in (initialize_moe_config, initialize_fp8_gemm_config, initialize_fp4_gemm_config):
            initialize(self.server_args)
        self.runner = self._load_model(rank)
        self.tree_cache = self._chunk_cache()

    def _load_model(self, rank: int):
        from sglang.srt.configs.model_config import ModelConfig
        from sglang.srt.model_executor.model_runner import ModelRunner

        return ModelRunner(
            model_config=ModelConfig.from_server_args(self.server_args),
            mem_fraction_static=self.server_args.mem_fraction_static,
            gpu_id=rank,
            tp_rank=rank,
            tp_size=self.layout.tp,
            moe_ep_rank=rank // (self.layout.tp // self.layout.ep),
            moe_ep_size=self.layout.ep,
            pp_rank=0,
            pp_size=1,
            nccl_port=0,  # not used: the store's address comes from the environment
            server_args=self.server_args,
            dp_rank=self.dp_rank if self.layout.dp > 1 else None,
            attn_cp_rank=0,
            moe_dp_rank=0,
        )

    def _chunk_cache(self):
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.chunk_cache import ChunkCache

        return ChunkCache(
            CacheInitParams(
                disable=True,
                req_to_token_pool=self.runner.req_to_token_pool,
                token_to_kv_pool_allocator=self.runner.token_to_kv_pool_allocator,
                page_size=self.runner.page_size,
            )
        )

    def run(self) -> None:
        import torch

        with torch.inference_mode():
            batch = self._prefill()
            for _ in range(1, self.layout.steps):
                if batch is not None:
                    fed_back = [tokens[-1] for tokens in self.tokens]
                    batch.output_ids = torch.tensor(fed_back, device=self.runner.device)
                    batch.prepare_for_decode()
                self._take_tokens(self._forward(batch))

    def _prefill(self):
        """All prompts in chunks; the batch of the last round holds them all and goes on to decode.

        Prompts end together, so a short one joins late, and a DP rank whose prompts are all short is idle first.
        """
        requests = [self._request(index, prompt) for index, prompt in enumerate(self.prompts)]
        batch = logits = None
        for remaining in reversed(range(self.layout.prefill_rounds)):
            joining = [request for request in requests if self._extend_to(request, remaining)]
            batch = self._schedule_batch(joining)
            if joining:
                batch.prepare_for_extend()
            logits = self._forward(batch if joining else None)
        self._take_tokens(logits)
        return batch if requests else None

    def _request(self, index: int, prompt: Prompt):
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        sampling = SamplingParams(temperature=0, max_new_tokens=self.layout.steps)
        request = Req(
            rid=str(index), origin_input_text="", origin_input_ids=list(prompt), sampling_params=sampling
        )
        request.fill_ids = []
        request.logprob_start_len = -1
        return request

    def _extend_to(self, request, remaining_rounds: int) -> bool:
        """Sets ``request`` up for this round's chunk; False if it has none yet."""
        done, end = len(request.fill_ids), len(request.origin_input_ids) - remaining_rounds * self.layout.chunk
        if end <= 0:
            return False
        if done:
            slots = self.runner.req_to_token_pool.req_to_token[request.req_pool_idx, :done]
            request.prefix_indices = slots.to(request.prefix_indices.dtype)
        request.fill_ids = request.origin_input_ids[:end]
        request.set_extend_input_len(end - done)
        return True

    def _schedule_batch(self, requests):
        from sglang.srt.managers.schedule_batch import ScheduleBatch
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        return ScheduleBatch.init_new(
            reqs=requests,
            req_to_token_pool=self.runner.req_to_token_pool,
            token_to_kv_pool_allocator=self.runner.token_to_kv_pool_allocator,
            tree_cache=self.tree_cache,
            model_config=self.runner.model_config,
            enable_overlap=False,
            spec_algorithm=SpeculativeAlgorithm.NONE,
        )

    def _idle_batch(self):
        batch = self._schedule_batch([])
        batch.prepare_for_idle()
        return batch

    def _forward(self, batch):
        """Logits [requests, vocab] of one step, or None where this rank has no batch and its peers neither."""
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch
        from sglang.srt.utils import require_mlp_sync

        if require_mlp_sync(self.server_args):
            batch = self._agree_on_token_counts(batch)
        if batch is None:
            return None
        forward_batch = ForwardBatch.init_new(batch.get_model_worker_batch(), self.runner)
        return self.runner.forward(forward_batch).logits_output.next_token_logits

    def _agree_on_token_counts(self, batch):
        """What the scheduler does before each step under DP attention: an idle rank gets an IDLE batch."""
        from sglang.srt.layers.dp_attention import get_attention_tp_size
        from sglang.srt.managers.scheduler_dp_attn_mixin import prepare_mlp_sync_batch_raw
        from sglang.srt.utils import require_mlp_tp_gather

        return prepare_mlp_sync_batch_raw(
            batch,
            dp_size=self.layout.dp,
            attn_tp_size=get_attention_tp_size(),
            attn_cp_size=1,
            tp_group=self.runner.tp_group,
            get_idle_batch=self._idle_batch,
            disable_cuda_graph=self.server_args.disable_cuda_graph,
            require_mlp_tp_gather=require_mlp_tp_gather(self.server_args),
            disable_overlap_schedule=True,
            offload_tags=set(),
        )

    def _take_tokens(self, logits) -> None:
        """Keeps the log-probabilities of one step and chooses its tokens: greedy, or the forced ones."""
        if not self.prompts:
            return
        assert logits.shape[0] == len(self.prompts), f"{logits.shape[0]} rows of logits for {len(self.prompts)} prompts"
        logprobs = logits.float().log_softmax(dim=-1).cpu()
        for index, row in enumerate(logprobs):
            step = len(self.tokens[index])
            forced = self.layout.forced_tokens
            token = int(row.argmax()) if forced is None else forced[self.dp_rank][index][step]
            self.tokens[index].append(token)
            self.logprobs[index].append(row.numpy())
