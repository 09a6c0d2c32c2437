"""Which function sums a token's experts: the kernel in a MiniMax-M2 server, what the engine takes in any other."""

from __future__ import annotations

import json
import pickle
from types import SimpleNamespace

import pytest
from sglang.srt.server_args import ServerArgs

from sglang_minimax import expert_sum
from sglang_minimax.checkpoints import SmallModel, published_config


@pytest.fixture
def server_args(tmp_path):
    """Arguments as a scheduler's process has them: read in another, and sent."""

    def read(architecture: str) -> ServerArgs:
        config = published_config(SmallModel())
        config["architectures"] = [architecture]
        (tmp_path / "config.json").write_text(json.dumps(config))
        args = ServerArgs(model_path=str(tmp_path), device="cpu", skip_tokenizer_init=True)
        return pickle.loads(pickle.dumps(args))

    return read


def engine(arguments, calls: list, **kernel):
    """The engine's module, of which each function says that it was called."""
    return SimpleNamespace(
        moe_sum_reduce_torch_compile=lambda *given: calls.append(("compiled", given)),
        get_global_server_args=lambda: arguments,
        **kernel,
    )


@pytest.mark.parametrize(
    ("architecture", "taken"), [("MiniMaxM2ForCausalLM", "kernel"), ("Qwen3MoeForCausalLM", "compiled")]
)
def test_this_model_sums_in_the_kernel_and_others_as_before(server_args, architecture, taken):
    calls: list = []
    fused_moe = engine(server_args(architecture), calls, moe_sum_reduce=lambda *given: calls.append(("kernel", given)))
    expert_sum.sum_in_kernel(fused_moe)
    fused_moe.moe_sum_reduce_torch_compile("x", "out", 1.0)
    assert calls == [(taken, ("x", "out", 1.0))]


def test_without_the_kernel_nothing_is_touched():
    fused_moe = engine(None, [])
    before = fused_moe.moe_sum_reduce_torch_compile
    expert_sum.sum_in_kernel(fused_moe)
    assert fused_moe.moe_sum_reduce_torch_compile is before


def test_the_engine_still_names_what_is_replaced():
    """The branch for few tokens looks the function up in the module, each time."""
    from sglang.srt.layers.moe.fused_moe_triton import fused_moe

    function = fused_moe.fused_experts_impl
    assert {"moe_sum_reduce_torch_compile", "moe_sum_reduce"} <= set(function.__code__.co_names)
    assert "sglang.srt.layers.moe.fused_moe_triton.fused_moe" in dict(expert_sum.ADJUSTMENTS)
