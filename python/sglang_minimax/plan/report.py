"""All that is said about one layout, as plain data: what ``--json`` prints and what the screen renders."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, replace

from sglang_minimax import sharding
from sglang_minimax.plan.hardware import Gpu
from sglang_minimax.plan.layout import Flags, Layout, neighbours, settle
from sglang_minimax.plan.memory import BEFORE_LOADING_MIB, Memory, plan_memory
from sglang_minimax.plan.paths import Path, commands, paths
from sglang_minimax.plan.shape import ModelShape

NUM_NEAREST = 4

BASIS = (
    "Weights are the exact bytes of the parameters that the model makes. KV cache follows from the engine's formulas, "
    f"and from {BEFORE_LOADING_MIB / 1024:.0f} GiB for what CUDA and NCCL take before. A load at TP2 on H200 logged "
    "0.3% more weights, and 0.1% fewer tokens of KV cache for the memory that was free."
)


@dataclass(frozen=True)
class RankHolds:
    """What one TP rank holds of every layer. Heads, experts and columns are (first, last), both included.

    kv_replicas: how many ranks of its attention-TP group hold the same KV head.
    """

    rank: int
    dp_rank: int
    q_heads: tuple[int, int]
    kv_heads: tuple[int, int]
    kv_replicas: int
    experts: tuple[int, int]
    expert_columns: tuple[int, int]


@dataclass(frozen=True)
class Report:
    """A layout that works, with what follows from it, or a rule that fails, with the nearest layouts that keep all.

    broken_rule: None where the layout works; the fields after ``nearest`` are None or empty where it does not.
    """

    model: ModelShape
    gpu: Gpu
    flags: Flags
    broken_rule: str | None
    nearest: list[Flags]
    layout: Layout | None = None
    ranks: list[RankHolds] = dataclasses.field(default_factory=list)
    stages: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    memory: Memory | None = None
    paths: list[Path] = dataclasses.field(default_factory=list)
    commands: list[str] = dataclasses.field(default_factory=list)

    def as_data(self) -> dict[str, object]:
        """For JSON: the fields of this and of what it holds, and in words what was not checked."""
        data = dataclasses.asdict(self)
        data["valid"] = self.broken_rule is None
        data["nearest"] = [" ".join(flags.words()) for flags in self.nearest]
        if self.layout is not None and self.memory is not None:
            data["layout"]["gpus"] = self.layout.gpus
            data["memory"]["weights_total"] = sum(self.memory.weights.values())
            data["basis"] = BASIS
        return data


def make_report(model: ModelShape, flags: Flags, gpu: Gpu) -> Report:
    """What is to be said about ``flags``; a layout that cannot work is a report too."""
    try:
        layout = settle(flags, model, gpu)
        memory = plan_memory(model, layout, gpu)
    except ValueError as error:
        return Report(model, gpu, flags, str(error).rstrip("."), nearest_that_work(model, flags, gpu))
    stages = [sharding.pipeline_layers(model.num_hidden_layers, stage, layout.pp) for stage in range(layout.pp)]
    return Report(
        model, gpu, flags, None, [], layout,
        ranks=rank_holds(model, layout),
        stages=[(stage[0], stage[-1]) for stage in stages],
        memory=memory,
        paths=paths(model, layout, gpu),
        commands=commands(model, layout),
    )  # fmt: skip


def rank_holds(model: ModelShape, layout: Layout) -> list[RankHolds]:
    """What every TP rank holds, in rank order."""
    shards = sharding.shard_attention(model.num_attention_heads, model.num_key_value_heads, layout.attention_ranks)
    return divided(
        shards, model.experts, layout.tp, layout.ep,
        attn_cp_size=layout.flags.attn_cp_size, moe_dp_size=layout.flags.moe_dp_size,
    )  # fmt: skip


def divided(
    shards: sharding.AttentionShards,
    experts: sharding.ExpertShape,
    tp: int,
    ep: int,
    *,
    attn_cp_size: int = 1,
    moe_dp_size: int = 1,
) -> list[RankHolds]:
    """The same from the numbers alone. In the engine's order of ranks, outermost first, attention divides TP into DP,
    context parallelism and attention TP; the experts divide it into copies (``moe_dp_size``), EP and widths."""
    attention_ranks, expert_ranks = shards.q.num_ranks, tp // moe_dp_size
    holds = []
    for rank in range(tp):
        attention_rank, expert_rank = rank % attention_ranks, rank % expert_ranks
        parts = (
            shards.q.heads_of(attention_rank),
            shards.kv.heads_of(attention_rank),
            experts.experts_of(expert_rank, expert_ranks, ep),
            experts.columns_of(expert_rank, expert_ranks, ep),
        )
        q, kv, held, columns = ((part[0], part[-1]) for part in parts)
        dp_rank = rank // (attention_ranks * attn_cp_size)
        holds.append(RankHolds(rank, dp_rank, q, kv, shards.kv.replicas, held, columns))
    return holds


def nearest_that_work(model: ModelShape, flags: Flags, gpu: Gpu) -> list[Flags]:
    """What works and keeps the most of ``flags``, on at most 16 GPUs or as many as were asked for, each once."""
    seen = set()

    def is_new_and_works(other: Flags) -> bool:
        try:
            layout = settle(other, model, gpu)
            plan_memory(model, layout, gpu)
        except ValueError:
            return False
        is_new = (same := (layout.ep, replace(other, ep=None))) not in seen  # --ep left out is some EP too
        seen.add(same)
        return is_new

    context, fraction = flags.context_length, flags.mem_fraction_static
    mended = replace(
        flags,
        context_length=context if context is None or 1 <= context <= model.max_position_embeddings else None,
        mem_fraction_static=fraction if fraction is None or 0 < fraction < 1 else None,
    )
    candidates = [mended, *neighbours(mended, max(16, min(flags.tp * flags.pp, 64)))]
    return list(itertools.islice(filter(is_new_and_works, candidates), NUM_NEAREST))
