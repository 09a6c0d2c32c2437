"""Checkpoints that do not fit, on real ranks: each fault is an error that names tensor, both shapes and rank."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from layouts import simulations
from layouts.harness import LayoutFailed, run_layout
from layouts.rows import IN_FP8, SHAPES
from safetensors.torch import load_file, save_file
from sglang.srt.models import minimax_m2_files

from sglang_minimax.checkpoints import SmallModel, write_checkpoint, write_fp8_blocks
from sglang_minimax.reference import Reference

SMALL = SmallModel(num_hidden_layers=2, num_local_experts=8, vocab_size=512)
LAYER = "model.layers.1."
EXPERTS = LAYER + "block_sparse_moe.experts."
PROMPTS = [[300, 301, 302], [7]]


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return write_checkpoint(tmp_path, SMALL)


def change(checkpoint: Path, edit) -> None:
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def failure(checkpoint: Path, tp: int = 1, **options) -> str:
    with pytest.raises(LayoutFailed) as error:
        run_layout(checkpoint, tp=tp, prompts_by_dp_rank=[PROMPTS], steps=1, **options)
    return str(error.value)


def test_every_fault_is_named_at_once_with_shapes_and_rank(checkpoint):
    def edit(tensors):
        q_norm = tensors[LAYER + "self_attn.q_norm.weight"]
        tensors[LAYER + "self_attn.q_norm.weight"] = q_norm[:-1].clone()
        q_proj = tensors[LAYER + "self_attn.q_proj.weight"]
        tensors[LAYER + "self_attn.q_proj.weight"] = torch.cat([q_proj, q_proj[:64]])
        tensors[EXPERTS + "3.w1.weight"] = tensors[EXPERTS + "3.w1.weight"][:, :-1].clone()
        tensors[EXPERTS + "2.w2.weight"] = tensors[EXPERTS + "2.w2.weight"].to(torch.int8)
        del tensors[EXPERTS + "5.w3.weight"], tensors["model.norm.weight"]
        tensors["model.layers.1.self_attn.z_proj.weight"] = torch.ones(2, 3)
        tensors["model.layers.2.input_layernorm.weight"] = torch.ones(256)
        tensors[EXPERTS + "8.w1.weight"] = torch.ones(256, 256)

    change(checkpoint, edit)
    message = failure(checkpoint, tp=2)
    assert re.search(r"does not fit the model \(TP rank [01], PP rank 0\)", message)
    assert re.search(r"3 tensors belong to no parameter", message)
    for unknown in ("self_attn.z_proj.weight (2, 3)", "model.layers.2.input_layernorm.weight (256,)", "8.w1.weight"):
        assert unknown in message, unknown
    assert "4 tensors do not fit" in message
    assert f"{LAYER}self_attn.q_norm.weight (1023,)" in message
    assert "a norm over 16 heads of 64 needs a weight of shape (1024,)" in message
    assert f"{LAYER}self_attn.q_proj.weight has shape (1088, 256) where (1024, 256) belongs" in message
    assert f"{EXPERTS}3.w1.weight has shape (256, 255) where (256, 256) belongs" in message
    assert f"{EXPERTS}2.w2.weight has dtype torch.int8 where torch.float32 belongs" in message
    assert "2 parameters of the model stay unfilled" in message
    assert "model.norm.weight (256,)" in message
    assert "without w3 of expert 5" in message


def test_of_many_faults_the_first_are_named_and_the_rest_counted(checkpoint):
    change(checkpoint, lambda tensors: tensors.update({f"extra.{i}": torch.ones(1) for i in range(11)}))
    message = failure(checkpoint)
    assert "11 tensors belong to no parameter" in message and "and 3 more" in message


def test_as_many_faults_as_are_named_leave_none_to_count(checkpoint):
    change(checkpoint, lambda tensors: tensors.update({f"extra.{i}": torch.ones(1) for i in range(8)}))
    message = failure(checkpoint)
    assert "extra.7" in message and " more" not in message


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_one_missing_part_of_a_fused_projection_is_named(checkpoint, part):
    change(checkpoint, lambda tensors: tensors.pop(f"{LAYER}self_attn.{part}_proj.weight"))
    message = failure(checkpoint, pp=2)  # whose second stage has that layer
    assert "PP rank 1" in message and re.search(rf"qkv_proj\.weight \([\d, ]+\): without {part}\b", message)


@pytest.mark.parametrize("name", ["self_attn.o_proj", "block_sparse_moe.experts.2.w1"])
def test_fp8_weights_without_their_scales_are_refused(tmp_path, monkeypatch, name):
    """Scales are made by the engine only where it quantises by itself: these would stay as they were allocated."""
    simulations.fp8_in_plain_torch(monkeypatch)
    quantised, _ = write_fp8_blocks(write_checkpoint(tmp_path / "plain", SHAPES[IN_FP8]), tmp_path / "fp8", tmp_path)
    change(quantised, lambda tensors: tensors.pop(f"{LAYER}{name}.weight_scale_inv"))
    message = failure(quantised, tp=2)
    assert "1 parameters of the model stay unfilled" in message and "_scale_inv" in message


def test_a_tensor_that_comes_twice(checkpoint):
    name = LAYER + "self_attn.k_proj.weight"
    save_file({name: load_file(checkpoint / "model.safetensors")[name]}, checkpoint / "model-again.safetensors")
    assert re.search(rf"1 tensors come twice:\n\s+{re.escape(name)}", failure(checkpoint))


def test_a_head_that_comes_twice_beside_tied_embeddings(checkpoint):
    name, config = "lm_head.weight", json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    save_file({name: load_file(checkpoint / "model.safetensors")[name]}, checkpoint / "model-again.safetensors")
    assert re.search(rf"1 tensors come twice:\n\s+{re.escape(name)}", failure(checkpoint))


def test_a_missing_layer_is_named_whole(checkpoint):
    change(checkpoint, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(LAYER)])
    message = failure(checkpoint)
    assert "model.layers.1.self_attn.qkv_proj.weight" in message and "w13_weight" in message


def answers_as_the_reference(checkpoint: Path, tp: int, **options) -> None:
    answers_as(Reference(checkpoint), checkpoint, tp, **options)


def answers_as(reference: Reference, checkpoint: Path, tp: int, **options) -> None:
    expected = reference.greedy(PROMPTS, 4)
    result = run_layout(checkpoint, tp=tp, prompts_by_dp_rank=[PROMPTS], steps=4, **options)
    for tokens, logprobs, right in zip(result.tokens[0], result.logprobs[0], expected, strict=True):
        assert tokens == right.tokens
        chosen = [float(row[token]) for row, token in zip(logprobs, tokens, strict=True)]
        assert chosen == pytest.approx(right.logprobs, abs=1e-4)


def test_what_is_known_to_be_skipped_is_skipped(tmp_path):
    """Layers for multi-token prediction, KV-cache scales that nothing uses, the buffers of old checkpoints."""
    checkpoint = write_checkpoint(tmp_path, SmallModel(num_hidden_layers=2, vocab_size=512, num_mtp_modules=2))

    def edit(tensors):
        tensors[LAYER + "self_attn.rotary_emb.inv_freq"] = torch.ones(16)
        tensors[LAYER + "self_attn.k_proj.k_scale"] = torch.ones(1)
        tensors[LAYER + "self_attn.q_proj.bias"] = torch.ones(1024)

    assert any(name.startswith("model.layers.3.") for name in load_file(checkpoint / "model.safetensors"))
    change(checkpoint, edit)
    answers_as_the_reference(checkpoint, tp=2)


def test_fewer_layers_may_be_asked_for(checkpoint):
    """As people do to look at a large model; the reference reads the same from its config."""
    override = '{"num_hidden_layers": 1}'
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, **json.loads(override)}))
    expected = Reference(checkpoint)
    (checkpoint / "config.json").write_text(json.dumps(config))
    answers_as(expected, checkpoint, tp=2, server_arguments={"json_model_override_args": override})


@pytest.mark.parametrize("num_experts", [7, 11])
def test_other_numbers_of_experts_load_and_serve(tmp_path, num_experts):
    shape = SmallModel(num_hidden_layers=2, num_local_experts=num_experts, num_experts_per_tok=3, vocab_size=512)
    answers_as_the_reference(write_checkpoint(tmp_path, shape), tp=2)


def test_dummy_weights_load(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    result = run_layout(checkpoint, prompts_by_dp_rank=[PROMPTS], steps=1, server_arguments={"load_format": "dummy"})
    assert len(result.tokens[0]) == len(PROMPTS)


def update_with_a_part(runner):
    """A probe: loads one layer's norms again, as a weight update does, and an unknown name after that."""
    model = runner.model
    name = LAYER + "self_attn.q_norm.weight"
    filled = model.load_weights([(name, torch.full((16 * 64,), 2.0))])
    assert filled == {name} and bool((model.model.layers[1].self_attn.q_norm.weight == 2).all())
    try:
        model.load_weights(iter([("model.nothing", torch.ones(1))]))
    except ValueError as error:
        said = str(error)
    return lambda: said


def test_a_later_load_may_bring_a_part_but_no_unknown_name(checkpoint):
    result = run_layout(checkpoint, tp=2, prompts_by_dp_rank=[PROMPTS], steps=1, probe=update_with_a_part)
    for said in result.probed:
        assert "model.nothing (1,)" in said and "unfilled" not in said


def in_two_files(checkpoint: Path) -> Path:
    """Divides the checkpoint's file by layers, with an index; returns the second file, which has the last layer."""
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + name.startswith(LAYER)}-of-00002.safetensors" for name in tensors}
    for file in set(files.values()):
        own = {name: tensors[name] for name in tensors if files[name] == file}
        save_file(own, checkpoint / file, metadata={"format": "pt"})
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return checkpoint / "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("kept", "said"), [(0, "does not exist"), (-1, "bytes where its header describes"), (None, "")]
)
def test_an_update_from_a_folder_with_damaged_files_replaces_nothing(tmp_path, kept, said):
    served = write_checkpoint(tmp_path / "served", SMALL)
    new = write_checkpoint(tmp_path / "new", dataclasses.replace(SMALL, seed=7))
    file = in_two_files(new)
    if kept == 0:
        file.unlink()
    elif kept is not None:
        file.write_bytes(file.read_bytes()[:kept])

    def update(runner):
        weights = [layer.self_attn.q_norm.weight for layer in runner.model.model.layers]
        before = [weight.detach().clone() for weight in weights]
        succeeded, message = runner.update_weights_from_disk(str(new), "auto")
        replaced = [bool((weight != old).any()) for weight, old in zip(weights, before, strict=True)]
        return lambda: (succeeded, message, replaced)

    result = run_layout(served, tp=2, prompts_by_dp_rank=[PROMPTS], steps=1, probe=update)
    for succeeded, message, replaced in result.probed:
        assert succeeded == (not said) and replaced == [succeeded] * 2
        assert succeeded or (str(new) in message and f"{file.name} " in message and said in message)


def test_the_damaged_file_of_a_hub_name_is_named(tmp_path, monkeypatch):
    model = tmp_path / "models--someone--a-model"
    folder = model / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("a" * 40)
    write_checkpoint(folder, SMALL)
    file = in_two_files(folder)
    file.write_bytes(file.read_bytes()[:-1])
    assert minimax_m2_files.folder_of("someone/a-model", None, str(tmp_path)) == folder
    assert minimax_m2_files.folder_of("someone/another", None, str(tmp_path)) == Path("someone/another")
    [fault] = minimax_m2_files.damaged_files(folder)
    assert fault.startswith(file.name) and "bytes where its header describes" in fault
