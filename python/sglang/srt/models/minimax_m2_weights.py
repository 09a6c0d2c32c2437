"""Loads a MiniMax-M2 checkpoint: which tensor belongs where, and an account of every tensor and every parameter.

The engine's own loaders pass over names that they do not know, cut a tensor that is too large, and leave a parameter
that no tensor named as it was allocated: a model that answers, wrongly. Here each of these is an error. All of a
checkpoint's faults are collected first, so that one message names them.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from sglang.srt.distributed import get_pp_group, get_tensor_model_parallel_rank
from sglang.srt.layers.linear import QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.utils import get_layer_id
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.model_loader.weight_utils import default_weight_loader, maybe_remap_kv_scale_name
from sglang.srt.models.minimax_m2_files import damaged_files, folder_of
from sglang.srt.models.minimax_m2_progress import LoadProgress
from sglang.srt.server_args import get_global_server_args
from torch import nn

if TYPE_CHECKING:
    from sglang.srt.models.minimax_m2 import MiniMaxM2ForCausalLM
    from transformers import PretrainedConfig

NAMED_FAULTS = 8  # how many faults of a kind a message names; the rest are counted

# Parameters that quantisation methods allocate with a usable value and many checkpoints do not carry, or that they make
# out of others once these are loaded.
_MAY_STAY_UNFILLED = re.compile(
    r"(\.bias|_?g_idx|g_idx_sort_indices|_?zero_point|qzeros|weight_shape"
    r"|\.(k|v|q|prob)_scale|\.workspace|_blockscale_swizzled)$"
)


@dataclass(frozen=True)
class Target:
    """A parameter, and which part of it: the shard of a fused projection, the expert."""

    param: str
    shard: str | None = None
    expert: int | None = None


SKIPPED = "skipped"

_PROJECTION = re.compile(r"\.(?P<shard>[qkv])_proj\.")
_EXPERT = re.compile(r"^(?P<experts>.+\.experts)\.(?P<expert>\d+)\.(?P<shard>w[123])\.(?P<kind>.+)$")
_STAGE_ENDS = ("model.embed_tokens.", "model.norm.", "lm_head.")
_HEAD = "lm_head.weight"

# What checkpoints of this architecture carry beside the parameters of some engine and quantisation: used where a
# parameter of that name exists, passed over where none does.
_DISPENSABLE = re.compile(
    r"(rotary_emb\.inv_freq|\.bias|\.g_idx|\.qzeros|\.weight_zero_point|\.weight_shape|\.input_scale|\.output_scale"
    r"|\.(k|v|q|kv|prob|prob_output)_scale)$"
)


def resolve_weight_name(
    model: MiniMaxM2ForCausalLM, name: str, params: dict[str, nn.Parameter]
) -> list[Target] | str | None:
    """Where a checkpoint's tensor ``name`` belongs.

    Returns:
        A list of :class:`Target`, ``SKIPPED`` for a tensor that this rank or this engine passes over on purpose, or
        None for a name that belongs to nothing.
    """
    layer = get_layer_id(name)
    if layer is not None and not model.model.start_layer <= layer < model.model.end_layer:
        num_layers = model.config.num_hidden_layers
        known = layer < num_layers + _num_mtp_layers(model.config) or _fewer_layers_were_asked_for()
        return SKIPPED if known else None

    expert = _EXPERT.match(name)
    if expert:
        fused = "w2" if expert["shard"] == "w2" else "w13"
        number = int(expert["expert"])
        target: Target | None = Target(f"{expert['experts']}.{fused}_{expert['kind']}", expert["shard"], number)
        in_model = number < model.config.num_local_experts
    else:
        target, in_model = _dense_target(name, params), True

    if target is not None and target.param in params and in_model:
        tied = model.config.tie_word_embeddings and name == "model.embed_tokens.weight"
        head = [Target(_HEAD)] if tied and _HEAD in params else []
        return [target, *head]
    passed_over = _DISPENSABLE.search(name) or (name.startswith(_STAGE_ENDS) and model.pp_group.world_size > 1)
    return SKIPPED if passed_over and in_model else None


def _dense_target(name: str, params: dict[str, nn.Parameter]) -> Target | None:
    """The parameter of a tensor outside the experts; KV-cache scales move to the attention layer."""
    projection = _PROJECTION.search(name)
    if projection:
        fused = _PROJECTION.sub(".qkv_proj.", name)
        if fused in params:
            return Target(fused, projection["shard"])
    if name in params:
        return Target(name)
    remapped = maybe_remap_kv_scale_name(name, params) if name.endswith("_scale") else None
    return Target(remapped) if remapped in params else None


def _num_mtp_layers(config: PretrainedConfig) -> int:
    """Layers for multi-token prediction, numbered after the model's own; this model does not use them."""
    return (getattr(config, "num_mtp_modules", 0) or 0) * (getattr(config, "mtp_transformer_layers", 1) or 1)


def _fewer_layers_were_asked_for() -> bool:
    """By ``--json-model-override-args``: then a checkpoint has layers that the model has not."""
    return "num_hidden_layers" in json.loads(get_global_server_args().json_model_override_args or "{}")


class CheckedWeights:
    """One load of ``model``'s weights.

    Args:
        model: its parameters carry the engine's ``weight_loader`` where they need one.
    """

    def __init__(self, model: MiniMaxM2ForCausalLM) -> None:
        self.model = model
        self.params = dict(model.named_parameters())
        self.owners = {
            f"{prefix}.{name}" if prefix else name: module
            for prefix, module in model.named_modules()
            for name, _ in module.named_parameters(recurse=False)
        }
        self.filled: dict[str, set[tuple[str | None, int | None]]] = defaultdict(set)
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.has_own_head = False

    def load(self, weights: Iterable[tuple[str, torch.Tensor]], whole: bool) -> set[str]:
        """Loads ``weights``; with ``whole``, they must fill every parameter once and fit exactly.

        Returns:
            The names of the parameters that were filled, wholly or in part.

        Raises:
            ValueError: any fault, with this rank, the first of each kind and how many more.
        """
        progress = LoadProgress(always=whole)  # updates of weights come by the thousand, and mostly are short
        try:
            for name, tensor in progress.over(weights):
                self._load_targets(name, tensor, whole)
        except SafetensorError as error:
            raise ValueError(f"A file of the checkpoint cannot be read: {error}{_damaged_files()}") from error
        if whole:
            self._find_unfilled()
        if self.faults:
            raise ValueError(self._message() + (_damaged_files() if whole else ""))
        progress.finish(self.params[name] for name in self.filled)
        return set(self.filled)

    def _load_targets(self, name: str, tensor: torch.Tensor, whole: bool) -> None:
        targets = resolve_weight_name(self.model, name, self.params)
        if name == _HEAD and self.model.config.tie_word_embeddings and not self.has_own_head:
            # As in transformers and stock it is the head, whatever the config says; in any order.
            self.has_own_head = True
            self.filled.pop(_HEAD, None)
        if targets is None:
            self.faults["belong to no parameter, and to nothing that is known to be skipped"].append(
                f"{name} {tuple(tensor.shape)}"
            )
        elif isinstance(targets, list):
            for target in targets:
                if target.param != _HEAD or name == _HEAD or not self.has_own_head:
                    self._load_one(name, tensor, target, whole)

    def _load_one(self, name: str, tensor: torch.Tensor, target: Target, whole: bool) -> None:
        param, owner = self.params[target.param], self.owners[target.param]
        part = (target.shard, target.expert)
        if fault := _value_fault(tensor):
            self.faults["hold values that are not finite"].append(f"{name} {tuple(tensor.shape)}: {fault}")
        if whole:
            expected = full_shape(owner, param, target)
            fault = _shape_fault(expected, tensor) or _dtype_fault(owner, param, target, tensor)
            if fault:
                self.faults["do not fit"].append(f"{name} {fault}, for {target.param} {tuple(param.shape)}")
                self.filled[target.param].add(part)
                return
            if part in self.filled[target.param] and not target.param.endswith("_scale"):
                self.faults["come twice"].append(name)
                return
        try:
            _call_loader(param, tensor, target)
        except (AssertionError, RuntimeError, ValueError, IndexError, TypeError) as error:
            self.faults["do not fit"].append(
                f"{name} {tuple(tensor.shape)} {tensor.dtype}, for {target.param} {tuple(param.shape)} {param.dtype}"
                + (f" ({error})" if str(error) else "")
            )
        self.filled[target.param].add(part)

    def _find_unfilled(self) -> None:
        online = getattr(getattr(self.model, "quant_config", None), "is_checkpoint_fp8_serialized", True) is False
        for name, param in self.params.items():
            if _MAY_STAY_UNFILLED.search(name) or (online and "scale" in name):
                continue
            parts = _parts(self.owners[name], name, self.model.config.num_local_experts)
            missing = [part for part in parts if part not in self.filled[name]]
            if self.filled[name] == {(None, None)} or not missing:
                continue
            whole = "" if len(missing) == len(parts) else f": without {_describe(missing)}"
            self.faults["of the model stay unfilled"].append(f"{name} {tuple(param.shape)}{whole}")

    def _message(self) -> str:
        rank = f"TP rank {get_tensor_model_parallel_rank()}, PP rank {get_pp_group().rank_in_group}"
        lines = [f"The checkpoint does not fit the model ({rank}):"]
        for kind, faults in self.faults.items():
            what = "parameters" if kind.startswith("of the model") else "tensors"
            lines.append(f"{len(faults)} {what} {kind}:")
            lines += [f"    {fault}" for fault in faults[:NAMED_FAULTS]]
            if len(faults) > NAMED_FAULTS:
                lines.append(f"    and {len(faults) - NAMED_FAULTS} more")
        return "\n".join(lines)


# Methods whose parameters have the checkpoint's own shapes and dtypes, but for sharding. Others repack while loading.
_KEEPS_SHAPES = re.compile(r"^(Unquantized|Fp8|ModelOpt|AWQ|GPTQ|CompressedTensors)")


def _damaged_files() -> str:
    """Lines for the end of a message: which files of the server's checkpoint are missing or cut off, if any."""
    arguments = get_global_server_args()
    folder = folder_of(arguments.model_path, arguments.revision, arguments.download_dir)
    return "".join(f"\n{fault}" for fault in damaged_files(folder))


def full_shape(owner: nn.Module, param: nn.Parameter, target: Target) -> tuple[int, ...] | None:
    """The shape of the checkpoint's tensor of which ``param``, on this rank, holds a shard.

    None where it cannot be told from the parameter: then the engine's own loader has the only say.
    """
    if not _keeps_shapes(owner):
        return None
    if isinstance(owner, FusedMoE):
        return _full_expert_shape(owner, param, target)
    if param.numel() <= 1:
        return None
    shape = list(param.shape)
    if isinstance(owner, VocabParallelEmbedding):
        shape[0] = owner.org_vocab_size
    elif isinstance(owner, QKVParallelLinear):
        dim = getattr(param, "output_dim", None)
        if dim is None or target.shard is None:
            return None
        on_rank = sum(owner.output_partition_sizes) // owner.head_size  # a counterpart's heads too, where it has one
        wanted = owner.total_num_heads if target.shard == "q" else owner.total_num_kv_heads
        if shape[dim] % on_rank != 0:  # scale blocks that straddle heads
            return None
        shape[dim] = shape[dim] // on_rank * wanted
    elif isinstance(owner, RowParallelLinear):
        dim = getattr(param, "input_dim", None)
        if dim is not None:
            shape[dim] *= owner.tp_size
    elif hasattr(owner, "shards"):
        return None  # the norms of q and k check for themselves
    return tuple(shape)


def _keeps_shapes(owner: nn.Module) -> bool:
    method = getattr(owner, "quant_method", None)
    return method is None or _KEEPS_SHAPES.match(type(method).__name__) is not None


def _full_expert_shape(owner: FusedMoE, param: nn.Parameter, target: Target) -> tuple[int, ...] | None:
    flips = type(getattr(owner, "scheme", owner.quant_method)).__name__.startswith("CompressedTensorsWNA16")
    if param.dim() != 3 or flips or owner.use_triton_kernels or owner.use_flashinfer_trtllm_moe:
        return None
    shape = list(param.shape[1:])
    transposed = getattr(param, "is_transposed", False)
    width_dim = int(transposed) if target.shard != "w2" else int(not transposed)
    if target.shard != "w2":
        shape[width_dim] //= 2
    if shape[width_dim] > 1:
        if getattr(param, "load_full_w2", False):
            return None
        shape[width_dim] *= owner.moe_tp_size
    elif owner.moe_tp_size > 1:
        return None  # one scale for the whole width, or one block of many: not told apart here
    return tuple(shape)


def _shape_fault(expected: tuple[int, ...] | None, tensor: torch.Tensor) -> str | None:
    shape = tuple(tensor.shape)
    if expected is None or shape == expected:
        return None
    return f"has shape {shape} where {expected} belongs"


def _dtype_fault(owner: nn.Module, param: nn.Parameter, target: Target, tensor: torch.Tensor) -> str | None:
    """A quantised weight read as a plain one, or the other way round, copies without an error and means nothing."""
    if "scale" in target.param or target.param.endswith(("qzeros", "weight_shape")) or not _keeps_shapes(owner):
        return None  # the engine keeps these of experts as floats, and never reads them
    quantised = tensor.element_size() == 1 or not tensor.is_floating_point()
    wants_quantised = param.element_size() == 1 or not param.is_floating_point()
    if quantised == wants_quantised:
        return None
    return f"has dtype {tensor.dtype} where {param.dtype} belongs"


def _value_fault(tensor: torch.Tensor) -> str | None:
    """NaN or infinity in a norm's weight or the router's bias: every answer would be NaN, which sampling hides.

    Only tensors of one dimension are looked at, [heads * head_dim], [hidden] or [experts]: they cost nothing, and
    each of their values reaches every token.
    """
    if tensor.dim() != 1 or not tensor.is_floating_point() or tensor.element_size() == 1:
        return None
    wrong = (~torch.isfinite(tensor)).nonzero().flatten().tolist()
    if not wrong:
        return None
    return f"{len(wrong)} of {tensor.numel()}, the first {tensor[wrong[0]].item()} at index {wrong[0]}"


def _call_loader(param: nn.Parameter, tensor: torch.Tensor, target: Target) -> None:
    loader = getattr(param, "weight_loader", default_weight_loader)
    if target.expert is not None:
        loader(param, tensor, target.param, shard_id=target.shard, expert_id=target.expert)
    elif target.shard is not None:
        loader(param, tensor, target.shard)
    else:
        loader(param, tensor)


def _parts(owner: nn.Module, name: str, num_experts: int) -> list[tuple[str | None, int | None]]:
    """The parts that together fill the parameter ``name``."""
    if isinstance(owner, FusedMoE):
        shards = ("w2",) if ".w2_" in name else ("w1", "w3")
        return [(shard, expert) for expert in range(num_experts) for shard in shards]
    if isinstance(owner, QKVParallelLinear):
        return [("q", None), ("k", None), ("v", None)]
    return [(None, None)]


def _describe(parts: list[tuple[str | None, int | None]]) -> str:
    first = [f"{shard} of expert {expert}" if expert is not None else str(shard) for shard, expert in parts[:4]]
    return ", ".join(first) + (f" and {len(parts) - 4} more" if len(parts) > 4 else "")


def engine_fills_weights() -> bool:
    """Whether the parameters get their first values by their own names, and ``load_weights`` only later ones."""
    arguments = get_global_server_args()
    from_store = arguments.load_format == "remote" and arguments.model_path.startswith("redis://")
    return from_store or arguments.load_format in ("dummy", "sharded_state", "remote_instance")
