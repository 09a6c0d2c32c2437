"""When a layer takes the router's kernels, by which plan, and what they compute when interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers import minimax_router as router

from sglang_minimax.cpu_host import has_no_accelerator

FITS = {"on_cuda": True, "activations": torch.bfloat16, "weights": torch.float32, "deterministic": False}


@pytest.mark.skipif(not has_no_accelerator(), reason="the op is registered for the GPU here: test/gpu/test_router.py")
def test_the_kernels_in_tritons_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    cases = Path(__file__).with_name("router_interpreted.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(cases)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


def test_every_count_up_to_the_limit_has_the_first_plan_that_is_large_enough():
    limits = [min(limit for limit in router.PLANS if limit >= tokens) for tokens in range(1, router.MAX_TOKENS + 1)]
    assert [router.plan_for(tokens) for tokens in range(1, 257)] == [router.PLANS[limit] for limit in limits]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"on_cuda": False}, "NVIDIA"),
        ({"activations": torch.float16}, "float16"),
        ({"weights": torch.bfloat16}, "weights are torch.bfloat16"),
        ({"deterministic": True}, "batch size"),
    ],
)
def test_a_layer_takes_the_kernels_where_they_were_measured(monkeypatch, changed, reason):
    case = FITS | changed
    monkeypatch.setattr(router, "is_cuda", lambda: case["on_cuda"])
    monkeypatch.setattr(torch, "get_default_dtype", lambda: case["activations"])
    arguments = SimpleNamespace(enable_deterministic_inference=case["deterministic"])
    monkeypatch.setattr(router, "get_global_server_args", lambda: arguments)
    said = []
    monkeypatch.setattr(router, "log_info_on_rank0", lambda logger, text: said.append(text))
    router._log_once.cache_clear()
    gate = SimpleNamespace(weight=torch.empty(1, dtype=case["weights"]))
    chosen = {router.choose_router_logits(gate) for _ in range(3)}
    router._log_once.cache_clear()
    assert chosen == {router.fused_router_logits if reason is None else router.linear_router_logits}
    assert len(said) == 1 and (reason or "two kernels up to 256 tokens") in said[0]
