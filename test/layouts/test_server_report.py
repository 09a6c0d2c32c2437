"""What a server says of itself, against what its ranks hold and what their forward passes did; stand-ins for GPUs."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from layouts import simulations, spies
from layouts.harness import run_layout

from sglang_minimax import server_report
from sglang_minimax.checkpoints import SmallModel, write_checkpoint
from sglang_minimax.cpu_host import has_no_accelerator
from sglang_minimax.plan import paths as planned
from sglang_minimax.plan.hardware import GPUS
from sglang_minimax.plan.layout import Flags, settle
from sglang_minimax.plan.shape import read_model
from sglang_minimax.server_process import SessionProcess

pytestmark = pytest.mark.skipif(not has_no_accelerator(), reason="this host has an accelerator: see test/gpu")

SMALL = SmallModel(num_hidden_layers=3, num_key_value_heads=2, num_local_experts=8, vocab_size=512)
A2A = {"moe_a2a_backend": "customized"}

WHO = {
    "MODEL": "the model's all-reduce over",
    "NEXT_NORM": "in the next layer's norm",
    "REDUCE_SCATTER": "reduce-scatter",
    "DISPATCHER": "the dispatcher's",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), SMALL)


def said_and_done(runner):
    """A probe: the paths and ranks that the server would name, what this rank's modules hold, and its passes."""
    passes = spies.watch_passes(runner)
    info = server_report.server_info(runner)
    layer = runner.model.model.layers[runner.model.start_layer]
    attention, experts = layer.self_attn, layer.block_sparse_moe.experts
    held = {
        "q_heads": attention.attn.tp_q_head_num,
        "kv_heads": attention.attn.tp_k_head_num,
        "experts": experts.num_local_experts,
        "expert_columns": experts.intermediate_size_per_partition,
    }
    return lambda: (info, server_report.log_block(runner), held, passes())


APART = "; RoPE and KV store in launches of their own"


@pytest.mark.parametrize(
    ("layout", "simulation", "arguments", "expected"),
    [
        ({"tp": 1}, None, {}, {"sum over experts": "none", "QK norm": f"on each rank alone{APART}"}),
        ({"tp": 4}, None, {}, {"QK norm": f"one all-reduce over 4 ranks{APART}", "fused all-reduce + norm": "off"}),
        ({"tp": 4, "ep": 2, "dp": 2}, None, {}, {"EP": "2", "sum over experts": "reduce-scatter"}),
        ({"tp": 2, "pp": 2}, None, {}, {"sum over experts": "the model's all-reduce over 2 ranks"}),
        ({"tp": 2}, simulations.fused_all_reduce, {}, {"fused all-reduce + norm": "on, up to 2048 tokens"}),
        ({"tp": 2}, simulations.all_reduce_norm, {}, {"fused all-reduce + norm": "on, one launch up to 8 tokens"}),
        ({"tp": 2, "ep": 2, "dp": 2}, simulations.fp4_all_gather, {}, {"FP4 all-gather": "on"}),
        ({"tp": 2, "ep": 2}, simulations.token_exchange, A2A, {"a2a backend": "customized", "EP": "2"}),
    ],
    ids=["tp1", "tp4", "dp2", "pp2", "next_norm", "one_launch", "fp4", "a2a"],
)
def test_what_is_said_is_what_the_ranks_hold_and_do(checkpoint, monkeypatch, layout, simulation, arguments, expected):
    if simulation is not None:
        simulation(monkeypatch)
    prompts = [[[300 + i, 301, 302]] for i in range(layout.get("dp", 1))]
    result = run_layout(
        checkpoint, prompts_by_dp_rank=prompts, steps=3, server_arguments=arguments, probe=said_and_done, **layout
    )
    for rank, (info, block, held, passes) in enumerate(result.probed):
        paths = info["paths"]
        assert {name: paths[name]["taken"] for name in expected} == expected
        ends = info["ranks"][rank % layout["tp"]]
        assert {name: ends[name][1] - ends[name][0] + 1 for name in held} == held, f"rank {rank}"
        assert len(info["ranks"]) == layout["tp"]
        for name, path in paths.items():
            assert f"{name}: {path['taken']} ({path['why']})" in block
        if layout["tp"] > 1:
            check_who_sums(paths["sum over experts"], passes, layout)


def check_who_sums(path: dict, passes: list[dict], layout: dict) -> None:
    """Every reduction that a pass asked for is named, and that of padded or ordinary batches is the one taken."""
    assert passes
    for done in passes:
        first, *_ = sorted(done["who"])
        asked = {WHO[who] for who in done["who"].values()}
        assert all(words in f"{path['taken']} {path['why']}" for words in asked), (path, done)
        if done["padding"] in (None, "MAX_LEN") and layout.get("pp", 1) == 1:
            assert path["taken"].startswith(WHO[done["who"][first]]), (path, done)


@pytest.mark.parametrize(
    ("stores", "reason", "taken"),
    [
        (True, None, "one kernel with RoPE and KV store, over 4 ranks"),
        (False, None, "one kernel with RoPE, over 4 ranks"),
        (True, "out of reach", "one all-reduce over 4 ranks, and one kernel with RoPE and KV store"),
    ],
)
def test_one_kernel_for_qk_norm_is_named(stores, reason, taken):
    norm = SimpleNamespace(shards=SimpleNamespace(num_ranks=4))
    fused = SimpleNamespace(stores=stores, operator=SimpleNamespace(reason_against_exchange=reason))
    path = server_report.qk_norm_path(SimpleNamespace(q_norm=norm, fused_inputs=fused, node=None))
    assert path.taken == taken
    assert path.why == (reason or "NVLink peers swap two float32 sums of squares a token in it")


def test_a_model_without_qk_norm_says_so():
    assert server_report.qk_norm_path(SimpleNamespace(q_norm=None)).taken == "none"


def test_a_running_server_under_dp_attention_takes_the_paths_that_were_planned(checkpoint):
    """On a CPU this layout has no choice that hangs on the hardware, but for the attention backend."""
    model = read_model(str(checkpoint))
    layout = settle(Flags(tp=2, dp=2, enable_dp_attention=True), model, GPUS["h200"])
    result = run_layout(checkpoint, tp=2, dp=2, prompts_by_dp_rank=[[[300]], []], steps=1, probe=said_and_done)
    took = {name: path["taken"] for name, path in result.probed[0][0]["paths"].items()}
    plan = {path.name: path.taken for path in planned.paths(model, layout, GPUS["h200"])}
    assert plan.keys() <= took.keys()
    del plan["attention backend"]
    assert {name: took[name] for name in plan} == plan


OTHER_MODEL = """
import json, sys
import sglang
if __name__ == "__main__":
    engine = sglang.Engine(model_path=sys.argv[1], device="cpu", skip_tokenizer_init=True, log_level="info")
    sampling = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    answer = engine.generate(input_ids=[1, 2, 3], sampling_params=sampling)
    print("INFO", json.dumps({"answer": answer, "info": engine.get_server_info()}, default=str), flush=True)
    engine.shutdown()
"""


def test_another_model_is_served_and_described_as_by_stock(tmp_path):
    """A real engine without HTTP: no entry, no block, no line of ours about its load."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=512, max_position_embeddings=512)).save_pretrained(tmp_path)
    script = tmp_path / "serve.py"
    script.write_text(OTHER_MODEL)
    log = tmp_path / "engine.log"
    with SessionProcess([sys.executable, str(script), str(tmp_path)], log) as engine:
        assert engine.wait(240) == 0, log.read_text()
    text = log.read_text()
    (said,) = [json.loads(line.split("INFO ", 1)[1]) for line in text.splitlines() if line.startswith("INFO {")]
    assert len(said["answer"]["output_ids"]) == 4
    assert said["info"]["version"] and len(said["info"]["internal_states"]) == 1
    assert server_report.KEY not in said["info"] and server_report.KEY not in said["info"]["internal_states"][0]
    assert server_report.BLOCK_BEGINS not in text and "Loaded weights: " not in text
