"""Where a running server speaks, and where it must not: other models, other ranks, the engine's own fields."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.minimax_prefill_graphs import PrefillGraphs
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.models.minimax_m2 import MiniMaxM2ForCausalLM

from sglang_minimax import server_report
from sglang_minimax.checkpoints import SmallModel
from sglang_minimax.plan.report import divided
from sglang_minimax.sharding import ExpertShape, shard_attention

OURS = {"version": "0.1.0", "paths": {}}


class EngineScheduler:
    """As the engine's scheduler, once it was built: what is asked of it here."""

    state: dict = {"attention_backend": "fa3"}  # noqa: RUF012 (the engine too answers with an object of its own)

    model = object.__new__(MiniMaxM2ForCausalLM)

    def __init__(self, architecture: str | None, tp_rank: int = 0, pp_rank: int = 0, dp_rank: int | None = None):
        architectures = None if architecture is None else [architecture]
        self.model_config = SimpleNamespace(hf_config=SimpleNamespace(architectures=architectures))
        self.tp_rank, self.pp_rank, self.dp_rank = tp_rank, pp_rank, dp_rank
        self.tp_worker = SimpleNamespace(model_runner=SimpleNamespace(model=self.model, name="the runner"))

    def get_init_info(self):
        return {"status": "ready"}

    def get_internal_state(self, request):
        return SimpleNamespace(internal_state=self.state)


@pytest.fixture
def scheduler(monkeypatch):
    """The class as the adjustment leaves it; what it would read from a real model is put in its place."""
    monkeypatch.setattr(server_report, "log_block", lambda runner: f"block of {runner.name}")
    monkeypatch.setattr(server_report, "server_info", lambda runner: OURS)
    module = SimpleNamespace(Scheduler=type("Scheduler", (EngineScheduler,), dict(vars(EngineScheduler))))
    server_report.speak_for_scheduler(module)
    return module.Scheduler


@pytest.mark.parametrize(
    ("ranks", "blocks"),
    [
        ({}, 1),
        ({"dp_rank": 0}, 1),
        ({"tp_rank": 1}, 0),
        ({"pp_rank": 1}, 0),
        ({"dp_rank": 1}, 0),
        ({"tp_rank": 2, "dp_rank": 1}, 0),
    ],
)
def test_only_the_first_rank_writes_the_block(scheduler, caplog, ranks, blocks):
    with caplog.at_level(logging.INFO):
        assert scheduler("MiniMaxM2ForCausalLM", **ranks).get_init_info() == {"status": "ready"}
    assert [record.getMessage() for record in caplog.records] == ["block of the runner"] * blocks


def test_every_scheduler_answers_with_our_entry_and_the_engines_own_object_stays_as_it_is(scheduler):
    answer = scheduler("MiniMaxM2ForCausalLM", tp_rank=2, dp_rank=1).get_internal_state(None)
    assert answer.internal_state == {"attention_backend": "fa3", "sglang_minimax": OURS}
    assert EngineScheduler.state == {"attention_backend": "fa3"}


@pytest.mark.parametrize(
    ("architecture", "model"),
    [
        ("LlamaForCausalLM", None),
        ("MiniMaxText01ForCausalLM", None),
        (None, None),
        ("MiniMaxM2ForCausalLM", "a user's"),
    ],
)
def test_for_other_models_nothing_is_said(scheduler, caplog, architecture, model):
    scheduler.model = model
    with caplog.at_level(logging.INFO):
        other = scheduler(architecture)
        assert other.get_init_info() == {"status": "ready"}
    assert not caplog.records
    answer = other.get_internal_state(None)
    assert answer.internal_state is EngineScheduler.state
    info = {"version": "0.5.10.post1", "internal_states": [answer.internal_state]}
    assert server_report.lifted(info) == info


def test_the_first_answer_is_on_top_and_the_engines_fields_stay():
    states = [{"a": 1}, {"sglang_minimax": OURS}, {"sglang_minimax": {"version": "another"}}]
    info = server_report.lifted({"version": "0.5.10.post1", "internal_states": states})
    assert info == {"version": "0.5.10.post1", "internal_states": states, "sglang_minimax": OURS}


def test_the_engines_two_addresses_give_it_and_are_there_once():
    """On the application that the engine itself serves, adjusted when this process imported it."""
    from sglang.srt.entrypoints import http_server

    state = SimpleNamespace(
        tokenizer_manager=SimpleNamespace(get_internal_state=None, server_args=Arguments()), scheduler_info={}
    )

    async def internal_states():
        return [{"sglang_minimax": OURS}]

    state.tokenizer_manager.get_internal_state = internal_states
    routes = {}
    for route in http_server.app.routes:
        routes.setdefault(getattr(route, "path", None), []).append(route)
    before = http_server._global_state
    try:
        http_server._global_state = state
        for path in ("/server_info", "/get_server_info"):
            (route,) = routes[path]
            assert route.methods == {"GET"}
            info = asyncio.run(route.endpoint())
            assert info["sglang_minimax"] == OURS
            assert info["version"] and info["tp_size"] == 3
    finally:
        http_server._global_state = before


@dataclass
class Arguments:
    """Stands for the engine's ServerArgs, of which the answer takes every field."""

    tp_size: int = 3


def test_a_program_without_http_gets_it_too():
    class Engine:
        def get_server_info(self):
            return {"internal_states": [{"sglang_minimax": OURS}]}

    module = SimpleNamespace(Engine=Engine)
    server_report.speak_for_engine(module)
    assert module.Engine().get_server_info()["sglang_minimax"] == OURS


# --- Ranks ---------------------------------------------------------------------------------------------------


def layout(**changes) -> server_report.Division:
    """The published model at TP16 EP4, or what ``changes`` make of it."""
    fields = {
        "tp_size": 16, "pp_size": 1, "ep_size": 4, "dp_size": 1, "enable_dp_attention": False,
        "attn_cp_size": 1, "moe_dp_size": 1, "ep_num_redundant_experts": 0,
    }  # fmt: skip
    shape = SmallModel(
        num_hidden_layers=62, num_attention_heads=48, num_key_value_heads=8, num_local_experts=256,
        intermediate_size=1536,
    )  # fmt: skip
    return server_report.division(SimpleNamespace(config=shape), SimpleNamespace(**(fields | changes)))


def test_the_words_of_tp16():
    words = server_report.in_words(layout())
    assert words[:3] == [
        "ranks: TP 16, PP 1; attention over 16 ranks for all requests",
        "heads a rank: 3 of 48 q heads, 1 of 8 KV heads; each KV head is on 2 ranks",
        "experts a rank: 64 of 256, 384 of the 1536 columns of each",
    ]
    assert sum(line.count("x2") for line in words) == 8  # a bracket for each KV head


def test_the_words_of_dp_attention_over_two_stages():
    words = server_report.in_words(layout(tp_size=8, dp_size=2, enable_dp_attention=True, pp_size=2))
    assert words[0] == "ranks: TP 8, PP 2; attention over 4 ranks in each of 2 groups of requests"
    assert words[1] == "heads a rank: 12 of 48 q heads, 2 of 8 KV heads; no KV head is replicated"
    assert words[3] == "layers: stage 0 has 0-30, stage 1 has 31-61"


def test_the_words_of_copies_of_the_server_and_of_context_parallelism():
    """--dp without DP attention divides nothing, and context parallelism divides attention alone."""
    assert "attention over 8 ranks for all requests" in server_report.in_words(layout(tp_size=8, dp_size=2))[0]
    own = layout(tp_size=8, ep_size=2, attn_cp_size=2, moe_dp_size=2, ep_num_redundant_experts=4)
    words = server_report.in_words(own)
    assert "attention over 4 ranks" in words[0] and "12 of 48 q heads" in words[1]
    assert words[2] == "experts a rank: 130 of 260, 768 of the 1536 columns of each"
    assert [rank.q_heads for rank in own.ranks] == [(0, 11), (12, 23), (24, 35), (36, 47)] * 2
    assert [rank.experts for rank in own.ranks] == [(0, 129), (0, 129), (130, 259), (130, 259)] * 2
    both = layout(tp_size=8, dp_size=2, enable_dp_attention=True, attn_cp_size=2)
    assert [rank.dp_rank for rank in both.ranks] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_the_block_counts_the_ranks_of_all_stages(monkeypatch):
    for name in ("division", "in_words", "chosen_paths"):
        monkeypatch.setattr(server_report, name, lambda *_: [])
    runner = SimpleNamespace(model=None, server_args=SimpleNamespace(tp_size=4, pp_size=2))
    assert server_report.log_block(runner).startswith("MiniMaxM2ForCausalLM on 8 ranks, by sglang-minimax ")


def test_copies_of_the_experts_and_context_parallelism_divide_tp_as_the_engine_does():
    """TP 8 as two copies of the experts, EP 2 in each; and as DP 2, context parallelism 2, attention TP 2."""
    ranks = divided(shard_attention(48, 8, 2), ExpertShape(256, 1536), 8, 2, attn_cp_size=2, moe_dp_size=2)
    assert [rank.experts for rank in ranks] == [(0, 127), (0, 127), (128, 255), (128, 255)] * 2
    assert [rank.expert_columns for rank in ranks] == [(0, 767), (768, 1535)] * 4
    assert [rank.q_heads for rank in ranks] == [(0, 23), (24, 47)] * 4
    assert [rank.dp_rank for rank in ranks] == [0, 0, 0, 0, 1, 1, 1, 1]


# ------------------------------------------------------------------------------------------------ short prefills


def prefill_graphs(*sizes: int) -> PrefillGraphs:
    graphs = PrefillGraphs(SimpleNamespace(layers_to_capture=[]))
    graphs.graphs = dict.fromkeys(sizes)
    return graphs


def test_short_prefills_are_said_to_be_graphs_up_to_the_largest_that_was_captured():
    assert "one graph up to 512 tokens" in server_report.short_prefills(prefill_graphs(128, 512), None).taken


def test_without_any_graph_it_says_why():
    chosen_against = server_report.short_prefills(None, "prefills have no graphs here")
    assert (chosen_against.taken, chosen_against.why) == ("as longer ones", "prefills have no graphs here")
    graphs = prefill_graphs()
    assert "no pieces of up to 1024 tokens" in server_report.short_prefills(graphs, None).why
    pool = SimpleNamespace(dtype=torch.float8_e4m3fn)
    batch = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND, spec_info=None, token_to_kv_pool=pool, batch_size=1, extend_seq_lens=[4]
    )
    graphs._capture(torch.arange(4), torch.arange(4), batch)
    assert not graphs.graphs
    why = server_report.short_prefills(graphs, None).why
    assert "of torch.float8_e4m3fn, and activations are torch.float32" in why
