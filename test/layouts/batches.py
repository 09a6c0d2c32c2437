"""What one rank of a layout does: loads its model and steps through the batches that the engine's scheduler would form.

In every turn a DP rank with prompts left to prefill extends all of them by one chunk, else it decodes all that run;
with neither it takes an IDLE batch while others work. So ranks meet in all combinations: one extends while another
decodes and a third idles.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from layouts.harness import Layout


def run_rank(layout: Layout, rank: int) -> dict:
    """Runs ``rank`` of ``layout`` in this process, which belongs to it, and returns what it reports."""
    started = time.monotonic()
    batches = RankBatches(layout, rank)
    finish = layout.probe(batches.runner) if layout.probe else lambda: None
    loaded = time.monotonic()
    if layout.steps:
        batches.run()
    return {
        "tokens": batches.tokens,
        "logprobs": [np.stack(rows) if rows else None for rows in batches.logprobs],
        "cached": batches.cached,
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
        pp_size=layout.pp,
        ep_size=layout.ep,
        dp_size=layout.dp,
        enable_dp_attention=layout.dp > 1,
        # Under DP attention a batch is padded to a multiple of an attention group's ranks.
        max_running_requests=(requests + layout.tp // layout.dp) * layout.dp,
        max_total_tokens=tokens + 256,
        cuda_graph_max_bs=requests,
        disable_radix_cache=True,
        random_seed=0,
    )
    if layout.shares_gpus:  # both store to the GPUs of peers, which must have one each
        arguments |= dict(disable_custom_all_reduce=True, enforce_disable_flashinfer_allreduce_fusion=True)
    return ServerArgs(**(arguments | dict(layout.server_arguments)))


class RankBatches:
    """One rank's model runner and the batches it steps through.

    Indexed like the DP rank's prompts: ``tokens``, ``logprobs`` (on the last pipeline stage) and ``cached``, how many
    tokens of the prompt were found in the prefix cache.
    """

    def __init__(self, layout: Layout, rank: int) -> None:
        from sglang.srt.layers.moe import initialize_moe_config
        from sglang.srt.layers.quantization.fp4_utils import initialize_fp4_gemm_config
        from sglang.srt.layers.quantization.fp8_utils import initialize_fp8_gemm_config

        self.layout = layout
        self.pp_rank, self.tp_rank = divmod(rank, layout.tp)
        self.dp_rank = self.tp_rank // (layout.tp // layout.dp)
        self.prompts = layout.prompts_by_dp_rank[self.dp_rank]
        self.tokens: list[list[int]] = [[] for _ in self.prompts]
        self.logprobs: list[list[np.ndarray]] = [[] for _ in self.prompts]
        self.server_args = server_args_of(layout)
        for initialize in (initialize_moe_config, initialize_fp8_gemm_config, initialize_fp4_gemm_config):
            initialize(self.server_args)
        self.runner = self._load_model(gpu_id=0 if layout.shares_gpus else rank)
        self.tree_cache = self._prefix_cache()
        self.requests = [self._request(index, prompt) for index, prompt in enumerate(self.prompts)]
        self.running = self._schedule_batch([])

    @property
    def cached(self) -> list[int]:
        return [request.cached_tokens for request in self.requests]

    def _load_model(self, gpu_id: int):
        from sglang.srt.configs.model_config import ModelConfig
        from sglang.srt.entrypoints.engine import _compute_parallelism_ranks
        from sglang.srt.model_executor.model_runner import ModelRunner

        attn_cp_rank, moe_dp_rank, moe_ep_rank = _compute_parallelism_ranks(self.server_args, self.tp_rank)
        return ModelRunner(
            model_config=ModelConfig.from_server_args(self.server_args),
            mem_fraction_static=self.server_args.mem_fraction_static,
            gpu_id=gpu_id,
            tp_rank=self.tp_rank,
            tp_size=self.layout.tp,
            moe_ep_rank=moe_ep_rank,
            moe_ep_size=self.layout.ep,
            pp_rank=self.pp_rank,
            pp_size=self.layout.pp,
            nccl_port=0,  # not used: the store's address comes from the environment
            server_args=self.server_args,
            dp_rank=self.dp_rank if self.layout.dp > 1 else None,
            attn_cp_rank=attn_cp_rank,
            moe_dp_rank=moe_dp_rank,
        )

    def _prefix_cache(self):
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.chunk_cache import ChunkCache
        from sglang.srt.mem_cache.radix_cache import RadixCache

        return (ChunkCache if self.server_args.disable_radix_cache else RadixCache)(
            CacheInitParams(
                disable=self.server_args.disable_radix_cache,
                req_to_token_pool=self.runner.req_to_token_pool,
                token_to_kv_pool_allocator=self.runner.token_to_kv_pool_allocator,
                page_size=self.runner.page_size,
            )
        )

    # --- Which batch comes next --------------------------------------------------------------------------

    def run(self) -> None:
        """Turn by turn, until no DP rank has anything left."""
        from sglang.srt.utils import DynamicGradMode, require_mlp_sync

        last_arrival = max(turn for turns in self.layout.arrivals for turn in turns)
        with DynamicGradMode():  # as the engine's scheduler does: its graphs are not made in inference mode
            for turn in itertools.count():
                batch = self._next_batch(turn)
                if require_mlp_sync(self.server_args):
                    batch = self._agree_on_token_counts(batch)
                if batch is not None:
                    self._step(batch)
                elif turn >= last_arrival:
                    return

    def _next_batch(self, turn: int):
        """The batch to extend, else the one to decode, else None."""
        prefilling = [
            request
            for request, arrives, tokens in zip(
                self.requests, self.layout.arrivals[self.dp_rank], self.tokens, strict=True
            )
            if arrives <= turn and not tokens
        ]
        if self.running.reqs and (self.server_args.enable_mixed_chunk or not prefilling):
            self.running.prepare_for_decode()
        if not prefilling:
            return self.running if self.running.reqs else None
        for request in prefilling:
            self._take_next_chunk(request)
        batch = self._schedule_batch(prefilling)
        batch.prepare_for_extend()
        if self.running.reqs and self.server_args.enable_mixed_chunk:
            batch.mix_with_running(self.running)
            self.running = self._schedule_batch([])
        return batch

    def _take_next_chunk(self, request) -> None:
        """Sets ``request`` up for at most a chunk of the tokens behind those that it, or the prefix cache, has."""
        if request.req_pool_idx is None:
            request.init_next_round_input(self.tree_cache)
            self.tree_cache.inc_lock_ref(request.last_node)
        else:
            request.init_next_round_input()
        length = min(request.extend_input_len, self.layout.chunk)
        request.fill_ids = request.fill_ids[: len(request.prefix_indices) + length]
        request.set_extend_input_len(length)

    def _request(self, index: int, prompt):
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        request = Req(
            rid=str(index),
            origin_input_text="",
            origin_input_ids=list(prompt),
            sampling_params=SamplingParams(temperature=0, max_new_tokens=self.layout.steps),
            return_hidden_states=self.layout.hidden_states,
        )
        request.logprob_start_len = -1
        return request

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

    def _agree_on_token_counts(self, batch):
        """What the scheduler does before each step under DP attention: an idle rank gets an IDLE batch."""
        from sglang.srt.layers.dp_attention import get_attention_tp_size
        from sglang.srt.managers.scheduler_dp_attn_mixin import prepare_mlp_sync_batch_raw
        from sglang.srt.utils import require_mlp_tp_gather

        return prepare_mlp_sync_batch_raw(
            batch,
            dp_size=self.layout.dp,
            attn_tp_size=get_attention_tp_size(),
            attn_cp_size=self.server_args.attn_cp_size,
            tp_group=self.runner.tp_group,
            get_idle_batch=self._idle_batch,
            disable_cuda_graph=self.server_args.disable_cuda_graph,
            require_mlp_tp_gather=require_mlp_tp_gather(self.server_args),
            disable_overlap_schedule=True,
            offload_tags=set(),
        )

    # --- One step ----------------------------------------------------------------------------------------

    def _step(self, batch) -> None:
        """Runs ``batch``, takes its tokens, and leaves in ``running`` what goes on to decode."""
        import torch
        from sglang.srt.mem_cache.common import release_kv_cache

        logits = self._forward(batch)
        if not batch.reqs:
            return
        chosen = self._choose(batch.reqs, logits)
        batch.output_ids = torch.tensor(chosen, device=self.runner.device)
        go_on = []
        for position, (request, token) in enumerate(zip(batch.reqs, chosen, strict=True)):
            if not self._is_prefilled(request):
                self.tree_cache.cache_unfinished_req(request, chunked=True)
                continue
            first = not request.output_ids
            request.output_ids.append(token)
            if len(request.output_ids) == self._length(request):
                release_kv_cache(request, self.tree_cache)
                continue
            go_on.append(position)
            if first:
                self.tree_cache.cache_unfinished_req(request)
        batch.filter_batch(keep_indices=go_on)
        if batch is not self.running and batch.reqs:
            if self.running.reqs:
                self.running.merge_batch(batch)
            else:
                self.running = batch

    def _forward(self, batch):
        """Logits [requests, vocab] of one step; None but on the last pipeline stage."""
        from sglang.srt.distributed import get_attn_tp_group
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch, PPProxyTensors

        pp_group = self.runner.pp_group
        shared_by = get_attn_tp_group()  # as the scheduler does: each sends a part of what all of them hold
        received = None
        if not pp_group.is_first_rank:
            received = PPProxyTensors(pp_group.recv_tensor_dict(all_gather_group=shared_by))
        forward_batch = ForwardBatch.init_new(batch.get_model_worker_batch(), self.runner)
        output = self.runner.forward(forward_batch, pp_proxy_tensors=received).logits_output
        if pp_group.is_last_rank:
            return output.next_token_logits
        pp_group.send_tensor_dict(output.tensors, all_gather_group=shared_by)
        return None

    def _choose(self, requests, logits) -> list[int]:
        """Each request's next token: greedy, or the forced one. Keeps what it was chosen from.

        The last pipeline stage chooses, and tells the others. A request in the middle of its prompt gets a token that
        nobody uses.
        """
        pp_group = self.runner.pp_group
        chosen = self._choose_from(requests, logits) if pp_group.is_last_rank else None
        chosen = pp_group.broadcast_object(chosen, src=pp_group.world_size - 1)
        for request, token in zip(requests, chosen, strict=True):
            if self._is_prefilled(request):
                self.tokens[int(request.rid)].append(token)
        return chosen

    def _choose_from(self, requests, logits) -> list[int]:
        assert logits.shape[0] == len(requests), f"{logits.shape[0]} rows of logits for {len(requests)} requests"
        chosen = []
        for request, row in zip(requests, logits.float().log_softmax(dim=-1).cpu(), strict=True):
            index, forced = int(request.rid), self.layout.forced_tokens
            step = len(self.tokens[index])
            chosen.append(int(row.argmax()) if forced is None else forced[self.dp_rank][index][step])
            if self._is_prefilled(request):
                self.logprobs[index].append(row.numpy())
        return chosen

    def _is_prefilled(self, request) -> bool:
        return len(request.fill_ids) >= len(request.origin_input_ids)

    def _length(self, request) -> int:
        """How many tokens ``request`` gets."""
        return self.layout.lengths[self.dp_rank][int(request.rid)]
