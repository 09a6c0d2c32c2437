"""When attention's projections take the FP8 kernels, by which plan, and what they compute when interpreted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers import minimax_fp8_linear as fp8
from sglang.srt.layers import minimax_log
from sglang.srt.layers.quantization import fp8_utils
from sglang.srt.layers.quantization.fp8_utils import Fp8GemmRunnerBackend
from unit.fp8_layers import Layer, problem
from unit.interpreted import assert_passes_interpreted

from sglang_minimax.cpu_host import has_no_accelerator

OPTIONS = ["enable_deterministic_inference", "enable_lora", "lora_paths", "enable_symm_mem"]


@pytest.mark.skipif(not has_no_accelerator(), reason="the op is for the GPU here: test/gpu/test_fp8_linear.py")
def test_the_kernels_in_tritons_interpreter():
    assert_passes_interpreted("fp8_linear_interpreted.py", "fp8_quantise_interpreted.py")  # one start of the engine


def test_activations_become_the_nearest_of_all_e4m3_values():
    x, _, _ = problem(9, 8, 512)
    q, scale = fp8.quantise_reference(x)
    assert q.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == (9, 4)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    every = every[every.isfinite()]
    target = x.double().unflatten(-1, (-1, 128)) / scale.double()[..., None]
    nearest = (target[..., None] - every).abs().amin(-1)
    ours = (target - q.double().unflatten(-1, (-1, 128))).abs()
    assert (ours <= nearest + target.abs() * 2**-22).all()
    assert (target.abs().amax(-1)[x.unflatten(-1, (-1, 128)).abs().amax(-1) > 0] > 447.9).all()
    assert torch.equal(scale[0, :1], torch.tensor([1e-10]) / 448)  # a group of zeros


@pytest.mark.parametrize("shape", [*fp8.PLANS, (256, 100), (3072, 2176), (12288, 16384)])
def test_every_shape_and_count_has_a_plan_that_covers_it(shape):
    inputs, outputs = shape
    limits = list(fp8.plans_for(inputs, outputs))
    assert limits == sorted(limits) and fp8.plan_for(limits[-1] + 1, inputs, outputs) is None
    for tokens in range(1, limits[-1] + 1):
        plan = fp8.plan_for(tokens, inputs, outputs)
        tiles = plan.tiles(tokens, outputs)
        assert tiles[0] * plan.block_n >= outputs and tiles[1] * plan.block_tokens >= tokens
        assert plan.splits * plan.steps(inputs // 128) >= inputs // 128
        assert 128 % plan.block_n == 0
        assert (plan.block_n if plan.swap else plan.block_tokens) % 64 == 0  # the rows of Hopper's tensor cores


def test_a_shape_without_a_row_takes_the_nearest():
    assert fp8.plans_for(3072, 2176) is fp8.PLANS[3072, 2048]
    assert fp8.plans_for(256, 3000) is fp8.PLANS[384, 3072]
    assert all(fp8.plans_for(*shape) is plans for shape, plans in fp8.PLANS.items())


def layer(**changed):
    _, weight, scale = problem(1, 160, 384)
    made = Layer(changed.get("weight", weight), changed.get("scale", scale), changed.get("block", (128, 128)))
    made.bias = changed.get("bias")
    made.quant_method.use_mxfp8 = changed.get("mxfp8", False)
    made.quant_method.use_marlin = changed.get("marlin", False)
    return made


@pytest.fixture
def chosen(monkeypatch):
    """What a server with some options gives a layer, and the lines that it logs."""
    said = []
    monkeypatch.setattr(minimax_log, "log_info_on_rank0", lambda logger, text: said.append(text))

    def choose(made, cuda=True, capability=9, dtype=torch.bfloat16, backend="auto", **options):
        monkeypatch.setattr(fp8, "is_cuda", lambda: cuda)
        monkeypatch.setattr(fp8, "get_device_capability", lambda: (capability, 0))
        monkeypatch.setattr(torch, "get_default_dtype", lambda: dtype)
        monkeypatch.setattr(fp8, "get_fp8_gemm_runner_backend", lambda: Fp8GemmRunnerBackend(backend))
        arguments = SimpleNamespace(**{**dict.fromkeys(OPTIONS, False), **options})
        monkeypatch.setattr(fp8, "get_global_server_args", lambda: arguments)
        minimax_log.log_once.cache_clear()
        projections = [fp8.choose_projection(SimpleNamespace(linear=made), "linear") for _ in range(3)]
        minimax_log.log_once.cache_clear()
        return projections[-1], said

    return choose


def test_the_published_layer_on_hopper_takes_the_kernel(chosen):
    projection, said = chosen(layer())
    assert isinstance(projection, fp8.Fp8Linear)
    limit = max(fp8.plans_for(384, 160))
    assert said == [f"Projections of 384 to 160 quantise and multiply in one kernel up to {limit} tokens."]


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"cuda": False}, "Hopper"),
        ({"capability": 8}, "Hopper"),
        ({"capability": 10}, "Hopper"),
        ({"dtype": torch.float16}, "float16"),
        ({"backend": "triton"}, "--fp8-gemm-backend triton"),
        ({"enable_deterministic_inference": True}, "batch size"),
        ({"enable_lora": True}, "LoRA"),
        ({"lora_paths": ["one"]}, "LoRA"),
        ({"enable_symm_mem": True}, "--enable-symm-mem"),
        ({"forward_hooks": [{}]}, "--forward-hooks"),
    ],
)
def test_each_of_a_servers_options_leaves_the_layer_to_the_engine(chosen, option, reason):
    made = layer()
    projection, said = chosen(made, **option)
    assert len(said) == 1 and reason in said[0] and "the engine's linear layers" in said[0]
    assert projection(problem(3, 160, 384)[0]).shape == (3, 160) and made.calls == 1


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"weight": torch.zeros(160, 384, dtype=torch.bfloat16)}, "checkpoint's FP8"),
        ({"weight": torch.zeros(384, 160, dtype=torch.float8_e4m3fn).T}, "strides"),
        ({"weight": torch.zeros(160, 320, dtype=torch.float8_e4m3fn)}, "whole, contiguous groups"),
        ({"scale": torch.zeros(2, 3, dtype=torch.int32)}, "torch.int32"),
        ({"scale": torch.zeros(3, 2)}, r"shape (3, 2)"),
        ({"scale": torch.zeros(3, 2).T}, "not contiguous"),
        ({"block": (1, 32)}, "blocks of 128 x 128"),
        ({"mxfp8": True}, "blocks of 128 x 128"),
        ({"marlin": True}, "blocks of 128 x 128"),
        ({"bias": torch.zeros(160)}, "bias"),
    ],
)
def test_other_weights_are_left_to_the_engine(chosen, changed, reason):
    projection, said = chosen(layer(**changed))
    assert not isinstance(projection, fp8.Fp8Linear) and len(said) == 1 and reason in said[0]


def test_a_layer_of_another_quantisation_is_left_to_the_engine(chosen):
    plain = torch.nn.Linear(384, 160, bias=False)
    projection, said = chosen(plain)
    assert not isinstance(projection, fp8.Fp8Linear) and "checkpoint's FP8" in said[0]


def test_weights_that_were_changed_after_loading_are_left_to_the_engine(monkeypatch):
    said = []
    monkeypatch.setattr(minimax_log, "log_info_on_rank0", lambda logger, text: said.append(text))
    minimax_log.log_once.cache_clear()
    made = layer()
    projection = fp8.Fp8Linear(made)
    scale = made.weight_scale_inv
    made.weight_scale_inv = torch.nn.Parameter(scale.to(torch.int32), requires_grad=False)
    assert fp8.reason_against_layer(made) is not None
    for _ in range(2):
        projection(problem(3, 160, 384)[0])
    minimax_log.log_once.cache_clear()
    assert made.calls == 2 and len(said) == 1 and "torch.int32" in said[0]


@pytest.mark.parametrize(
    ("way", "outputs", "said"),
    [
        (fp8_utils.triton_w8a8_block_fp8_linear, 256, ["by the engine, whose product is triton_w8a8"]),
        (fp8_utils.cutlass_w8a8_block_fp8_linear_with_fallback, 160, ["by the engine, whose product is cutlass"]),
        (fp8_utils.deepgemm_w8a8_block_fp8_linear_with_fallback, 160, ["by the engine, whose product is deepg"]),
    ],
)
def test_a_product_that_is_not_known_is_left_to_the_engine(monkeypatch, way, outputs, said):
    """``fp8_quantise_interpreted.py`` has those that are taken."""
    lines = []
    monkeypatch.setattr(minimax_log, "log_info_on_rank0", lambda logger, text: lines.append(text))
    minimax_log.log_once.cache_clear()
    x, weight, scale = problem(201, outputs, 384)
    made = Layer(weight, scale)
    made.quant_method.w8a8_block_fp8_linear = way
    project = fp8.Fp8Linear(made)
    for _ in range(2):
        assert project(x).shape == (201, outputs)
    minimax_log.log_once.cache_clear()
    assert made.calls == 2 and len(lines) == len(said) and all(map(str.__contains__, lines, said))


@pytest.mark.parametrize("outputs", [256, 160], ids=["quantised here", "quantised by the engine"])
def test_deepgemm_compiles_with_the_first_few_tokens(monkeypatch, outputs):
    """At its first product of a shape it takes minutes: the engine's warm-up, of a few tokens, has to come to that."""
    compiled = []

    def deepgemm(q, weight, scale, weight_scale, block, output_dtype):
        compiled.append((len(q), len(weight)))
        return q.new_zeros(len(q), len(weight), dtype=output_dtype)

    monkeypatch.setattr(fp8, "fp8_linear", lambda x, weight, *others: x.new_zeros(len(x), len(weight)))
    monkeypatch.setattr(fp8.minimax_fp8_quantise, "quantise", lambda x, **layout: (x, None))
    monkeypatch.setattr(fp8_utils, "w8a8_block_fp8_matmul_deepgemm", deepgemm)
    x, weight, scale = problem(4, outputs, 384)
    made = Layer(weight, scale)
    made.quant_method.w8a8_block_fp8_linear = fp8_utils.deepgemm_w8a8_block_fp8_linear_with_fallback
    project = fp8.Fp8Linear(made)
    project(x[:0])
    assert not compiled and made.calls == 0
    project(x)
    assert (compiled, made.calls) == (([(4, 256)], 0) if outputs == 256 else ([], 1))
    project(x[:1])
    assert len(compiled) + made.calls == 1
