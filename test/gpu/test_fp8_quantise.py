"""What quantises many tokens on a GPU: against plain torch bit by bit, the engine's kernels, and in the layers."""

from __future__ import annotations

import pytest
import torch

from sglang_minimax import overlay

overlay.install()

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("needs an NVIDIA GPU of compute capability 9 (Hopper)", allow_module_level=True)

from sglang.srt.layers import minimax_fp8_quantise as fp8  # noqa: E402  (only after the overlay)
from sglang.srt.layers.quantization import fp8_kernel  # noqa: E402
from unit.fp8_layers import bfloat16_pairs, problem  # noqa: E402

ROWS = [1, 3, 16, 65, 513, 2048]
PLANS = [None, (8, 4), (32, 4), (32, 8)]


def same(found, expected) -> bool:
    return all(torch.equal(ours.float(), theirs.float()) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("plan", PLANS)
def test_every_value_in_a_group_of_every_largest_magnitude_becomes_what_division_makes_of_it(plan):
    x = bfloat16_pairs().cuda()
    assert same(fp8.quantise(x, plan=plan), fp8.quantise_reference(x))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("columns", [128, 1536, 3072])
def test_values_and_scales_are_those_of_plain_torch_and_of_the_engines_kernel(rows, columns):
    x = problem(rows, 8, columns, "cuda")[0]
    expected = fp8.quantise_reference(x)
    for layout in ({}, {"column_major": True}, {"column_major": True, "tma_aligned": True}):
        found = fp8.quantise(x, **layout)
        assert same(found, expected)
        names = {"column_major": "column_major_scales", "tma_aligned": "scale_tma_aligned"}
        engine = fp8_kernel.sglang_per_token_group_quant_fp8(
            x, 128, **{names[name]: value for name, value in layout.items()}
        )
        assert same(found, engine) and found[1].stride() == engine[1].stride()
    wide = torch.cat([x, torch.full_like(x, float("nan"))], dim=1)[:, :columns]
    assert same(fp8.quantise(wide), expected)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("rows", ROWS)
def test_silu_of_gate_times_up_is_quantised_from_its_bfloat16(rows, plan):
    gate_up = problem(rows, 8, 768, "cuda")[0]
    values, scale = fp8.quantise_activated(gate_up, plan)
    expected_values, expected_scale = fp8.quantise_reference(fp8.activated_reference(gate_up))
    # A float32 SiLU beside a limit between two bfloat16 values may fall on its other side.
    assert ((scale - expected_scale).abs() <= expected_scale * 2**-8).all()
    scales, expected_scales = (s.double().repeat_interleave(128, 1) for s in (scale, expected_scale))
    expected = expected_values.double() * expected_scales
    step = torch.maximum(expected.abs() * 2**-3, expected_scales * 2**-9)
    assert ((values.double() * scales - expected).abs() <= 1.1 * step).all(), "no further than the next e4m3 value"
    assert ((values.double() * scales) != expected).sum() <= 128 + values.numel() * 2**-7
    assert same(fp8.quantise_activated(gate_up, plan), (values, scale))


def test_graphs_of_several_sizes_replay_in_any_order():
    batches = {rows: problem(rows, 8, 768, "cuda")[0] for rows in (512, 7, 2048)}
    fp8.quantise_activated(batches[7])
    fp8.quantise(batches[7], column_major=True)
    graphs = {}
    for rows, x in batches.items():
        graphs[rows] = torch.cuda.CUDAGraph(), None
        with torch.cuda.graph(graphs[rows][0]):
            graphs[rows] = graphs[rows][0], (*fp8.quantise_activated(x), *fp8.quantise(x, column_major=True))
    for rows in (7, 2048, 512, 7):
        x = batches[rows].copy_(torch.randn_like(batches[rows]))
        graph, outputs = graphs[rows]
        graph.replay()
        assert same(outputs, (*fp8.quantise_activated(x), *fp8.quantise(x, column_major=True)))
