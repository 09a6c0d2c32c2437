"""Decisions for MiniMax-M2 that belong where the engine reads the server's arguments.

The engine decides per architecture while it reads its arguments, and does not name this one:
    how the heads and experts are divided, checked before anything is loaded;
    the smallest EP size that works for a quantised checkpoint, where the person left ``--ep`` alone;
    FlashInfer's fused all-reduce + norm, on wherever it is on for the engine's other mixtures of experts, until the
        model finds that one launch of its own does it;
    the kernel that sums a token's experts;
    the dtype of activations, where neither the person nor the checkpoint names one;
    into how many parts Triton's attention divides a request in decode, where the person left it alone.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang_minimax import expert_sum, sharding
from sglang_minimax.adjustments import EngineModule, EngineObject

if TYPE_CHECKING:
    from sglang.srt.layers.minimax_sharding import ExpertShape

ARCHITECTURE = "MiniMaxM2ForCausalLM"

EP_SIZE_REASON = "sglang_minimax_ep_size_reason"
"""The attribute of ``ServerArgs`` that says why EP 1 does not work, where another EP size was chosen here."""

FLASHINFER_RANKS = (2, 4, 8)  # for which its all-reduce knows how to go about it

TRITON_KV_SPLITS = 32
"""Parts of a request at most, in Triton's decode attention on Hopper. The engine's 8 leave most of the GPU idle where
there are few requests: docs/performance.md#attention-backends."""

logger = logging.getLogger(__name__)


class LeftAlone(int):
    """A default that can be told from the same value given on the command line."""


def adjust_server_args(module: EngineModule) -> None:
    """Lets ``ServerArgs`` decide for this architecture; runs once, after ``sglang.srt.server_args`` was imported."""
    server_args = module.ServerArgs
    _mark_default(server_args, "ep_size", LeftAlone(1))
    _mark_default(server_args, "triton_attention_num_kv_splits", LeftAlone(server_args.triton_attention_num_kv_splits))
    _run_after(server_args, "_handle_model_specific_adjustments", lambda args: _enable_fused_all_reduce(args, module))
    _run_after(server_args, "_handle_model_specific_adjustments", _sum_experts_in_kernel)
    _run_after(server_args, "_handle_model_specific_adjustments", _settle_dtype)
    _run_after(server_args, "_handle_model_specific_adjustments", lambda args: _settle_kv_splits(args, module))
    # The engine asserts this one, without a word.
    _run_before(server_args, "_handle_data_parallelism", _check_attention_ranks)
    # Experts are divided after context parallelism is settled and before the MoE kernels are chosen for an EP size.
    _run_before(server_args, "_handle_moe_kernel_config", _settle_layout)
    _run_after(server_args, "_handle_expert_distribution_metrics", _settle_recorder)


def announce_overlay(module: EngineModule) -> None:
    """Says in the server's log, once and from rank 0, what is laid over what."""
    configure_scheduler = module.configure_scheduler

    @functools.wraps(configure_scheduler)
    def announced(
        server_args: EngineObject,
        tp_rank: int,
        attn_cp_rank: int,
        moe_dp_rank: int,
        moe_ep_rank: int,
        pp_rank: int,
        dp_rank: int | None,
    ) -> int | None:
        dp_rank = configure_scheduler(server_args, tp_rank, attn_cp_rank, moe_dp_rank, moe_ep_rank, pp_rank, dp_rank)
        if not (tp_rank or pp_rank or dp_rank):
            from sglang_minimax import __version__
            from sglang_minimax.overlay import ENGINE_VERSION, folder

            logger.info("sglang-minimax %s is laid over sglang %s, from %s", __version__, ENGINE_VERSION, folder())
        return dp_rank

    module.configure_scheduler = announced


def assume_bfloat16(module: EngineModule) -> None:
    """Serves a checkpoint whose ``config.json`` names no dtype in bfloat16, that of the published weights.

    Not so what AWQ and GPTQ made, some of whose kernels know float16 alone.

    The engine takes what names none for float32, and that for float16, in which it has no DeepGEMM and this model no
    kernels of its own for FP8; FlashAttention-3 answers in bfloat16 to an FP8 cache whatever it was asked in.
    """
    engine = module._get_and_verify_dtype

    @functools.wraps(engine)
    def get_and_verify_dtype(config: EngineObject, dtype: Any) -> Any:
        if dtype == "auto" and _is_bfloat16_for_want_of_a_name(config):
            _say_bfloat16()
            dtype = "bfloat16"
        return engine(config, dtype)

    module._get_and_verify_dtype = get_and_verify_dtype


def _settle_dtype(args: EngineObject) -> None:
    """As above, and for a draft model too, whose own config may name none, or another."""
    config = args.get_model_config()
    if args.dtype == "auto" and is_minimax(config) and _is_bfloat16_for_want_of_a_name(config.hf_config):
        args.dtype = "bfloat16"


def _is_bfloat16_for_want_of_a_name(config: EngineObject) -> bool:
    named = _of(config, "dtype") or _of(config, "torch_dtype")
    quantised_by = (_of(config, "quantization_config") or {}).get("quant_method")
    return (
        named is None and ARCHITECTURE in (_of(config, "architectures") or ()) and quantised_by not in ("awq", "gptq")
    )


def _of(config: EngineObject, name: str) -> Any:
    """A value of a config, which is a dictionary where no class of transformers fits it."""
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


@functools.cache
def _say_bfloat16() -> None:
    logger.warning("The checkpoint's config names no dtype: bfloat16. Give --dtype to choose another.")


ADJUSTMENTS = [
    ("sglang.srt.server_args", adjust_server_args),
    ("sglang.srt.configs.model_config", assume_bfloat16),
    ("sglang.srt.managers.scheduler", announce_overlay),
]


def is_minimax(model_config: EngineObject) -> bool:
    """Whether the engine's ``ModelConfig`` is that of a model that this package serves."""
    return ARCHITECTURE in (model_config.hf_config.architectures or [])


def _check_attention_ranks(args: EngineObject) -> None:
    """Raises ValueError if the DP ranks and context parallelism cannot divide TP, or not both at once."""
    if is_minimax(args.get_model_config()):
        _attention_ranks(args)
        dp_groups = args.dp_size if args.enable_dp_attention else 1
        reason = sharding.reason_against_context_parallelism(dp_groups, args.attn_cp_size)
        if reason is not None:
            raise ValueError(f"{reason}.")


def _attention_ranks(args: EngineObject) -> int:
    return sharding.attention_tp_size(args.tp_size, args.dp_size if args.enable_dp_attention else 1, args.attn_cp_size)


def _settle_layout(args: EngineObject) -> None:
    """Checks heads, vocabulary, experts, stages and LoRA against the ranks, and chooses EP where that was left open.

    Raises:
        ValueError: a division that cannot work, with the values that do; or a use that this model is not for.
    """
    left_alone = _was_left_alone(args, "ep_size")
    if not is_minimax(args.get_model_config()):
        return
    if args.is_embedding:
        raise ValueError(
            f"{ARCHITECTURE} generates text and has no embeddings to give, and --is-embedding would end the server at "
            f"its first request. Leave it out, or serve an embedding model."
        )
    from sglang.srt.layers.minimax_sharding import check_vocabulary, expert_shape_of, shard_attention

    config = args.get_model_config().hf_config
    attention_ranks = _attention_ranks(args)
    shard_attention(config.num_attention_heads, config.num_key_value_heads, attention_ranks)
    # The head is divided over more ranks than the embedding, which divide these, or over the same.
    check_vocabulary(config.vocab_size, attention_ranks if args.enable_dp_lm_head else args.tp_size)
    if (args.enable_lora or args.lora_paths) and attention_ranks != args.tp_size:
        raise ValueError(
            f"LoRA adapters of attention are cut into --tp {args.tp_size} parts, and {attention_ranks} ranks share it: "
            f"the first request for one would end the server. Leave out --enable-dp-attention and context "
            f"parallelism, or --enable-lora and --lora-paths."
        )
    _check_tokens_apart(args, attention_ranks)
    if "triton" in args.get_attention_backends():
        _check_stages_for_triton(config.num_hidden_layers, args.pp_size)
    shape = expert_shape_of(config, args.ep_num_redundant_experts)
    if args.moe_a2a_backend != "none":
        check_experts_of_all_ranks(shape, args.tp_size, args.moe_a2a_backend, args.moe_dp_size)
        _check_rebalancing(args, args.tp_size)
        return
    ep_size = settle_ep_size(shape, args.tp_size, args.ep_size, left_alone, args.moe_dp_size)
    if left_alone and ep_size != args.ep_size:
        why = shape.reason_against(args.tp_size, args.ep_size, args.moe_dp_size)
        assert why is not None, "another EP size is chosen only where a rule forbids this one"
        # A warning, since the engine sets up its log only after it has read the arguments, and drops what is less.
        logger.warning("Expert parallel size set to %d: %s. Give --ep to choose another.", ep_size, why)
        args.ep_size = ep_size
        setattr(args, EP_SIZE_REASON, why)  # no field of the engine's, but it travels to every rank with them
    _check_rebalancing(args, ep_size)


def _check_tokens_apart(args: EngineObject, attention_ranks: int) -> None:
    """Raises ValueError where ranks hold tokens of their own between layers, and the engine does not go along."""
    servers = 1 if args.enable_dp_attention else args.dp_size
    reason = sharding.reason_against_a2a_backend(args.moe_a2a_backend, args.pp_size, attention_ranks, servers)
    if reason is not None:
        raise ValueError(f"{reason}.")
    dense_alone = args.moe_dense_tp_size == 1
    if dense_alone and servers > 1:
        raise ValueError(
            f"--moe-dense-tp-size 1 with --dp {servers} and without --enable-dp-attention: each copy of the server "
            f"would count the tokens of all, and end before its first request. Leave --moe-dense-tp-size out: this "
            f"model has no dense layers."
        )
    # The engine's require_mlp_sync, before it has told its modules of the a2a backend.
    if args.enable_mixed_chunk and (args.enable_dp_attention or dense_alone or args.moe_a2a_backend != "none"):
        raise ValueError(
            "--enable-mixed-chunk with DP attention, an a2a backend or --moe-dense-tp-size 1: the engine counts the "
            "ranks' tokens before each step, and its first batch of prefill and decode would end the server. Leave it "
            "out."
        )


def _settle_recorder(args: EngineObject) -> None:
    """What records the experts' loads goes without pieces of graphs, which cannot trace it; the engine asks that before
    it knows whether there is a recorder.

    Raises:
        ValueError: it is one that the engine has not for what brings tokens to the experts.
    """
    if args.expert_distribution_recorder_mode is None or not is_minimax(args.get_model_config()):
        return
    if not args.disable_piecewise_cuda_graph:
        logger.warning("The recorder of the experts' loads goes without piecewise CUDA graphs: prefills have none.")
        args.disable_piecewise_cuda_graph = True
    if (
        args.expert_distribution_recorder_mode == "stat"
        and args.moe_a2a_backend != "none"
        and args.deepep_mode not in ("normal", "low_latency")
    ):
        raise ValueError(
            f"--expert-distribution-recorder-mode stat, which --enable-eplb and --enable-expert-distribution-metrics "
            f"take, has no counts for --moe-a2a-backend {args.moe_a2a_backend} with --deepep-mode {args.deepep_mode}: "
            f"give --deepep-mode normal, or low_latency."
        )


def _check_rebalancing(args: EngineObject, ep_size: int) -> None:
    """Raises ValueError if EPLB would end the server once it moves experts, which it does after many steps only.

    The engine then divides the experts over all ranks of the server, whatever EP says, and asserts what it finds.
    """
    num_ranks = args.tp_size * args.pp_size
    if not args.enable_eplb or ep_size == num_ranks:
        return
    if args.pp_size > 1:
        way_out = "Leave --enable-eplb out, or the pipeline"
    else:
        way_out = f"Add --ep {num_ranks}, or leave --enable-eplb out"
    raise ValueError(
        f"--enable-eplb moves experts as if they were divided over all {num_ranks} ranks of --tp {args.tp_size} "
        f"--pp-size {args.pp_size}, and --ep {ep_size} divides them over {ep_size}: the first move would end the "
        f"server. {way_out}."
    )


def check_experts_of_all_ranks(shape: ExpertShape, tp_size: int, a2a_backend: str, moe_dp_size: int = 1) -> None:
    """Raises ValueError if an a2a backend cannot have the experts: it takes all ranks for EP, which the engine sets."""
    reason = shape.reason_against(tp_size, tp_size, moe_dp_size)
    if reason is None:
        return
    works = [tp for tp in range(1, 2 * tp_size + 1) if shape.works(tp, tp)]
    way_out = f"TP sizes that work: {', '.join(map(str, works))}" if moe_dp_size == 1 else "Leave --moe-dp-size out"
    raise ValueError(
        f"--moe-a2a-backend {a2a_backend} divides the experts over all --tp {tp_size} ranks, whatever --ep says: "
        f"{reason}. {way_out}, or leave --moe-a2a-backend out."
    )


def _check_stages_for_triton(num_layers: int, pp_size: int) -> None:
    """Raises ValueError if the engine's Triton attention would end the server."""
    from sglang.srt.distributed.utils import get_pp_indices

    stages = [range(*get_pp_indices(num_layers, stage, pp_size)) for stage in range(pp_size)]
    if (reason := sharding.reason_against_stages_of_triton(stages)) is not None:
        raise ValueError(f"{reason}.")


def settle_ep_size(shape: ExpertShape, tp_size: int, ep_size: int, left_alone: bool, moe_dp_size: int = 1) -> int:
    """The EP size to use: the given one if it works, else, if it was left alone, the smallest that does.

    Raises:
        ValueError: neither is possible; names the rule, the EP sizes that work, or the TP sizes where none does.
    """
    from sglang_minimax.sharding import working_ep_sizes, working_tp_sizes

    reason = shape.reason_against(tp_size, ep_size, moe_dp_size)
    if reason is None:
        return ep_size
    works = working_ep_sizes(shape, tp_size, moe_dp_size)
    if works and left_alone:
        return works[0]
    if works:
        way_out = f"EP sizes that work at --tp {tp_size}: {', '.join(map(str, works))}, or leave --ep out"
    else:
        tp_sizes = ", ".join(map(str, working_tp_sizes(shape, 2 * tp_size, moe_dp_size)))
        way_out = (
            f"no EP size works at --tp {tp_size}; TP sizes for which one does: {tp_sizes}. Where the number of experts "
            f"is in the way, --ep-num-redundant-experts adds to it"
        )
    raise ValueError(f"the experts cannot be divided over --tp {tp_size} --ep {ep_size}: {reason}. {way_out}.")


def _enable_fused_all_reduce(args: EngineObject, module: EngineModule) -> None:
    """The engine's conditions for its other mixtures of experts, for this one.

    It is what runs where the model's own launch cannot, which only the ranks can find out: then the model turns it off
    (``one_launch_for`` in ``layers/minimax_layer_communicator.py``), unless a person turned it on.
    """
    if (
        not args.enable_flashinfer_allreduce_fusion
        and not args.enforce_disable_flashinfer_allreduce_fusion
        and is_minimax(args.get_model_config())
        and reason_of_server_against_fused_all_reduce(
            args,
            device_name=module.get_device_name() or "",
            hopper_or_blackwell=module.is_sm90_supported() or module.is_sm100_supported(),
        )
        is None
    ):
        args.enable_flashinfer_allreduce_fusion = True
        setattr(args, sharding.FLASHINFER_BY_DEFAULT, True)  # nobody asked: a launch of ours goes first


def _sum_experts_in_kernel(args: EngineObject) -> None:
    if is_minimax(args.get_model_config()):
        expert_sum.mark(args)


def _settle_kv_splits(args: EngineObject, module: EngineModule) -> None:
    left_alone = _was_left_alone(args, "triton_attention_num_kv_splits")
    if left_alone and is_minimax(args.get_model_config()) and module.is_sm90_supported():
        args.triton_attention_num_kv_splits = TRITON_KV_SPLITS
        if "triton" in (args.attention_backend, args.decode_attention_backend):
            logger.warning(
                "Triton's decode attention divides a request into up to %d parts. Give "
                "--triton-attention-num-kv-splits to choose another number.", TRITON_KV_SPLITS,
            )  # fmt: skip


def reason_of_server_against_fused_all_reduce(
    args: EngineObject, *, device_name: str, hopper_or_blackwell: bool
) -> str | None:
    """:func:`reason_against_fused_all_reduce` for an engine's server arguments."""
    return reason_against_fused_all_reduce(
        device_name=device_name,
        hopper_or_blackwell=hopper_or_blackwell,
        tp_size=args.tp_size,
        enable_dp_attention=args.enable_dp_attention,
        nnodes=args.nnodes,
        attn_cp_size=args.attn_cp_size,
        moe_a2a_backend=args.moe_a2a_backend,
        moe_dp_size=args.moe_dp_size,
        pp_size=args.pp_size,
        peers_allowed=not args.disable_custom_all_reduce,
        deterministic=bool(args.enable_deterministic_inference or args.rl_on_policy_target),
        memory_saver=args.enable_memory_saver,
    ) or _reason_of_watchers(args)


def _reason_of_watchers(args: EngineObject) -> str | None:
    from sglang.srt.layers.minimax_watchers import reason_of_watchers

    reason: str | None = reason_of_watchers(args)
    return reason


def reason_against_fused_all_reduce(
    *,
    device_name: str,
    hopper_or_blackwell: bool,
    tp_size: int,
    enable_dp_attention: bool,
    nnodes: int,
    attn_cp_size: int = 1,
    moe_a2a_backend: str = "none",
    moe_dp_size: int = 1,
    pp_size: int = 1,
    peers_allowed: bool = True,
    deterministic: bool = False,
    memory_saver: bool = False,
) -> str | None:
    """The first condition of FlashInfer's fused all-reduce + norm that does not hold, as a clause, or None.

    Beyond the engine's for its other models, those under which it would not start, or give wrong answers, where nobody
    asked for it.
    """
    if not hopper_or_blackwell:
        return "it is for Hopper and Blackwell"
    if tp_size <= 1:
        return "one rank has nothing to reduce"
    if enable_dp_attention:
        return "under DP attention the ranks that attend and those that hold the experts differ"
    if attn_cp_size > 1:
        return "it cannot work on the groups of context parallelism"
    if moe_dp_size > 1:
        return "it sums over all ranks, and the experts' data-parallel groups must not be summed together"
    if nnodes > 1:
        return "it reaches the GPUs of one node only"
    if pp_size > 1:
        return "it shares memory between all ranks, and each pipeline stage would wait for the others'"
    if tp_size not in FLASHINFER_RANKS:
        return f"it is for {', '.join(map(str, FLASHINFER_RANKS))} ranks, and these are {tp_size}"
    if not peers_allowed:
        return "--disable-custom-all-reduce says that GPUs do not reach each other's memory"
    if deterministic:
        return "it adds in another order for many tokens than for few, which is not deterministic"
    if memory_saver:
        return "--enable-memory-saver would take its pointers away with the weights"
    if "H20" in device_name and "H200" not in device_name:
        return "it is off on H20"
    if moe_a2a_backend != "none":
        return f"--moe-a2a-backend {moe_a2a_backend} reduces by itself"
    return None


def _was_left_alone(args: EngineObject, field: str) -> bool:
    """Whether nobody gave a value for a field of :func:`_mark_default`, which is a plain number from then on."""
    value = getattr(args, field)
    setattr(args, field, int(value))
    return isinstance(value, LeftAlone)


def _mark_default(cls: Any, field: str, default: object) -> None:
    """Gives a dataclass another default, for the command line (the class attribute) and for calls."""
    initialise = cls.__init__

    @functools.wraps(initialise)
    def __init__(self: EngineObject, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault(field, default)
        initialise(self, *args, **kwargs)

    setattr(cls, field, default)
    cls.__init__ = __init__


def _run_before(cls: type, method: str, function: Callable[[EngineObject], None]) -> None:
    original = getattr(cls, method)

    @functools.wraps(original)
    def wrapped(self: EngineObject, *args: Any, **kwargs: Any) -> Any:
        function(self)
        return original(self, *args, **kwargs)

    setattr(cls, method, wrapped)


def _run_after(cls: type, method: str, function: Callable[[EngineObject], None]) -> None:
    original = getattr(cls, method)

    @functools.wraps(original)
    def wrapped(self: EngineObject, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        function(self)
        return result

    setattr(cls, method, wrapped)
