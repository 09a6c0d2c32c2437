"""Decode attention on CPU ranks, with the engine's own Triton backend, in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
from unit.interpreted import assert_passes_interpreted

from sglang_minimax.cpu_host import has_no_accelerator


@pytest.mark.skipif(not has_no_accelerator(), reason="the kernel runs here: test/layouts/matrix.py --device cuda")
def test_layouts_in_tritons_interpreter():
    assert_passes_interpreted(str(Path(__file__).with_name("decode_attention_interpreted.py")))
