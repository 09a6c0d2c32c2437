"""How MiniMax-M2 is divided over ranks, as arithmetic of integers.

No torch and no process group is needed here: the model, the checks of the server's arguments, the planner and
the tests all call these functions, so that a layout means one thing everywhere.

Words used throughout:
    attention TP   the ranks that share one sequence's attention: tp / dp under DP attention, else tp.
    experts TP     the ranks that divide one expert's width between them: tp / ep / moe_dp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm


@dataclass(frozen=True)
class HeadShards:
    """How ``num_heads`` heads lie on ``num_ranks`` ranks.

    Either every rank holds ``heads_per_rank`` heads of its own (``replicas == 1``), or every head is held by
    ``replicas`` neighbouring ranks (``heads_per_rank == 1``).
    """

    num_heads: int
    num_ranks: int
    heads_per_rank: int
    replicas: int

    @property
    def num_shards(self) -> int:
        """How many different shards there are; each is held by ``replicas`` ranks."""
        return self.num_ranks // self.replicas

    def shard_of(self, rank: int) -> int:
        """The shard that ``rank`` holds: neighbours share, as in the engine's ``QKVParallelLinear``."""
        if not 0 <= rank < self.num_ranks:
            raise ValueError(f"rank {rank} is not one of the {self.num_ranks} ranks 0..{self.num_ranks - 1}")
        return rank // self.replicas

    def heads_of(self, rank: int) -> range:
        """The heads that ``rank`` holds."""
        first = self.shard_of(rank) * self.heads_per_rank
        return range(first, first + self.heads_per_rank)


def shard_heads(num_heads: int, num_ranks: int, what: str = "heads") -> HeadShards:
    """Divides ``num_heads`` heads over ``num_ranks`` attention-TP ranks.

    Args:
        num_heads: heads of the whole model, q or KV.
        num_ranks: ranks of the attention-TP group.
        what: what to call the heads in an error.

    Raises:
        ValueError: neither number is a multiple of the other.
    """
    if num_heads < 1 or num_ranks < 1:
        raise ValueError(f"{num_heads} {what} over {num_ranks} attention-TP ranks: both must be at least 1")
    if num_heads % num_ranks == 0:
        return HeadShards(num_heads, num_ranks, num_heads // num_ranks, 1)
    if num_ranks % num_heads == 0:
        return HeadShards(num_heads, num_ranks, 1, num_ranks // num_heads)
    raise ValueError(
        f"{num_heads} {what} cannot be divided over {num_ranks} attention-TP ranks: one number must be a multiple "
        f"of the other. The nearest numbers of ranks that work: {_joined(nearest_rank_counts(num_heads, num_ranks))}"
    )


def nearest_rank_counts(num_heads: int, num_ranks: int) -> list[int]:
    """The valid numbers of ranks next below and next above ``num_ranks``."""

    def valid(ranks: int) -> bool:
        return num_heads % ranks == 0 or ranks % num_heads == 0

    below = next(ranks for ranks in range(num_ranks, 0, -1) if valid(ranks))
    above = next(ranks for ranks in range(num_ranks, num_ranks + num_heads + 1) if valid(ranks))
    return sorted({below, above})


@dataclass(frozen=True)
class AttentionShards:
    """The q heads and the KV heads of one attention layer on its attention-TP ranks."""

    q: HeadShards
    kv: HeadShards


def shard_attention(num_q_heads: int, num_kv_heads: int, num_ranks: int) -> AttentionShards:
    """Divides one attention layer; q heads are never replicated, KV heads may be.

    Raises:
        ValueError: the q heads are not a multiple of the ranks, the KV heads do not divide, or a rank's q heads
            would not all read the KV heads that the rank holds.
    """
    kv = shard_heads(num_kv_heads, num_ranks, "KV heads")
    if num_q_heads % num_ranks != 0:
        works = [n for n in range(1, num_q_heads + 1) if _attention_works(num_q_heads, num_kv_heads, n)]
        raise ValueError(
            f"{num_q_heads} q heads cannot be divided over {num_ranks} attention-TP ranks: q heads are never "
            f"replicated. Numbers of ranks that work for {num_q_heads} q and {num_kv_heads} KV heads: {_joined(works)}"
        )
    if num_q_heads % num_kv_heads != 0:
        raise ValueError(
            f"{num_q_heads} q heads cannot share {num_kv_heads} KV heads: the first must be a multiple of the second"
        )
    return AttentionShards(shard_heads(num_q_heads, num_ranks, "q heads"), kv)


def _attention_works(num_q_heads: int, num_kv_heads: int, num_ranks: int) -> bool:
    return num_q_heads % num_ranks == 0 and (num_kv_heads % num_ranks == 0 or num_ranks % num_kv_heads == 0)


VOCABULARY_PADDING = 64  # the engine pads the vocabulary to a multiple of this before it divides it


def padded_vocabulary(vocab_size: int) -> int:
    """Rows of the embedding, and of the head, over all ranks."""
    return -(-vocab_size // VOCABULARY_PADDING) * VOCABULARY_PADDING


def check_vocabulary(vocab_size: int, num_ranks: int) -> None:
    """Checks that embedding or head can be divided over ``num_ranks`` ranks.

    Raises:
        ValueError: the padded vocabulary is no multiple of the ranks.
    """
    padded = padded_vocabulary(vocab_size)
    if padded % num_ranks != 0:
        works = [ranks for ranks in range(1, 2 * num_ranks + 1) if padded % ranks == 0]
        raise ValueError(
            f"the vocabulary of {vocab_size} words, padded to {padded}, cannot be divided over {num_ranks} ranks. "
            f"Numbers of ranks that work: {_joined(works)}"
        )


def attention_tp_size(tp_size: int, dp_size: int = 1, attn_cp_size: int = 1) -> int:
    """Ranks of one attention-TP group. ``dp_size`` counts only under DP attention.

    Raises:
        ValueError: ``tp_size`` is not a multiple of ``dp_size * attn_cp_size``.
    """
    if tp_size % (dp_size * attn_cp_size) != 0:
        raise ValueError(
            f"--tp {tp_size} must be a multiple of --dp {dp_size} times the context-parallel size {attn_cp_size}"
        )
    return tp_size // (dp_size * attn_cp_size)


def reason_against_context_parallelism(dp_groups: int, attn_cp_size: int) -> str | None:
    """Why the engine would end the server at its first batch, or answer wrongly, or None.

    It gathers the tokens of all DP ranks over all of TP, into a buffer that has no room for the context-parallel ranks'
    copies of them, or adds these copies up.

    Args:
        dp_groups: DP ranks under DP attention, else 1.
    """
    if dp_groups > 1 and attn_cp_size > 1:
        return (
            f"--dp {dp_groups} --enable-dp-attention and --attn-cp-size {attn_cp_size}: the engine gathers the tokens "
            f"of DP ranks without regard to context parallelism, whose ranks hold the same ones. Leave out either"
        )
    return None


def tp_ranks_per_node(tp_size: int, pp_size: int = 1, nnodes: int = 1) -> int:
    """Ranks of one TP group that share a node: the engine fills nodes in the order of ranks, stage by stage."""
    return tp_size // max(nnodes // pp_size, 1)


def counterpart_of(rank: int, num_ranks: int) -> int:
    """The rank at the same place on the other node, of ``num_ranks`` that lie on two nodes, one half each."""
    return (rank + num_ranks // 2) % num_ranks


@dataclass(frozen=True)
class ExpertShape:
    """What of the experts decides how they can be divided.

    ``num_experts`` counts redundant ones; ``width`` is ``intermediate_size``; ``block`` is the number of columns
    and rows that one quantisation scale covers, or a kernel takes at once, 1 where the width may be cut anywhere.
    """

    num_experts: int
    width: int
    block: int = 1

    def works(self, tp_size: int, ep_size: int, moe_dp_size: int = 1) -> bool:
        return self.reason_against(tp_size, ep_size, moe_dp_size) is None

    def reason_against(self, tp_size: int, ep_size: int, moe_dp_size: int = 1) -> str | None:
        """The first rule that this division breaks, as a sentence, or None."""
        groups = ep_size * moe_dp_size
        if ep_size < 1 or tp_size % groups != 0:
            copies = f" times --moe-dp-size {moe_dp_size}" if moe_dp_size > 1 else ""
            return f"--tp {tp_size} is not a multiple of --ep {ep_size}{copies}"
        if moe_dp_size > 1 and ep_size > 1 and groups != tp_size:
            return f"--ep {ep_size} (which is not 1) times --moe-dp-size {moe_dp_size} is not --tp {tp_size}"
        if self.num_experts % ep_size != 0:
            return f"{self.num_experts} experts are not a multiple of --ep {ep_size}"
        ranks = tp_size // groups
        if self.width % ranks != 0:
            return f"the expert width {self.width} is not a multiple of the {ranks} ranks that divide it"
        if (self.width // ranks) % self.block != 0:
            return (
                f"the expert width a rank, {self.width} / {ranks} = {self.width // ranks}, is not a multiple of the "
                f"quantisation block {self.block}"
            )
        return None

    def experts_of(self, rank: int, tp_size: int, ep_size: int) -> range:
        """The experts of which ``rank`` holds a part; neighbours share. For ``moe_dp_size`` 1."""
        held = self.num_experts // ep_size
        first = rank // (tp_size // ep_size) * held
        return range(first, first + held)

    def columns_of(self, rank: int, tp_size: int, ep_size: int) -> range:
        """The columns of each of those experts that ``rank`` holds."""
        ranks = tp_size // ep_size
        first = rank % ranks * (self.width // ranks)
        return range(first, first + self.width // ranks)


def reason_against_a2a_backend(a2a_backend: str, pp_size: int, attention_ranks: int, servers: int) -> str | None:
    """Why the engine cannot keep tokens apart between layers, on the ranks that share attention, as it does with an a2a
    backend; a sentence without its full stop, or None.

    Args:
        attention_ranks: of one attention-TP group.
        servers: copies of the model, ``--dp`` without DP attention.
    """
    if a2a_backend == "none":
        return None
    if servers > 1:
        return (
            f"--dp {servers} without --enable-dp-attention starts {servers} copies of the server, each of which would "
            f"count the tokens of all, and end before its first request, with --moe-a2a-backend {a2a_backend}: give "
            f"--enable-dp-attention, or start each copy by itself, or leave --moe-a2a-backend out"
        )
    if pp_size > 1 and attention_ranks > 1:
        return (
            f"--pp-size {pp_size} with --moe-a2a-backend {a2a_backend}: the {attention_ranks} ranks that share "
            f"attention hold different tokens between layers, and the engine passes a part of each on to the next "
            f"stage as if they held the same, so that answers would be wrong. Leave out either, or give --dp equal to "
            f"--tp with --enable-dp-attention"
        )
    return None


def reason_against_stages_of_triton(stages: Sequence[range]) -> str | None:
    """Why the engine's Triton attention would end a server with these pipeline stages, or None.

    It reads the width of a head from layer 0 of the KV cache, which a later stage lacks; counted backwards, as Python
    does, it is found as long as no more layers come before a stage than are in it.

    Args:
        stages: the layers of each.
    """
    for number, layers in enumerate(stages):
        if layers.start > len(layers):
            return (
                f"--pp-size {len(stages)}: stage {number} has layers {layers[0]} to {layers[-1]} of {stages[-1].stop}, "
                f"and the engine's Triton attention, which fails where a stage has fewer layers than come before it, "
                f"would end the server. Take --attention-backend flashinfer, or fa3, which reads no KV cache in "
                f"fp8_e5m2, or two stages, the second no shorter than the first"
            )
    return None


RUNNERS_WITHOUT_FP8 = ("flashinfer_cutlass", "flashinfer_cutedsl")
"""Values of ``--moe-runner-backend`` for which the engine's FP8 experts make no runner, and look for it in a batch."""


def reason_against_runner(
    method: str | None, runner: str, tp_size: int, ep_size: int, blackwell: bool, a2a: str = "none",
    width: int | None = None,
) -> str | None:  # fmt: skip
    """Why the engine's kernels would end the server, choose other experts, or sum rows that nobody wrote, or None.

    The last: a rank marks routes to other ranks' experts, and cutlass kernels leave such a route's place among the
    rows as it was allocated. The engine refuses it for FP8 itself, but only where the command line names the
    quantisation, and ends at an assertion for NVFP4, in the first step.

    Args:
        method: of quantisation, under the engine's name; that of compressed-tensors with its format.
        runner: ``--moe-runner-backend``. NVFP4 experts run in the cutlass kernels but for modelopt's in
            ``flashinfer_cutlass``.
        blackwell: the GPUs are.
        a2a: ``--moe-a2a-backend``, which sends a rank its own routes only.
        width: columns of an expert on a rank.
    """
    if method == "mxfp8" and runner != "flashinfer_trtllm_routed" and (runner != "cutlass" or ep_size > 1):
        return (
            f"mxfp8 experts run in flashinfer_trtllm_routed, or without --ep in cutlass, and not with --ep {ep_size} "
            f"in {runner}: flashinfer_trtllm, which the engine takes for --quantization mxfp8 where neither is given, "
            f"chooses the experts by rules other than MiniMax-M2's. Add --moe-runner-backend flashinfer_trtllm_routed"
        )
    if method == "fp8" and runner in RUNNERS_WITHOUT_FP8:
        return (
            f"--moe-runner-backend {runner} has no kernels for FP8 experts, and the engine would end the server at its "
            f"first batch. Leave it out"
        )
    if runner == "flashinfer_trtllm_routed" and not blackwell:
        return (
            f"--moe-runner-backend {runner}: FlashInfer compiles these kernels for Blackwell GPUs alone. Leave it out"
        )
    if runner == "flashinfer_trtllm_routed" and method == "modelopt_fp4":
        return f"--moe-runner-backend {runner} has kernels for FP8 and unquantised experts, not for NVFP4. Leave it out"
    if method == "modelopt_fp4" and width is not None and width % 64:
        return (
            f"NVFP4 experts have {width} columns on each rank at --tp {tp_size} --ep {ep_size}, which is not a "
            f"multiple of 64: the engine would end the server once all is loaded. Give --moe-runner-backend "
            f"flashinfer_cutlass with --ep {tp_size}"
        )
    if ep_size == 1 or a2a != "none":
        return None
    if method == "fp8" and runner == "cutlass":
        what, way_out = "sum rows that nobody wrote", "Leave --moe-runner-backend out"
    elif method == "modelopt_fp4" and runner != "flashinfer_cutlass":
        what = "end the server at its first step"
        way_out = f"Leave --ep out, or give --moe-runner-backend flashinfer_cutlass with --ep {tp_size}"
    elif method == "compressed_tensors nvfp4-pack-quantized":
        what, way_out = "end the server at its first step", "Leave --ep out"
    else:
        return None
    return (
        f"{method} experts, --ep {ep_size} and --moe-runner-backend {runner}: the engine's cutlass kernels do not pass "
        f"over routes to other ranks' experts, and would {what}. {way_out}"
    )


def pipeline_layers(num_layers: int, stage: int, num_stages: int) -> range:
    """The layers of one pipeline stage: where they do not divide, the last stages take one more, as in the engine."""
    each, more = divmod(num_layers, num_stages)
    first = stage * each + max(0, stage - (num_stages - more))
    return range(first, first + each + (stage >= num_stages - more))


def expert_shape_of(config, num_redundant: int = 0) -> ExpertShape:
    """The experts of a model's ``config``, any object with its attributes, with ``num_redundant`` copies of experts."""
    return ExpertShape(
        config.num_local_experts + num_redundant,
        config.intermediate_size,
        quantisation_block(getattr(config, "quantization_config", None)),
    )


def working_ep_sizes(shape: ExpertShape, tp_size: int, moe_dp_size: int = 1) -> list[int]:
    """The EP sizes that work at ``tp_size``, smallest first; empty where none does."""
    return [ep for ep in range(1, tp_size + 1) if shape.works(tp_size, ep, moe_dp_size)]


def working_tp_sizes(shape: ExpertShape, at_most: int, moe_dp_size: int = 1) -> list[int]:
    """The TP sizes up to ``at_most`` for which some EP size works."""
    return [tp for tp in range(1, at_most + 1) if working_ep_sizes(shape, tp, moe_dp_size)]


def quantisation_block(quantization_config: dict | None) -> int:
    """The block that an expert's width must be a multiple of, from a checkpoint's ``quantization_config``.

    FP8 block-quantised checkpoints say ``weight_block_size``, compressed-tensors ones ``block_structure``, or have a
    scale for each ``group_size`` columns; Marlin, which multiplies integers packed by compressed-tensors, takes 64
    columns of an expert at once. Both the gate/up rows and the down columns are cut, so the block is the least common
    multiple of all. 1: no block.
    """
    quantization_config = quantization_config or {}
    sizes = [*(quantization_config.get("weight_block_size") or [])]
    sizes += [64] if quantization_config.get("format") == "pack-quantized" else []
    for group in (quantization_config.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        sizes += weights.get("block_structure") or []
        sizes += [weights["group_size"]] if weights.get("strategy") == "group" else []
    return lcm(*sizes)


def _joined(values: list[int]) -> str:
    return ", ".join(map(str, values)) if values else "none"
