"""The FP8 linear layers' kernels on a GPU against float64: every plan, every way in which a server runs them."""

from __future__ import annotations

import functools

import pytest
import torch

from sglang_minimax import overlay

overlay.install()

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("needs an NVIDIA GPU of compute capability 9 (Hopper)", allow_module_level=True)

from sglang.srt.layers import minimax_fp8_linear as fp8  # noqa: E402  (only after the overlay)
from sglang.srt.layers.minimax_fp8_linear import Plan  # noqa: E402
from sglang.srt.layers.quantization import fp8_utils  # noqa: E402
from unit.fp8_layers import Layer, check, problem  # noqa: E402

TOKENS = [1, 2, 3, 8, 9, 16, 17, 31, 33, 64, 65, 129]
SHAPES = [(inputs, outputs) for inputs, outputs in fp8.PLANS]
ODD_SHAPES = [(128, 8), (384, 160), (640, 100), (1152, 4000)]
SERVED = {plan for plans in fp8.PLANS.values() for plan in plans.values()}
OTHERS = {  # of every kind that the benchmark tries
    Plan(16, 64, 1, 4, stages=6),
    Plan(32, 128, 2, 8, stages=6),
    Plan(128, 64, 12, 4),
    Plan(64, 32, 2, 4, stages=3, swap=False),
    Plan(64, 64, 1, 4, stages=3, swap=False),
}
PLANS = sorted(SERVED | OTHERS)


@functools.lru_cache(maxsize=4)
def case(tokens: int, inputs: int, outputs: int):
    """x, weight, scale, finished: weights are read before the launch before is waited for."""
    made = problem(tokens, outputs, inputs, "cuda")
    torch.cuda.synchronize()
    return made


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: "/".join(map(str, plan)))
@pytest.mark.parametrize(("inputs", "outputs"), [(3072, 2048), *ODD_SHAPES])
def test_every_plan_takes_any_shape_and_repeats_its_bits(plan, inputs, outputs):
    for tokens in TOKENS:
        x, weight, scale = case(tokens, inputs, outputs)
        out = fp8.fp8_linear(x, weight, scale, plan)
        check(out, x, weight, scale)
        for _ in range(5):
            assert torch.equal(out, fp8.fp8_linear(x, weight, scale, plan))


@pytest.mark.parametrize(("inputs", "outputs"), [*SHAPES, *ODD_SHAPES])
@pytest.mark.parametrize("tokens", [0, *TOKENS, 300])
def test_a_layer_takes_any_number_of_tokens(tokens, inputs, outputs):
    x, weight, scale = case(max(tokens, 1), inputs, outputs)
    x = x[:tokens]
    layer = Layer(weight, scale)
    project = fp8.Fp8Linear(layer)
    torch.cuda.synchronize()
    out = project(x)
    assert out.shape == (tokens, outputs) and out.dtype == torch.bfloat16
    assert layer.calls == (tokens > max(fp8.plans_for(inputs, outputs)))
    if tokens:
        check(out, x, weight, scale)
        wide = torch.cat([x, torch.full_like(x, float("nan"))], dim=1)[:, :inputs]
        assert torch.equal(project(wide), out)


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_the_error_is_that_of_the_engines_kernel(inputs, outputs):
    from unit.fp8_layers import dequantised, quantised

    for tokens in fp8.plans_for(inputs, outputs):
        x, weight, scale = case(tokens, inputs, outputs)
        exact = quantised(x) @ dequantised(weight, scale).T
        ours = fp8.Fp8Linear(Layer(weight, scale))(x)
        stock = fp8_utils.triton_w8a8_block_fp8_linear(x, weight, [128, 128], scale)
        size = exact.square().mean(-1).sqrt()
        error, allowed = (((one.double() - exact).square().mean(-1).sqrt() / size).max() for one in (ours, stock))
        assert error <= 1.05 * allowed + 2**-16, f"{error:.2e}, and the engine's is {allowed:.2e}"


def test_captured_graphs_of_several_sizes_replay_in_any_order_on_new_inputs():
    """Two layers, one after the other, so that each launch follows one of the other's."""
    _, first_weight, first_scale = case(1, 3072, 2048)
    _, second_weight, second_scale = case(1, 2048, 3072)
    first, second = fp8.Fp8Linear(Layer(first_weight, first_scale)), fp8.Fp8Linear(Layer(second_weight, second_scale))
    torch.cuda.synchronize()
    x = torch.randn(64, 3072, device="cuda").bfloat16()
    second(first(x))
    graphs = {}
    for tokens in (64, 33, 16, 5, 1):
        second(first(x[:tokens]))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = second(first(x[:tokens]))
        graphs[tokens] = graph, out
    generator = torch.Generator("cuda").manual_seed(0)
    for tokens in (1, 64, 5, 5, 33, 16, 64, 1, 33):
        graph, out = graphs[tokens]
        x.copy_(torch.randn(x.shape, device="cuda", generator=generator))
        out.fill_(float("nan"))
        for _ in range(20):
            graph.replay()
        expected = second(first(x[:tokens]))
        assert torch.equal(out, expected)
        check(expected, first(x[:tokens]), second_weight, second_scale)


def test_compiled_whole_with_a_symbol_for_the_tokens():
    """As the engine compiles the forward: no graph break, and no other graph on the other side of the limit."""
    _, weight, scale = case(1, 3072, 2048)
    project = fp8.Fp8Linear(Layer(weight, scale))
    torch.cuda.synchronize()
    compiled = torch.compile(lambda x: project(x * 2) + 0, fullgraph=True, dynamic=True)
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (5, 17, 64, 65, 300):
            x, _, _ = case(tokens, 3072, 2048)
            check(compiled(x), x * 2, weight, scale)


def test_one_layer_on_two_streams_at_once():
    """As two-batch overlap and pdmux may run it: nothing is shared but the weights."""
    _, weight, scale = case(1, 3072, 2048)
    project = fp8.Fp8Linear(Layer(weight, scale))
    inputs = [case(tokens, 3072, 2048)[0] for tokens in (16, 64)]
    expected = [project(x) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    outputs: list[list[torch.Tensor]] = [[], []]
    for _ in range(50):
        for stream, x, made in zip(streams, inputs, outputs, strict=True):
            with torch.cuda.stream(stream):
                made.append(project(x))
    torch.cuda.synchronize()
    for made, one in zip(outputs, expected, strict=True):
        assert all(torch.equal(out, one) for out in made)
