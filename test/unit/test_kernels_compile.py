"""Every plan that is served compiles for the GPUs on which it is, with the Triton that is installed, and fits them.

What was measured on GPUs had another Triton than the engine pins; how much shared memory a pipeline of loads takes is
the compiler's business, and a launch that wants too much of it fails in the server. QK norm, and all-reduce + norm,
whose assembly is looked at too, have such a test in their own files.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from sglang.srt.layers import minimax_decode_attention as attention
from sglang.srt.layers import minimax_experts as experts
from sglang.srt.layers import minimax_fp8_linear as linear
from sglang.srt.layers import minimax_fp8_quantise as fp8_quantise
from sglang.srt.layers import minimax_prefill_attention as prefill
from sglang.srt.layers import minimax_qk_norm_rope as qk_norm
from sglang.srt.layers import minimax_router as router
from unit.compiled import compiling_for, meta

HIDDEN_SIZE, EXPERTS, TOP_K = 3072, 256, 8  # as published
BFLOAT16, FLOAT8, FLOAT32, INT32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.int32
SPILLED = 16  # bytes of a thread that nobody notices; a plan that does not fit its registers spills hundreds


@pytest.fixture
def kernels(monkeypatch):
    """What the test's launches compile for Hopper, the only GPUs that these kernels are chosen for."""
    for module in (attention, experts, linear, qk_norm, router):
        monkeypatch.setattr(module, "has_programmatic_launch", lambda device: True)
    for module in (attention, experts):
        monkeypatch.setattr(module, "num_multiprocessors", lambda device: 132)
    with compiling_for(90, monkeypatch) as compiled:
        yield compiled


def assert_runs(kernels, *names: str) -> None:
    assert [kernel.name for kernel in kernels] == list(names)
    for kernel in kernels:
        assert kernel.ctas_of_sm() > 0 and kernel.spilled <= SPILLED, kernel


@pytest.mark.parametrize("tokens", router.CHOICE_PLANS)
def test_the_router(kernels, tokens):
    plan, weight = router.choice_plan_for(tokens), meta(EXPERTS, HIDDEN_SIZE, dtype=FLOAT32)
    partials = router.partial_logits(meta(tokens, HIDDEN_SIZE, dtype=BFLOAT16), weight, plan.logits)
    router.choose_experts(partials, meta(EXPERTS, dtype=FLOAT32), TOP_K, plan.warps)
    router.add_partials(partials)
    first = "_tiled_partial_logits_kernel" if plan.logits.method == "tiles" else "_partial_logits_kernel"
    assert_runs(kernels, first, "_choose_experts_kernel", *["_add_partials_kernel"] * (len(partials) > 1))


SERVED_EXPERTS = [  # local experts, their local width, tokens
    (local, width, tokens)
    for local, width in [(256, 384), (256, 768), (256, 1536), (128, 384), (64, 384), (32, 1536)]
    for tokens in experts.plans_for(width)
]


@pytest.mark.parametrize(("local", "width", "tokens"), SERVED_EXPERTS)
def test_the_experts_of_few_tokens(kernels, local, width, tokens):
    plan = experts.plan_for(tokens, width)
    experts.run_plan(
        plan, meta(tokens, HIDDEN_SIZE, dtype=BFLOAT16), meta(tokens, TOP_K, dtype=FLOAT32),
        meta(tokens, TOP_K, dtype=INT32), meta(local, 2 * width, HIDDEN_SIZE, dtype=FLOAT8),
        meta(local, 2 * width // 128, HIDDEN_SIZE // 128, dtype=FLOAT32),
        meta(local, HIDDEN_SIZE, width, dtype=FLOAT8), meta(local, HIDDEN_SIZE // 128, width // 128, dtype=FLOAT32), 0,
    )  # fmt: skip
    if not plan.lists:
        assert_runs(kernels, "_gate_up_by_route_kernel", "_down_by_token_kernel")
        return
    assert_runs(kernels, "_list_kernel", "_gate_up_kernel", "_down_kernel", "_sum_kernel")
    for kernel, how in zip(kernels[1:3], (plan.gate_up, plan.down), strict=True):
        assert kernel.ctas_of_sm() >= how.ctas, f"{kernel}: {how.ctas} of its CTAs are to be on a multiprocessor"


@pytest.mark.parametrize(
    ("shape", "tokens"), [(shape, limit) for shape in linear.PLANS for limit in linear.PLANS[shape]]
)
def test_the_projections_of_few_tokens(kernels, shape, tokens):
    inputs, outputs = shape
    weight, scale = meta(outputs, inputs, dtype=FLOAT8), meta(-(-outputs // 128), inputs // 128, dtype=FLOAT32)
    plan = linear.plan_for(tokens, inputs, outputs)
    linear.fp8_linear(meta(tokens, inputs, dtype=BFLOAT16), weight, scale, plan)
    assert_runs(kernels, "_fp8_linear_kernel", *["_add_parts_kernel"] * (plan.splits > 1))


@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float16])
@pytest.mark.parametrize("ragged", [True, False], ids=["triton", "fa3"])
@pytest.mark.parametrize("requests", [1, 16, 64, attention.MAX_REQUESTS])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 1), (12, 2), (48, 8)])
def test_decode_attention(kernels, heads, kv_heads, requests, ragged, dtype):
    slots = meta(1 << 20, dtype=torch.int64) if ragged else meta(requests, 4096, dtype=INT32)
    cached = attention.CachedTokens(meta(requests + ragged, dtype=INT32), slots, ragged)
    cache = meta(1 << 20, kv_heads, attention.HEAD_DIM, dtype=dtype)
    q, counters = meta(requests, heads * attention.HEAD_DIM, dtype=dtype), meta(requests * kv_heads, dtype=INT32)
    plan = attention.plan_for(requests, kv_heads)
    attention.decode_attention(q, cache, cache, cached, counters, plan)
    assert_runs(kernels, "_decode_attention_kernel")
    assert kernels[0].ctas_of_sm() >= plan.ctas_per_sm, f"{kernels[0]}: {plan.ctas_per_sm} are to run at once"
    (tiles,) = (loop for loop in kernels[0].loops() if "HMMA" in loop)
    memory = [name for name in tiles if name in ("LDG", "LDGSTS")]
    between = sum(pair == ("LDGSTS", "LDG") for pair in itertools.pairwise(memory))
    assert memory.count("LDG") and memory.count("LDGSTS")
    assert not ragged or between <= 1, (
        f"slots are loaded one by one between copies of keys, 1.4 times as slow: {memory}"
    )


@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float16])
@pytest.mark.parametrize("plan", list(dict.fromkeys([*prefill.PLANS.values(), prefill.PLAN_OF_MORE])), ids=str)
@pytest.mark.parametrize("requests", [16, prefill.MAX_REQUESTS])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 1), (12, 2), (48, 8)])
def test_prefill_attention(kernels, heads, kv_heads, requests, plan, dtype):
    cache = meta(1 << 20, kv_heads, prefill.HEAD_DIM, dtype=dtype)
    batch = prefill.PrefillBatch(meta(64, 4096, dtype=INT32))
    rows = meta(requests, dtype=torch.int64)
    batch.fill(meta(requests, dtype=INT32), rows, rows, 512)
    prefill.prefill_attention(meta(512, heads * prefill.HEAD_DIM, dtype=dtype), cache, cache, batch, plan)
    assert_runs(kernels, "_fill_kernel", "_prefill_attention_kernel")


@pytest.mark.parametrize("quantise", [fp8_quantise.quantise, fp8_quantise.quantise_activated])
def test_the_quantisation_of_many_tokens(kernels, monkeypatch, quantise):
    def scales(shape, device, group, *layout):
        return meta(shape[0], shape[1] // group, dtype=FLOAT32)

    monkeypatch.setattr(fp8_quantise, "create_per_token_group_quant_fp8_output_scale", scales)
    quantise(meta(8192, HIDDEN_SIZE, dtype=BFLOAT16))
    assert_runs(kernels, "_quantise_kernel")


def test_one_quantisation_serves_every_number_of_rows(kernels, monkeypatch):
    """A second one would be compiled while a server answers."""

    def scales(shape, device, group, *layout):
        return meta(shape[1] // group, shape[0], dtype=FLOAT32).T  # as DeepGEMM and cutlass want them

    monkeypatch.setattr(fp8_quantise, "create_per_token_group_quant_fp8_output_scale", scales)
    for rows in (4096, 4097, 4112):
        fp8_quantise.quantise(meta(rows, HIDDEN_SIZE, dtype=BFLOAT16), column_major=True)
    assert len({kernel.cubin for kernel in kernels}) == 1 and len(kernels) == 3


def test_one_qk_norm_serves_slots_and_positions_at_every_address(kernels):
    """The engine's are slices, which begin at any of the 8 bytes of a number."""
    op = qk_norm.QKNormRope(12, 2, 128, 64, 1e-6, None, 0, "meta")
    width = (12 + 2 * 2) * 128
    numbers, cache = meta(1024, dtype=torch.int64), meta(4096, 2, 128, dtype=BFLOAT16)
    weights = meta(12 * 128, dtype=FLOAT32), meta(2 * 128, dtype=FLOAT32)
    for begin in range(3):
        own = numbers[begin : begin + 100]
        tensors = meta(100, width, dtype=BFLOAT16), meta(100, 12 * 128, dtype=BFLOAT16), *weights
        op._launch(132, qk_norm.launch_plans(width)[0], *tensors, own, meta(8192, 64, dtype=FLOAT32), cache, cache, own)
    assert len({kernel.cubin for kernel in kernels}) == 1 and len(kernels) == 3


def test_the_engines_expert_gemms_by_our_tables(kernels, monkeypatch):
    """Every configuration of every table, with the launch that the engine makes of it."""
    from sglang.srt import server_args
    from sglang.srt.layers.moe.fused_moe_triton import fused_moe_triton_kernels as engine

    from sglang_minimax import expert_tables

    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmark"))
    import expert_gemms as gemms

    monkeypatch.setattr(server_args, "_global_server_args", gemms.NoServer())
    monkeypatch.setattr(engine, "_is_cuda", True)
    monkeypatch.setattr(engine, "is_sm90_supported", lambda: True, raising=False)
    tables = sorted(Path(expert_tables.folder(), *expert_tables.FOLDER).glob("*/*.json"))
    assert tables
    seen = set()
    for path in tables:
        shape = gemms.Shape(*map(int, re.match(r"E=(\d+),N=(\d+),", path.name).groups()))
        stage = gemms.DOWN if path.stem.endswith("_down") else gemms.GATE_UP
        for tokens, block in json.loads(path.read_text()).items():
            args, options = gemms.launch_arguments(engine, shape, stage, int(tokens), block)
            if (kernel := gemms.specialisation(args, options)) in seen:
                continue
            seen.add(kernel)
            engine.fused_moe_kernel.warmup(*args, grid=(1,), **options)
            assert kernels[-1].ctas_of_sm() > 0, f"{path.name}, {tokens} tokens: {kernels[-1]}"
    assert len(seen) > len(tables)
