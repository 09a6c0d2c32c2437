"""Checkpoints that are damaged as files or in their values, on real ranks: each ends the load with an error that says
where. What does not fit in name, shape, dtype or number is in test/layouts/test_weights.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from layouts.harness import LayoutFailed, run_layout
from safetensors.torch import load_file, save_file

from sglang_minimax.checkpoints import SmallModel, write_checkpoint

SMALL = SmallModel(num_hidden_layers=2, num_local_experts=8, vocab_size=512)
LAYER = "model.layers.1."


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return write_checkpoint(tmp_path, SMALL)


@pytest.fixture
def sharded(checkpoint) -> Path:
    """The same checkpoint in two files, one a layer, with the index that names them."""
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + name.startswith(LAYER)}-of-00002.safetensors" for name in tensors}
    for file in set(files.values()):
        part = {name: tensor for name, tensor in tensors.items() if files[name] == file}
        save_file(part, checkpoint / file, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    return checkpoint


def load(checkpoint: Path, tp: int = 1) -> None:
    run_layout(checkpoint, tp=tp, prompts_by_dp_rank=[[[1, 2]]], steps=1, timeout_s=60)


def failure(checkpoint: Path, tp: int = 1) -> str:
    with pytest.raises(LayoutFailed) as error:
        load(checkpoint, tp)
    return str(error.value)


def set_values(checkpoint: Path, name: str, positions, value: float) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[name][positions] = value
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def test_a_checkpoint_in_two_files_loads(sharded):
    load(sharded)


def test_a_missing_file_of_the_index(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    message = failure(sharded, tp=2)
    assert "model-00002-of-00002.safetensors does not exist, and model.safetensors.index.json names it for " in message
    assert "parameters of the model stay unfilled" in message


def test_a_file_that_is_cut_off_in_its_tensors(sharded):
    path = sharded / "model-00002-of-00002.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    message = failure(sharded)
    assert f"{path.name} has {len(whole) - 1} bytes where its header describes {len(whole)}" in message


@pytest.mark.parametrize("kept", [0, 4, 100])
def test_a_file_that_is_cut_off_in_its_header(sharded, kept):
    path = sharded / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert f"{path.name} is cut off in its header: it has {kept} bytes" in failure(sharded)


@pytest.mark.parametrize(
    "name",
    [
        LAYER + "self_attn.q_norm.weight",
        LAYER + "self_attn.k_norm.weight",
        LAYER + "input_layernorm.weight",
        LAYER + "block_sparse_moe.e_score_correction_bias",
        "model.norm.weight",
    ],
)
def test_nan_is_named(checkpoint, name):
    set_values(checkpoint, name, [3, 5], float("nan"))
    message = failure(checkpoint)
    size = load_file(checkpoint / "model.safetensors")[name].numel()
    assert "1 tensors hold values that are not finite" in message
    assert f"{name} ({size},): 2 of {size}, the first nan at index 3" in message


def test_infinity_on_one_rank_only_is_named_by_all(checkpoint):
    """The rank whose heads are fine must fail too, or it waits for the others for ever."""
    last = SMALL.num_attention_heads * SMALL.head_dim - 1
    set_values(checkpoint, LAYER + "self_attn.q_norm.weight", [last], float("-inf"))
    message = failure(checkpoint, tp=4)
    assert f"self_attn.q_norm.weight ({last + 1},): 1 of {last + 1}, the first -inf at index {last}" in message
