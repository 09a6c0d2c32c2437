"""AWQ, GPTQ, NVFP4, W4A16 and W4A4 checkpoints through the loader: on each rank each parameter holds its shard.

W4A4 is NVFP4 in compressed-tensors' format. Products run on GPUs only. Here the engine is told that there is one,
builds the layers that it would build there, and stops behind the loading. What belongs where is cut out of the
checkpoint by fractions of heads, widths and experts, and compared by value.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts.harness import LayoutFailed, run_layout
from safetensors.torch import load_file, save_file
from sglang.srt.layers.quantization import awq, gptq, modelopt_quant, moe_wna16
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from sglang.srt.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsW4A4Fp4,
    CompressedTensorsW4A4Nvfp4MoE,
    compressed_tensors_w4a4_nvfp4_moe,
)
from sglang.srt.layers.quantization.compressed_tensors.schemes.compressed_tensors_wNa16 import CompressedTensorsWNA16
from sglang.srt.layers.quantization.compressed_tensors.schemes.compressed_tensors_wNa16_moe import (
    CompressedTensorsWNA16MoE,
)

from sglang_minimax.checkpoints import SmallModel, write_checkpoint

SHAPE = SmallModel(
    num_hidden_layers=2, hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=128,
    num_local_experts=4, intermediate_size=512, vocab_size=512,
)  # fmt: skip
GROUP, FP4_GROUP, PACKED = 64, 16, 8  # values a scale, of AWQ and GPTQ and of NVFP4; 4-bit values in an int32


@dataclass(frozen=True)
class Format:
    """How a checkpoint stores a projection of [out, in].

    tensors: by suffix, (dtype, shape), from out and in.
    transposed: whether its tensors are [in, out].
    config: what config.json says.
    unread: suffixes that a checkpoint has and the engine does not read.
    experts_turned: whether the engine holds those of experts the other way round.
    """

    tensors: callable
    transposed: bool
    config: dict
    unread: tuple[str, ...] = ()
    experts_turned: bool = False


FORMATS = {
    "awq": Format(
        lambda rows, columns: {
            "qweight": (torch.int32, (columns, rows // PACKED)),
            "qzeros": (torch.int32, (columns // GROUP, rows // PACKED)),
            "scales": (torch.float16, (columns // GROUP, rows)),
        },
        True,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm",
         "modules_to_not_convert": ["gate", "lm_head"]},
    ),
    "gptq": Format(
        lambda rows, columns: {
            "qweight": (torch.int32, (columns // PACKED, rows)),
            "qzeros": (torch.int32, (columns // GROUP, rows // PACKED)),
            "scales": (torch.float16, (columns // GROUP, rows)),
            "g_idx": (torch.int32, (columns,)),
        },
        True,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False, "lm_head": False,
         "dynamic": {}},
    ),
    "nvfp4": Format(
        lambda rows, columns: {
            "weight": (torch.uint8, (rows, columns // 2)),
            "weight_scale": (torch.float8_e4m3fn, (rows, columns // FP4_GROUP)),
            "weight_scale_2": (torch.float32, ()),
            "input_scale": (torch.float32, ()),
        },
        False,
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": FP4_GROUP, "ignore": ["lm_head", "*gate*"]},
    ),
    "w4a16": Format(
        lambda rows, columns: {
            "weight_packed": (torch.int32, (rows, columns // PACKED)),
            "weight_scale": (torch.bfloat16, (rows, columns // GROUP)),
            "weight_shape": (torch.int64, (2,)),
        },
        False,
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
         "ignore": ["lm_head", "re:.*gate$"],
         "config_groups": {"group_0": {
             "targets": ["Linear"], "input_activations": None, "output_activations": None,
             "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP,
                         "dynamic": False, "actorder": None, "observer": "minmax", "block_structure": None}}}},
        unread=("weight_shape",),
        experts_turned=True,
    ),
    "w4a4": Format(
        lambda rows, columns: {
            "weight_packed": (torch.uint8, (rows, columns // 2)),
            "weight_scale": (torch.float8_e4m3fn, (rows, columns // FP4_GROUP)),
            "weight_global_scale": (torch.float32, (1,)),
            "input_global_scale": (torch.float32, (1,)),
        },
        False,
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "quantization_status": "compressed",
         "ignore": ["lm_head", "re:.*gate$"],
         "config_groups": {"group_0": {
             "targets": ["Linear"], "output_activations": None,
             "input_activations": {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group",
                                   "group_size": FP4_GROUP, "dynamic": "local"},
             "weights": {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group",
                         "group_size": FP4_GROUP, "dynamic": False}}}},
    ),
}  # fmt: skip


def write_quantised(plain: Path, folder: Path, form: Format, kept: str | None = None) -> dict[str, np.ndarray]:
    """``plain`` with each projection's weight replaced by random tensors of ``form``. Returns these, by name.

    kept: the beginning of names that are left as they are.
    """
    shutil.copytree(plain, folder)
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if not (name.endswith("_proj.weight") or ".experts." in name) or (kept and name.startswith(kept)):
            tensors[name] = tensor
            continue
        for suffix, (dtype, shape) in form.tensors(*tensor.shape).items():
            values = torch.randint(0, 120, shape, generator=generator)
            if suffix == "g_idx":  # the group of each input, the same for q, k and v, which share it
                values = torch.arange(*shape) // GROUP
            if suffix == "input_scale" and ".w3." in name:  # gate and up have the same input, and so one scale for it
                values = tensors[f"{name.replace('.w3.', '.w1.').removesuffix('weight')}{suffix}"].clone()
            values = values.to(torch.uint8).view(dtype) if dtype == torch.float8_e4m3fn else values.to(dtype)
            tensors[f"{name.removesuffix('weight')}{suffix}"] = values
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": form.config}
    (folder / "config.json").write_text(json.dumps(config))
    return {name: as_array(tensor) for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, tuple[Path, dict[str, np.ndarray]]]:
    folder = tmp_path_factory.mktemp("quantised")
    plain = write_checkpoint(folder / "plain", SHAPE)
    return {name: (folder / name, write_quantised(plain, folder / name, form)) for name, form in FORMATS.items()}


@pytest.fixture
def as_if_on_a_gpu(monkeypatch) -> None:
    """The engine chooses these layers by the GPU that it finds, and repacks what they loaded by its kernels."""
    for module in (awq, gptq):
        monkeypatch.setattr(module, "_is_cuda", True)
        monkeypatch.setattr(module, "check_marlin_supported", lambda **_: True)
        monkeypatch.setattr(module, "verify_marlin_supported", lambda *_, **__: None)
    monkeypatch.setattr(CompressedTensorsConfig, "_check_scheme_supported", lambda *_, **__: True)
    for module in (modelopt_quant, compressed_tensors_w4a4_nvfp4_moe):
        monkeypatch.setattr(module, "is_blackwell_supported", lambda: True)
    monkeypatch.setattr(modelopt_quant, "swizzle_blockscale", torch.clone)
    for method in (
        awq.AWQMarlinLinearMethod, awq.AWQMoEMethod, gptq.GPTQMarlinLinearMethod, gptq.GPTQMarlinMoEMethod,
        modelopt_quant.ModelOptFp4LinearMethod, modelopt_quant.ModelOptNvFp4FusedMoEMethod,
        CompressedTensorsWNA16, CompressedTensorsWNA16MoE, CompressedTensorsW4A4Fp4, CompressedTensorsW4A4Nvfp4MoE,
    ):  # fmt: skip
        monkeypatch.setattr(method, "process_weights_after_loading", lambda self, layer: None)


def keep_parameters(runner):
    """A probe: the projections' and the experts' parameters of this rank, by name, as numpy arrays."""
    return lambda: {
        name: as_array(param.detach())
        for name, param in runner.model.named_parameters()
        if "_proj." in name or ".experts." in name
    }


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """numpy has neither FP8, whose bytes stand for it, nor bfloat16, which float32 holds."""
    if tensor.dtype == torch.bfloat16:
        return tensor.float().numpy()
    return (tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor).numpy()


def part(tensor: np.ndarray, axis: int, number: int, of: int) -> np.ndarray:
    """The ``number``-th of ``of`` equal parts of ``tensor`` along ``axis``; all of it where it has no such axis."""
    return np.split(tensor, of, axis)[number] if tensor.ndim > axis else tensor


def expected_parameters(
    tensors: dict[str, np.ndarray], form: Format, rank: int, tp: int, ep: int, up_first: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """(name of the fused parameter, what it must hold on ``rank``) for all quantised parameters.

    ``up_first``: rows of up stand before those of gate, as FlashInfer's kernel wants them; scalars do not.
    """
    tensors = {name: tensor.reshape(()) if tensor.size == 1 else tensor for name, tensor in tensors.items()}
    out_axis, in_axis = (1, 0) if form.transposed else (0, 1)
    kv_shards = min(tp, SHAPE.num_key_value_heads)
    moe_tp, per_rank = tp // ep, SHAPE.num_local_experts // ep
    first_expert, width = rank // moe_tp * per_rank, rank % moe_tp
    for layer in range(SHAPE.num_hidden_layers):
        for suffix in [suffix for suffix in form.tensors(256, 256) if suffix not in form.unread]:
            attention = f"model.layers.{layer}.self_attn."
            own_kv = rank * kv_shards // tp, kv_shards
            rank_of = {"q": (rank, tp), "k": own_kv, "v": own_kv}
            shards = [
                part(tensors[f"{attention}{name}_proj.{suffix}"], out_axis, *where) for name, where in rank_of.items()
            ]
            yield f"{attention}qkv_proj.{suffix}", together(shards, out_axis)
            output = part(tensors[f"{attention}o_proj.{suffix}"], in_axis, rank, tp)
            yield f"{attention}o_proj.{suffix}", np.atleast_1d(output)
            experts = f"model.layers.{layer}.block_sparse_moe.experts."
            mine = range(first_expert, first_expert + per_rank)
            if suffix == "input_scale":  # of which the engine's kernels want the largest of all experts
                mine = range(SHAPE.num_local_experts)
            own = [f"{experts}{expert}." for expert in mine]
            both = ("w3", "w1") if up_first and tensors[f"{own[0]}w1.{suffix}"].ndim else ("w1", "w3")
            gate_up = [
                together([part(tensors[f"{one}{w}.{suffix}"], out_axis, width, moe_tp) for w in both], out_axis)
                for one in own
            ]
            down = [part(tensors[f"{name}w2.{suffix}"], in_axis, width, moe_tp) for name in own]
            for which, values in (("w13", np.stack(gate_up)), ("w2", np.stack(down))):
                yield f"{experts}{which}_{suffix}", values.swapaxes(1, 2) if form.experts_turned else values


def together(shards: list[np.ndarray], axis: int) -> np.ndarray:
    """Shards of one fused parameter: side by side, a scalar for each, or one for all where they share it."""
    if shards[0].ndim == 0:
        return np.stack(shards)
    return np.concatenate(shards, axis) if shards[0].ndim > axis else shards[0]


ANY = [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
LAYOUTS = {
    "awq": [(2, 1), (4, 1)],
    "gptq": [(1, 1)],
    "nvfp4": [(2, 1), (2, 2), (4, 1), (4, 4)],
    "w4a16": ANY,
    "w4a4": [(2, 1), (4, 1)],
}
CASES = [(name, *layout) for name in FORMATS for layout in LAYOUTS[name]]


@pytest.mark.parametrize(("name", "tp", "ep"), CASES)
def test_every_parameter_holds_its_shard(checkpoints, as_if_on_a_gpu, name, tp, ep):
    folder, tensors = checkpoints[name]
    # The one kernel in which the engine takes EP for NVFP4.
    runner = {"moe_runner_backend": "flashinfer_cutlass"} if name == "nvfp4" and ep > 1 else {}
    for rank, params in enumerate(load(folder, name, tp, ep, **runner)):
        for param, expected in expected_parameters(tensors, FORMATS[name], rank, tp, ep, bool(runner)):
            got = params[param]
            assert got.shape == expected.shape, f"rank {rank}: {param} {got.shape}, not {expected.shape}"
            assert (got == expected).all(), f"rank {rank}: {param}"


@pytest.mark.parametrize(("name", "scale"), [("nvfp4", "input_scale"), ("w4a4", "input_global_scale")])
def test_an_expert_without_its_activations_scale_is_refused(checkpoints, as_if_on_a_gpu, tmp_path, name, scale):
    """Calibration may never have reached it. The engine allocates scales without a value, and NaN may be one."""
    whole, folder = checkpoints[name][0], tmp_path / "without"
    shutil.copytree(whole, folder)
    expert = "model.layers.1.block_sparse_moe.experts.2."
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        kept = {key: one for key, one in tensors.items() if not (key.startswith(expert) and key.endswith("." + scale))}
        save_file(kept, file)
        drop_from_index(folder, tensors.keys() - kept.keys())
    with pytest.raises(LayoutFailed, match=rf"w13_{scale} .*without w1 of expert 2"):
        load(folder, name, 2, 1)


def drop_from_index(folder: Path, names: set[str]) -> None:
    for file in folder.glob("*.index.json"):
        index = json.loads(file.read_text())
        index["weight_map"] = {name: one for name, one in index["weight_map"].items() if name not in names}
        file.write_text(json.dumps(index))


def load(folder: Path, name: str, tp: int, ep: int, **server_arguments) -> list[dict[str, np.ndarray]]:
    dtype = "float16" if name in ("awq", "gptq") else "bfloat16"
    return run_layout(
        folder, tp=tp, ep=ep, prompts_by_dp_rank=[[[1]]], steps=0, dtype=dtype, probe=keep_parameters, timeout_s=60,
        server_arguments=server_arguments,
    ).probed  # fmt: skip


def test_a_layer_that_an_awq_checkpoint_left_as_it_was_is_loaded_as_it_is(tmp_path, as_if_on_a_gpu):
    """As published ones leave the first; the engine would give its experts AWQ's parameters."""
    kept = "model.layers.0."
    form = FORMATS["awq"]
    form = replace(form, config=form.config | {"modules_to_not_convert": ["gate", "lm_head", kept]})
    plain = write_checkpoint(tmp_path / "plain", SHAPE)
    tensors = write_quantised(plain, tmp_path / "awq", form, kept)
    for rank, params in enumerate(load(tmp_path / "awq", "awq", 2, 1)):
        experts = f"{kept}block_sparse_moe.experts."
        for expert in range(SHAPE.num_local_experts):
            own = {w: tensors[f"{experts}{expert}.{w}.weight"] for w in ("w1", "w2", "w3")}
            gate_up = np.concatenate([part(own[w], 0, rank, 2) for w in ("w1", "w3")])
            assert np.allclose(params[f"{experts}w13_weight"][expert], gate_up, rtol=1e-3, atol=1e-6)
            assert np.allclose(params[f"{experts}w2_weight"][expert], part(own["w2"], 1, rank, 2), rtol=1e-3, atol=1e-6)
        assert f"{kept}self_attn.qkv_proj.weight" in params and f"{experts}w13_qweight" not in params
        assert "model.layers.1.block_sparse_moe.experts.w13_qweight" in params


@pytest.mark.parametrize("tp", [2, 4])
def test_gptq_experts_cut_by_width_are_refused_with_the_way_out(checkpoints, as_if_on_a_gpu, tp):
    """The engine's own allocation, of all scales on every rank, cannot be loaded by its own cutting of them."""
    said = f"GPTQ experts cannot be divided over --tp {tp}: .* Add --quantization moe_wna16"
    with pytest.raises(LayoutFailed, match=said):
        load(checkpoints["gptq"][0], "gptq", tp, 1)


@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (4, 1), (2, 2), (4, 2)])
def test_the_way_out_for_gptq_loads_each_ranks_part(checkpoints, as_if_on_a_gpu, monkeypatch, tp, ep):
    """Held as bytes of two weights each, [out, in / 2], and scales [out, groups]."""
    monkeypatch.setattr(moe_wna16, "get_device_capability", lambda *_: (9, 0))
    folder, tensors = checkpoints["gptq"]
    moe_tp, per_rank = tp // ep, SHAPE.num_local_experts // ep

    def four_bits(packed: np.ndarray, axis: int) -> np.ndarray:
        """The weights that lie along ``axis`` in the integers of ``packed``, the lowest bits first."""
        shifts = np.arange(0, 8 * packed.dtype.itemsize, 4)
        unpacked = np.stack([(packed >> shift) & 15 for shift in shifts], axis + 1)
        return unpacked.reshape(*packed.shape[:axis], -1, *packed.shape[axis + 1 :]).astype(int)

    for rank, params in enumerate(load(folder, "gptq", tp, ep, quantization="moe_wna16")):
        for layer, place in np.ndindex(SHAPE.num_hidden_layers, per_rank):
            experts, expert = f"model.layers.{layer}.block_sparse_moe.experts.", rank // moe_tp * per_rank + place
            for which, shards, axis in (("w13", ("w1", "w3"), 1), ("w2", ("w2",), 0)):
                own = [f"{experts}{expert}.{shard}." for shard in shards]
                weight = [part(four_bits(tensors[f"{name}qweight"], 0), axis, rank % moe_tp, moe_tp) for name in own]
                scales = [part(tensors[f"{name}scales"], axis, rank % moe_tp, moe_tp) for name in own]
                got = four_bits(params[f"{experts}{which}_qweight"][place], 1)
                assert (got == np.concatenate(weight, 1).T).all(), f"rank {rank}, {which} of expert {expert}"
                assert (params[f"{experts}{which}_scales"][place] == np.concatenate(scales, 1).T).all()


@pytest.mark.parametrize(
    ("name", "way_out"), [("awq", "Leave --ep out."), ("gptq", "Leave --ep out, and give --quant")]
)
def test_experts_whose_kernels_know_no_other_ranks_are_not_divided_by_ep(checkpoints, as_if_on_a_gpu, name, way_out):
    with pytest.raises(LayoutFailed, match=f"{name}.* experts and --ep 2: .* {way_out}"):
        load(checkpoints[name][0], name, 2, 2)


def test_nvfp4_of_compressed_tensors_is_not_divided_by_ep(checkpoints, as_if_on_a_gpu):
    """Whatever the backend: the engine has one kernel for it, which takes the experts of all ranks on each."""
    for runner in ("auto", "flashinfer_cutlass"):
        with pytest.raises(LayoutFailed, match=f"--ep 2 and --moe-runner-backend {runner}: .*step. Leave --ep out."):
            load(checkpoints["w4a4"][0], "w4a4", 2, 2, moe_runner_backend=runner)
