"""RMSNorm without tokens, and that nothing else of the engine's module changed."""

from __future__ import annotations

import pytest
import torch
from sglang.srt.layers import layernorm
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

from sglang_minimax.overlay import folder, is_active

WIDTH = 8


@pytest.fixture
def norm():
    set_global_server_args_for_scheduler(ServerArgs(model_path="dummy"))
    return layernorm.RMSNorm(WIDTH)


def test_the_overlay_is_what_is_tested():
    assert is_active()
    assert layernorm.__file__.startswith(folder())


def test_all_other_names_are_the_engines_own_objects():
    engine = layernorm._engine
    assert engine is not layernorm
    for name, value in vars(engine).items():
        if not name.startswith("__") and name != "RMSNorm":
            assert getattr(layernorm, name) is value, name
    assert layernorm.RMSNorm is not engine.RMSNorm
    assert issubclass(layernorm.RMSNorm, engine.RMSNorm)
    for attribute in vars(engine.RMSNorm):
        if attribute not in ("forward_cuda", "__module__", "__doc__", "__dict__", "__weakref__"):
            assert getattr(layernorm.RMSNorm, attribute) is getattr(engine.RMSNorm, attribute), attribute


def test_stock_loses_the_residual_without_tokens(norm):
    """What is mended here: should the engine mend it itself one day, this module has no reason to be."""
    empty = torch.empty(0, WIDTH)
    out = layernorm._engine.RMSNorm.forward_cuda(norm, empty, empty.clone(), empty.clone())
    assert not isinstance(out, tuple)


@pytest.mark.parametrize("with_addition", [False, True])
@pytest.mark.parametrize("path", ["forward_cuda", "forward_native"])
def test_without_tokens_the_pair_comes_back(norm, path, with_addition):
    """A shape of [0, width] adds nothing up, so the addition shows in its dtype: float32 + float64 is float64."""
    x, residual = torch.empty(0, WIDTH), torch.empty(0, WIDTH)
    addition = torch.empty(0, WIDTH, dtype=torch.float64) if with_addition else None
    out = getattr(norm, path)(x, residual, addition)
    assert isinstance(out, tuple) and len(out) == 2
    normed, kept = out
    assert normed.shape == kept.shape == (0, WIDTH)
    assert normed.dtype == torch.float32
    if path == "forward_cuda":
        assert kept.dtype == (torch.float64 if with_addition else torch.float32)
        assert (kept is residual) != with_addition


def test_without_tokens_and_residual_x_comes_back(norm):
    x = torch.empty(0, WIDTH)
    assert norm.forward_cuda(x) is x


def test_with_tokens_the_engines_kernel_gets_all_that_was_given(norm, monkeypatch):
    """It runs on GPUs only; an addition that did not reach it would be missing from every sum behind it."""
    given = tuple(torch.randn(5, WIDTH) for _ in range(3))
    reached = []
    monkeypatch.setattr(layernorm._engine.RMSNorm, "forward_cuda", lambda self, *inputs: reached.append(inputs))
    norm.forward_cuda(*given)
    assert len(reached) == 1 and all(got is one for got, one in zip(reached[0], given, strict=True))


def test_with_tokens_the_sum_includes_the_addition(norm):
    """Float64 by hand, on the path that this host has."""
    generator = torch.Generator().manual_seed(0)
    x, residual, addition = (torch.randn(5, WIDTH, generator=generator) for _ in range(3))
    norm.weight.data.copy_(torch.rand(WIDTH, generator=generator) + 0.5)
    total = x.double() + residual.double() + addition.double()
    expected = total / (total.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight.double()
    normed, kept = norm.forward_native(x.clone(), residual.clone(), addition.clone())
    torch.testing.assert_close(kept.double(), total, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(normed.double(), expected, rtol=1e-5, atol=1e-6)
