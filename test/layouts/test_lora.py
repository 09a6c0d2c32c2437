"""LoRA adapters of attention on real ranks, loaded by the engine, against transformers with them merged; and those of
the experts that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from layouts.harness import LayoutFailed, run_layout
from safetensors.torch import load_file, save_file

from sglang_minimax.checkpoints import SmallModel, write_checkpoint
from sglang_minimax.reference import Reference

LAYERS = 2
PROMPTS = [[300, 301, 302], [7, 8, 9, 10, 11]]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK, ALPHA = 4, 8


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An adapter of attention's projections in ``folder``; returns ``tensors`` with it added."""
    generator = torch.Generator().manual_seed(0)
    adapter, merged = {}, dict(tensors)
    for layer in range(LAYERS):
        for projection in PROJECTIONS:
            name = f"model.layers.{layer}.self_attn.{projection}"
            outputs, inputs = tensors[f"{name}.weight"].shape
            down = torch.randn(RANK, inputs, generator=generator) * inputs**-0.5
            up = torch.randn(outputs, RANK, generator=generator) * 0.5
            adapter[f"base_model.model.{name}.lora_A.weight"] = down
            adapter[f"base_model.model.{name}.lora_B.weight"] = up
            merged[f"{name}.weight"] = tensors[f"{name}.weight"] + ALPHA / RANK * (up @ down)
    folder.mkdir()
    save_file(adapter, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": PROJECTIONS, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return merged


def ask_for_the_adapter(runner):
    """A probe: all requests ask for the one adapter that the server has."""
    from sglang.srt.managers.schedule_batch import Req

    [adapter] = runner.lora_manager.loras
    Req.lora_id = property(lambda request: adapter, lambda request, value: None)
    # The engine's LoRA backend in plain torch wants pinned memory, for which there must be a GPU.
    torch.Tensor.pin_memory = lambda tensor: tensor
    for name in ("zeros", "empty", "tensor"):
        make = getattr(torch, name)
        setattr(torch, name, lambda *args, make=make, pin_memory=False, **options: make(*args, **options))
    return lambda: None


@pytest.mark.parametrize(
    ("kv_heads", "tp", "nnodes"),
    [(8, 1, 1), (8, 4, 2), (2, 4, 1)],
    ids=["one rank", "two nodes", "each KV head on 2 ranks"],
)
def test_adapters_of_attention_have_their_part_in_the_answer(tmp_path, kv_heads, tp, nnodes):
    from sglang.srt.lora.lora_registry import LoRARef

    shape = SmallModel(num_hidden_layers=LAYERS, num_key_value_heads=kv_heads, num_local_experts=8, vocab_size=512)
    checkpoint, merged = (write_checkpoint(tmp_path / name, shape) for name in ("base", "merged"))
    tensors = write_adapter(tmp_path / "adapter", load_file(checkpoint / "model.safetensors"))
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    base, expected = (Reference(path).greedy(PROMPTS, 4) for path in (checkpoint, merged))
    assert [answer.tokens for answer in base] != [answer.tokens for answer in expected]
    result = run_layout(
        checkpoint, tp=tp, prompts_by_dp_rank=[PROMPTS], steps=4, probe=ask_for_the_adapter,
        server_arguments={
            "nnodes": nnodes, "enable_lora": True, "enable_lora_overlap_loading": False, "lora_backend": "torch_native",
            "lora_paths": [LoRARef(lora_name="attention", lora_path=str(tmp_path / "adapter"), pinned=False)],
        },
    )  # fmt: skip
    for tokens, logprobs, reference in zip(result.tokens[0], result.logprobs[0], expected, strict=True):
        assert tokens == reference.tokens
        chosen = [float(row[token]) for row, token in zip(logprobs, tokens, strict=True)]
        assert chosen == pytest.approx(reference.logprobs, abs=1e-4)


@pytest.mark.parametrize(
    ("targets", "tp", "ep", "message"),
    [
        (["gate_up_proj"], 1, 1, "experts need gate_up_proj and down_proj together"),
        (["down_proj", "q_proj"], 2, 1, "experts need gate_up_proj and down_proj together"),
        (["gate_up_proj", "down_proj"], 2, 2, "cut into --tp 2 parts, and 1 rank shares each expert"),
    ],
)
def test_adapters_of_experts_that_the_engine_would_leave_out_or_cut_wrongly_are_refused(
    tmp_path, targets, tp, ep, message
):
    shape = SmallModel(num_hidden_layers=1, num_key_value_heads=2, num_local_experts=4, vocab_size=512)
    arguments = {"enable_lora": True, "lora_backend": "torch_native", "lora_paths": [], "max_lora_rank": RANK}
    with pytest.raises(LayoutFailed, match=message):
        run_layout(
            write_checkpoint(tmp_path, shape), tp=tp, ep=ep, prompts_by_dp_rank=[[[1]]], steps=0,
            server_arguments={**arguments, "lora_target_modules": targets},
        )  # fmt: skip
