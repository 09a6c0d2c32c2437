"""Nodes of one server that were not started alike: told before anything is built on it.

Each node has a command line, an environment and a checkpoint of its own. The ranks of two nodes that differ in what
decides who talks to whom, and when, wait for each other for ever, or add up what does not belong together.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pprint import saferepr  # repr, with keys in one order: a checkpoint that was saved anew may have them in another
from typing import Any

from sglang_minimax import __version__
from sglang_minimax.adjustments import EngineModule, EngineObject
from sglang_minimax.overlay import folder
from sglang_minimax.server_arguments import is_minimax

ANSWER_SECONDS = 120.0
"""In which every rank must have said how it was started. They met a moment before, when the engine connected them."""

FLAGS = (
    # How the model is divided.
    "tp_size", "pp_size", "dp_size", "ep_size", "moe_dp_size", "attn_cp_size", "moe_dense_tp_size",
    "enable_dp_attention", "enable_dp_lm_head", "enable_attn_tp_input_scattered",
    "ep_num_redundant_experts", "ep_dispatch_algorithm", "init_expert_location", "enable_eplb", "eplb_algorithm",
    "eplb_rebalance_num_iterations", "eplb_rebalance_layers_per_chunk", "eplb_min_rebalancing_utilization_threshold",
    "expert_distribution_recorder_mode",
    # What is computed. The ranks of a group draw each token for themselves.
    "dtype", "quantization", "kv_cache_dtype", "enable_fp32_lm_head", "sampling_backend", "grammar_backend",
    "json_model_override_args", "enable_lora", "max_loras_per_batch", "enable_deterministic_inference",
    "speculative_accept_threshold_single", "speculative_accept_threshold_acc",
    "speculative_algorithm", "speculative_num_steps", "speculative_eagle_topk", "speculative_num_draft_tokens",
    # Each rank has its grammars, and what they allow begins behind the reasoning.
    "reasoning_parser", "skip_tokenizer_init", "constrained_json_whitespace_pattern",
    "constrained_json_disable_any_whitespace",
    # By which collectives.
    "moe_a2a_backend", "deepep_mode", "disable_custom_all_reduce", "enable_mscclpp", "enable_torch_symm_mem",
    "enable_symm_mem", "enable_nccl_nvls", "enable_flashinfer_allreduce_fusion", "enable_memory_saver", "enable_pdmux",
    # In which batches: each rank's scheduler comes to its own decision, from the same requests.
    "context_length", "allow_auto_truncate", "page_size", "max_total_tokens", "mem_fraction_static",
    "max_running_requests", "max_prefill_tokens", "chunked_prefill_size",
    "prefill_max_requests", "schedule_policy", "schedule_conservativeness", "enable_priority_scheduling",
    "max_queued_requests", "scheduler_recv_interval", "enable_prefill_delayer", "enable_dynamic_chunking",
    "radix_eviction_policy", "disable_radix_cache", "enable_hierarchical_cache", "disable_overlap_schedule",
    "enable_mixed_chunk", "num_continuous_decode_steps", "enable_two_batch_overlap", "enable_single_batch_overlap",
    "pp_max_micro_batch_size", "pp_async_batch_depth", "disaggregation_mode",
    # And which of them are captured, collectives included.
    "disable_cuda_graph", "cuda_graph_bs", "disable_cuda_graph_padding", "disable_piecewise_cuda_graph",
    "piecewise_cuda_graph_tokens", "enable_torch_compile",
)  # fmt: skip
"""Fields of the engine's ``ServerArgs``. Not among them is what a node may have for itself: where its checkpoint lies,
addresses, logs, and kernels that exchange nothing. The memory for a cache is among them: without a pipeline each rank
makes its own of it, and would run other batches than its peers."""

CONFIG = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "num_local_experts", "num_experts_per_tok", "intermediate_size", "quantization_config",
)  # fmt: skip
"""Fields of the checkpoint's ``config.json``."""


def facts_of(server_args: EngineObject) -> dict[str, str]:
    """What must be the same on every rank, in words, by its name."""
    config = server_args.get_model_config().hf_config
    facts = {"sglang-minimax": f"{__version__} ({_digest()})"}
    facts |= {f"--{name.replace('_', '-')}": saferepr(getattr(server_args, name)) for name in FLAGS}
    return facts | {f"{name} of config.json": saferepr(getattr(config, name, None)) for name in CONFIG}


@functools.cache
def _digest() -> str:
    """Of our files, the same in a checkout and in a wheel: two builds may have one version."""
    digest, package = hashlib.sha256(), os.path.dirname(os.path.abspath(__file__))
    for root in (package, folder()):
        for path, folders, files in os.walk(root):
            folders[:] = sorted(name for name in folders if name not in ("laid_over", "__pycache__"))
            for name in sorted(files):
                if name.endswith((".py", ".json")):
                    digest.update(os.path.relpath(os.path.join(path, name), root).encode())
                    with open(os.path.join(path, name), "rb") as file:
                        digest.update(file.read())
    return digest.hexdigest()[:12]


def check_ranks_agree(facts: dict[str, str], group: Any) -> None:
    """Collective over ``group``, of torch.distributed and on CPUs.

    Args:
        facts: this rank's, of :func:`facts_of`.

    Raises:
        RuntimeError: on every rank, that the facts differ, which of them and on which ranks; or that a rank did not
            say its own in ``ANSWER_SECONDS``.
    """
    import torch.distributed as dist

    if dist.get_backend(group) == "gloo":
        try:
            dist.monitored_barrier(group, timeout=timedelta(seconds=ANSWER_SECONDS), wait_all_ranks=True)
        except RuntimeError as error:
            raise RuntimeError(
                f"Not every rank said within {ANSWER_SECONDS:.0f} s how its node was started. Where sglang-minimax is "
                f"not installed, or switched off by SGLANG_MINIMAX_OVERLAY=0, the stock engine runs, and beside it no "
                f"rank of ours can. Start every node with it. ({str(error).splitlines()[0]})"
            ) from error
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, facts, group=group)
    if differences := list(_differences(everyone)):
        raise RuntimeError("\n  ".join([
            "The nodes of this server were not started alike: ranks would wait for ever, or answer wrongly.",
            *differences,
            "Start every node by the same command but for --node-rank, with the same sglang-minimax and checkpoint.",
        ]))  # fmt: skip


def _differences(everyone: Sequence[dict[str, str]]) -> Iterator[str]:
    """A line for each fact that is not the same on all ranks."""
    for name in dict.fromkeys(name for facts in everyone for name in facts):
        ranks_by_value: dict[str, list[int]] = {}
        for rank, facts in enumerate(everyone):
            ranks_by_value.setdefault(facts.get(name, "not known"), []).append(rank)
        if len(ranks_by_value) > 1:
            yield f"{name}: " + ", ".join(
                f"{value} on {ranks_in_words(ranks)}" for value, ranks in ranks_by_value.items()
            )


def ranks_in_words(ranks: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "ranks 0-2, 5"."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][-1] + 1:
            spans[-1].append(rank)
        else:
            spans.append([rank])
    words = ", ".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans)
    return f"rank{'s' * (len(ranks) > 1)} {words}"


def check_before_groups_are_made(module: EngineModule) -> None:
    """Once all ranks are connected, and before they make groups, which these facts decide."""
    engine = module.initialize_model_parallel

    @functools.wraps(engine)
    def initialize_model_parallel(*args: Any, **kwargs: Any) -> None:
        server_args = module.get_global_server_args()
        if server_args.nnodes > 1 and is_minimax(server_args.get_model_config()):
            from sglang.srt.distributed.parallel_state import get_world_group

            check_ranks_agree(facts_of(server_args), get_world_group().cpu_group)
        engine(*args, **kwargs)

    module.initialize_model_parallel = initialize_model_parallel


ADJUSTMENTS = [("sglang.srt.model_executor.model_runner", check_before_groups_are_made)]
