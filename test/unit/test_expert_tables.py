"""Tuned expert GEMMs: which table the engine finds, through the engine's own choice of a configuration."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from sglang.srt.layers.moe.fused_moe_triton import fused_moe_triton_config as engine

from sglang_minimax import expert_tables

SHIPPED = sorted(Path(expert_tables.folder(), *expert_tables.FOLDER).glob("*/*.json"))
TUNED = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1}
MINE = {**TUNED, "BLOCK_SIZE_N": 32}
BLOCKS = {"block_shape": [128, 128], "return_down_config": True}


@pytest.fixture
def server(monkeypatch):
    """A server's arguments, no table read before, an H200, Triton 3.6.0."""
    arguments = SimpleNamespace(enable_deterministic_inference=False)
    monkeypatch.setattr(engine, "get_global_server_args", lambda: arguments)
    monkeypatch.setattr(engine, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(engine, "triton", SimpleNamespace(__version__="3.6.0"))
    monkeypatch.delenv("SGLANG_MOE_CONFIG_DIR", raising=False)
    for cached in (expert_tables.read_table, engine.get_moe_configs):
        cached.cache_clear()
    yield arguments
    for cached in (expert_tables.read_table, engine.get_moe_configs):
        cached.cache_clear()


@pytest.fixture
def tables(server, monkeypatch, tmp_path):
    """An overlay's folder into which tables are written, by Triton version and file name."""
    monkeypatch.setattr(expert_tables, "folder", lambda: str(tmp_path))

    def write(version: str, name: str, table: dict) -> None:
        path = tmp_path.joinpath(*expert_tables.FOLDER, version, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(table))

    return write


def name(experts: int, width: int, down: str = "") -> str:
    return f"E={experts},N={width},device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128, 128]{down}.json"


def choose(experts: int, width: int, tokens: int, hidden_size: int = 3072):
    """(configuration of gate_up, that of down or None), as the engine's fused experts ask for it."""
    gate_up, down = (experts, 2 * width, hidden_size), (experts, hidden_size, width)
    config, (down_config, _) = engine.try_get_optimal_moe_config(gate_up, down, 8, "fp8_w8a8", tokens, **BLOCKS)
    return config, down_config


def test_the_nearest_token_count_of_our_table(tables):
    tables("triton_3_6_0", name(256, 384), {"1": TUNED, "16": MINE})
    assert choose(256, 384, 2)[0] == TUNED
    assert choose(256, 384, 4096) == (MINE, None)


def test_down_has_a_table_of_its_own(tables):
    tables("triton_3_6_0", name(256, 384), {"1": TUNED})
    tables("triton_3_6_0", name(256, 384, "_down"), {"1": MINE})
    assert choose(256, 384, 1) == (TUNED, MINE)


@pytest.mark.parametrize("version", ["3.5.1", "3.7.0"])
def test_another_triton_takes_the_newest_table_there_is(tables, server, monkeypatch, version):
    monkeypatch.setattr(engine, "triton", SimpleNamespace(__version__=version))
    tables("triton_3_10_0", name(256, 384), {"1": TUNED})
    tables("triton_3_6_0", name(256, 384), {"1": MINE})
    assert choose(256, 384, 1)[0] == TUNED
    tables(f"triton_{version.replace('.', '_')}", name(256, 384), {"1": MINE})
    expert_tables.read_table.cache_clear()
    assert choose(256, 384, 1)[0] == MINE


def test_another_hidden_size_finds_the_engines_table(tables):
    ours = {"BLOCK_SIZE_M": 999}
    tables("triton_3_6_0", name(128, 768), {"1": ours})
    assert choose(128, 768, 1)[0] == ours
    theirs = choose(128, 768, 1, hidden_size=4096)[0]
    assert theirs["BLOCK_SIZE_M"] in (16, 32, 64, 128)
    assert theirs != engine.get_default_config(1, 128, 768, 4096, 8, "fp8_w8a8", False, [128, 128])


def test_a_shape_without_a_table_takes_the_engines_default(tables):
    default = engine.get_default_config(1, 7, 384, 3072, 8, "fp8_w8a8", False, [128, 128])
    assert choose(7, 384, 1) == (default, None)


def test_a_persons_own_folder_comes_first(tables, monkeypatch, tmp_path):
    tables("triton_3_6_0", name(256, 384), {"1": TUNED})
    own = tmp_path / "own" / "configs" / "triton_3_6_0" / name(256, 384)
    own.parent.mkdir(parents=True)
    own.write_text(json.dumps({"1": MINE}))
    monkeypatch.setenv("SGLANG_MOE_CONFIG_DIR", str(tmp_path / "own"))
    assert choose(256, 384, 1)[0] == MINE


def test_deterministic_inference_takes_no_table(tables, server):
    tables("triton_3_6_0", name(256, 384), {"1": TUNED})
    server.enable_deterministic_inference = True
    default = engine.get_default_config(1, 256, 384, 3072, 8, "fp8_w8a8", False, [128, 128])
    assert choose(256, 384, 1) == (default, None)


@pytest.mark.parametrize("version", ["3.5.1", "3.6.0"])
def test_the_table_of_tp4_is_found_by_every_triton_that_the_engine_runs_with(server, monkeypatch, version):
    monkeypatch.setattr(engine, "triton", SimpleNamespace(__version__=version))
    config, down = choose(256, 384, 16)
    assert config != engine.get_default_config(16, 256, 384, 3072, 8, "fp8_w8a8", False, [128, 128])
    assert (config["BLOCK_SIZE_M"], config["BLOCK_SIZE_N"]) == (16, 64)
    assert (down["BLOCK_SIZE_M"], down["BLOCK_SIZE_N"]) == (16, 128)


def test_other_models_find_what_they_found_before(server, monkeypatch):
    names = sorted(Path(engine.__file__).with_name("configs").glob("*/*device_name=NVIDIA_H200,dtype=fp8_w8a8,*.json"))
    shapes = {tuple(map(int, re.match(r"E=(\d+),N=(\d+)", path.name).groups())) for path in names} | {(256, 384)}
    assert len(shapes) > 3

    def found():
        engine.get_moe_configs.cache_clear()
        return {(shape, tokens): choose(*shape, tokens, hidden_size=4096) for shape in shapes for tokens in (1, 64)}

    ours = found()
    with monkeypatch.context() as without_tables:
        without_tables.setattr(expert_tables, "read_table", lambda *_: None)
        assert ours == found()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_table_is_one_that_the_engine_can_run(path):
    table = json.loads(path.read_text())
    assert {"16", "64", "128", "256", "512", "1024", "4096"} <= table.keys()  # fewer than 16 tokens take the nearest
    other = path.with_name(path.name.replace("_down", "") if "_down" in path.name else path.stem + "_down.json")
    for tokens, config in table.items():
        assert config["BLOCK_SIZE_M"] == json.loads(other.read_text())[tokens]["BLOCK_SIZE_M"]
        assert 128 % config["BLOCK_SIZE_K"] == 0, "a block of K must lie within a block of scales"
        assert all(value > 0 for value in config.values())


def test_the_shipped_tables_are_in_the_checkout():
    shapes = {tuple(map(int, re.match(r"E=(\d+),N=(\d+),", path.name).groups())) for path in SHIPPED}
    assert shapes >= {(256, 384), (256, 768), (128, 384), (64, 384), (32, 1536), (64, 1536)}
    assert len(SHIPPED) == 2 * len(shapes)
