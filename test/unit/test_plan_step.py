"""The planner's model of a step, by hand and against what was measured, and its search for the best layout."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import statistics
from collections import Counter
from random import Random

import pytest
from unit.plans import B200, H200, M25

from sglang_minimax import cli
from sglang_minimax.plan import collectives, launches, memory, report, scaling, step
from sglang_minimax.plan.hardware import Gpu
from sglang_minimax.plan.layout import Flags, settle
from sglang_minimax.plan.shape import Quantisation, read_model

RECORDS = scaling.DOCUMENT.parents[1] / "benchmark" / "results"


# ------------------------------------------------------------------ search


def test_nvfp4_takes_ep_in_one_kernel_only_and_a_search_gives_it():
    model = read_model("m2.7", "modelopt_fp4")
    with pytest.raises(ValueError, match="or give --moe-runner-backend flashinfer_cutlass with --ep 4"):
        settle(Flags(tp=4, ep=2), model, B200)
    found = [each.layout for each in step.search(model, B200, 4, "throughput", Flags(quantization="modelopt_fp4"))]
    runners = {layout.flags.moe_runner_backend for layout in found if layout.ep > 1}
    assert runners == {"flashinfer_cutlass"} and all(layout.ep in (1, layout.tp) for layout in found)


def test_tokens_are_gathered_in_fp4_where_ep_equals_dp_alone():
    """4.5 of bfloat16's 16 bits in one of a layer's collectives, which grows with the tokens."""
    model, many = read_model("m2.7", "modelopt_fp4"), 4096
    flags = Flags(tp=4, dp=2, enable_dp_attention=True, moe_runner_backend="flashinfer_cutlass")
    flags = dataclasses.replace(flags, quantization="modelopt_fp4")
    alone, with_ep = (settle(dataclasses.replace(flags, ep=ep), model, B200) for ep in (1, 4))
    steps = [step.predict(model, layout, B200, many, 512).collectives_ms for layout in (alone, with_ep)]
    assert steps[0] == steps[1]
    fp4 = settle(dataclasses.replace(flags, dp=4, ep=4), model, B200)
    bf16 = settle(dataclasses.replace(flags, dp=4, ep=1), model, B200)
    less_ms = (step.predict(model, each, B200, many, 512).collectives_ms for each in (bf16, fp4))
    saved = 62 * (many * 3072 * 2) * (1 - 4.5 / 16) * 3 / 4 / (B200.link_gb_per_s * 1e9) * 1e3
    assert next(less_ms) - next(less_ms) == pytest.approx(saved)


@pytest.mark.parametrize("goal", ["throughput", "latency"])
def test_a_search_uses_all_gpus_and_ranks_by_its_goal(goal):
    found = step.search(M25, H200, 16, goal, Flags())
    assert len(found) > 10
    assert all(candidate.copies * candidate.layout.gpus == 16 for candidate in found)
    for better, worse in itertools.pairwise(found):
        if goal == "latency":
            apart = round(worse.step.ms, 3) - round(better.step.ms, 3)
        else:
            apart = round(better.tokens_per_s, 3) - round(worse.tokens_per_s, 3)
        room = better.copies * better.kv_tokens - worse.copies * worse.kv_tokens
        words, more_words = (candidate.layout.flags.words() for candidate in (better, worse))
        assert (apart, room, len(more_words) - len(words)) >= (0, 0, 0)
        if (apart, room, len(more_words)) == (0, 0, len(words)):
            assert words < more_words
    for candidate in found:
        assert report.make_report(M25, candidate.layout.flags, H200).broken_rule is None
        assert candidate.step.batch == 1 or goal == "throughput"


@pytest.mark.parametrize("gpus", [12, 16])
def test_a_search_has_every_layout_that_works_once_and_leaves_out_the_ep_that_would_be_taken_anyway(gpus):
    """All numbers are tried, on as few nodes as hold them; the EP that is taken anyway is the smallest."""
    expected = []
    for tp, pp, dp in itertools.product(range(1, gpus + 1), (1, 2, 4, 8), range(1, gpus + 1)):
        if gpus % (tp * pp):
            continue
        flags = Flags(tp=tp, pp=pp, dp=dp, nnodes=1 if tp * pp <= 8 else 2, enable_dp_attention=dp > 1)
        works = []
        for ep in range(1, tp + 1):
            with contextlib.suppress(ValueError):
                layout = settle(dataclasses.replace(flags, ep=ep), M25, H200)
                memory.plan_memory(M25, layout, H200)  # where it fits, more than one request of 8192 tokens does
                works.append(ep)
        expected += [dataclasses.replace(flags, ep=ep) for ep in [None, *works[1:]] if works]
    found = [candidate.layout.flags for candidate in step.search(M25, H200, gpus, "latency", Flags())]
    assert sorted(found, key=str) == sorted(expected, key=str)


@pytest.mark.parametrize(("gpu", "small"), [(H200, 256), (B200, 512)])  # the second has 160 GiB and more
def test_a_search_for_throughput_fills_the_kv_cache_or_the_cuda_graphs_of_every_group_and_stage(gpu, small):
    batches = set()
    for found in step.search(M25, gpu, 8, "throughput", Flags(context_length=512)):
        flags = found.layout.flags
        room, graphs = found.kv_tokens // flags.dp // 512, (512 if flags.tp >= 4 else small) * flags.pp
        assert found.step.batch == min(room, graphs) * flags.dp
        assert found.kv_tokens == memory.plan_memory(M25, found.layout, gpu).tokens * flags.dp
        assert found.copies == 8 // (flags.tp * flags.pp)
        assert found.tokens_per_s == pytest.approx(found.copies * found.step.batch / (found.step.ms / 1e3))
        batches.add((flags.tp >= 4, flags.pp > 1, flags.dp > 1, room < graphs))
    assert {(False, False, False, False), (True, True, True, False), (False, True, False, True)} <= batches


def test_a_search_has_no_layout_whose_kv_cache_holds_no_request():
    """Two GPUs of TP2 are all that hold the model."""
    tokens = memory.plan_memory(M25, settle(Flags(tp=2), M25, H200), H200).tokens
    fits, too_long = (step.search(M25, H200, 2, "throughput", Flags(context_length=tokens + more)) for more in (0, 1))
    assert ("--tp 2", 1) in {(" ".join(one.layout.flags.words()[:2]), one.step.batch) for one in fits}
    assert Flags(tp=2, context_length=tokens + 1) not in {one.layout.flags for one in too_long}


@pytest.mark.parametrize(("positions", "context"), [(196608, 8192), (4096, 4096)])
def test_a_search_is_for_8192_tokens_of_a_request_or_as_many_as_the_model_has(positions, context):
    model = dataclasses.replace(M25, max_position_embeddings=positions)
    left_out, said = (step.search(model, H200, 4, "latency", Flags(context_length=it)) for it in (None, context))
    assert [one.step for one in left_out] == [one.step for one in said]


@pytest.mark.parametrize(("given", "with_ep"), [("auto", {"flashinfer_cutlass"}), ("triton", set())])
def test_a_search_divides_nvfp4_experts_by_ep_where_no_backend_was_asked_for_that_cannot(given, with_ep):
    model = read_model("m2.7", "modelopt_fp4")
    found = step.search(model, B200, 4, "throughput", Flags(quantization="modelopt_fp4", moe_runner_backend=given))
    backends: dict[bool, set[str]] = {True: set(), False: set()}
    for candidate in found:
        flags = candidate.layout.flags
        backends[candidate.layout.ep > 1].add(flags.moe_runner_backend)
    assert backends == {True: with_ep, False: {given}}


def test_a_search_in_json_has_the_step_of_each_layout_and_every_measured_step(capsys):
    assert cli.main(["plan", "m2.5", "--search", "--gpus", "8", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["assumptions"] == list(step.ASSUMPTIONS)
    rates = []
    for layout in data["layouts"]:
        words = layout["flags"].split()
        assert words[0] == "--tp" and layout["ep"] >= 1 and layout["kv_tokens"] > 8192
        seconds = layout["step"]["ms"] / 1e3
        assert layout["tokens_per_s"] == pytest.approx(layout["servers"] * layout["step"]["batch"] / seconds)
        rates.append(layout["tokens_per_s"])
    assert max(rates) == pytest.approx(rates[0], abs=0.001)
    first = data["errors"][0]
    said = {  # the first line of docs/scaling.md
        "engine": "stock", "flags": "--tp 4", "num_layers": 62, "input_len": 512, "batch": 1, "measured_ms": 8.03,
        "record": "steps_tp4_62_layers_h200.json", "fitted": False, "model_ms": pytest.approx(7.99, abs=0.005),
        "model_ms_all_tokens_routed_alike": pytest.approx(7.99, abs=0.005),
    }  # fmt: skip
    assert first == said and len(data["errors"]) == len(step.MEASURED)
    assert [one["measured_ms"] for one in data["errors"] if one["fitted"]] == [2.58, 3.69, 8.14]


@pytest.mark.parametrize(("more", "tokens"), [([], 8192), (["--context-length", "4096"], 4096)])
def test_a_search_says_how_long_its_requests_are(capsys, more, tokens):
    search = ["plan", "m2.5", "--search", "--gpus", "8", *more]
    assert cli.main(search) == 0
    assert f"each with requests of {tokens:,} tokens" in " ".join(capsys.readouterr().out.split())
    assert cli.main([*search, "--json"]) == 0
    for found in json.loads(capsys.readouterr().out)["layouts"]:
        assert found["context"] == tokens
        assert found["step"]["batch"] <= found["kv_tokens"] / tokens


# ------------------------------------------------------------------ the step


def test_the_model_of_the_step_says_how_far_off_it_is():
    for error in step.errors(step.FITTED):
        assert error.alike == pytest.approx(0, abs=1e-9), error
    assert all(error.even_ms >= error.alike_ms for error in step.errors())
    said = {  # in docs/scaling.md
        "TP4, 62 layers": 0.04, "TP4, 16 layers": 0.15, "2 ranks of TP4, 16 layers": 0.22, "TP2, 8 layers": 0.21,
        "TP1, 6 layers": 0.27, "TP4 DP4 EP4, 62 layers": 0.25,
    }  # fmt: skip
    largest = step.largest_errors()
    assert largest.keys() == said.keys()
    assert all(abs(largest[kind]) < most for kind, most in said.items()), largest


def test_the_steps_that_the_model_is_held_against_are_the_medians_of_their_records():
    for measured in step.MEASURED:
        record = json.loads((RECORDS / measured.record).read_text(encoding="utf-8"))
        changes = [] if measured.num_layers == 62 else [f"{measured.num_layers} of 62 layers"]
        flags = measured.flags
        if measured.ranks:  # each with what a rank of more has
            share = flags.tp // measured.ranks
            changes.append(f"heads, experts' width and vocabulary divided by {share}")
            flags = dataclasses.replace(flags, tp=measured.ranks)
        assert record["model"]["changes"] == changes
        assert sorted(record["layout"].split()) == sorted(" ".join(flags.words()).split())
        contestant = "stock" if measured.engine == "stock" else "ours"
        (run,) = record["contestants"][contestant]["runs"]
        samples = run["batches"][f"{measured.batch // measured.flags.dp} x {measured.input_len}"]["decode_ms"]
        assert measured.ms == pytest.approx(statistics.median(samples), abs=0.0051)


def test_a_launch_takes_its_nearest_measured_time():
    launch = launches.Launch("any", {1: 2.0, 16: 5.0}, "here")
    assert [launch.at(tokens) for tokens in (0, 1, 15, 16, 1000)] == [2, 2, 2, 5, 5]
    longer = dataclasses.replace(launch, context=512)
    assert [launches.for_context((launch, longer), tokens) for tokens in (511, 512, 8192)] == [
        (launch,),
        (longer,),
        (longer,),
    ]
    for engine_launches in launches.ENGINES.values():
        assert len({(each.name, each.context) for each in engine_launches}) == len(launches.STOCK)


def test_long_requests_take_the_longer_of_their_tokens_and_of_their_bytes():
    """At TP4 a token has 2 heads x 128 x K and V x 2 bytes on a rank, which HBM reads at 90% of 4.8 TB/s."""
    layout, constants = settle(Flags(tp=4), M25, H200), step.fitted()

    def grows_ms(engine: str, requests: int) -> float:
        short, long = (
            step.predict(M25, layout, H200, requests, tokens, constants, engine=engine).ms for tokens in (512, 8704)
        )
        return long - short

    read_ms = 62 * 8192 * 1024 / (0.9 * 4.8e12) * 1e3
    assert grows_ms("stock", 1) == pytest.approx(62 * 8192 * 11.8e-6, rel=1e-6)
    assert grows_ms("stock", 16) == pytest.approx(62 * 8192 * 11.8e-6, rel=1e-6)
    assert 256 * read_ms > 62 * 8192 * 11.8e-6
    assert grows_ms("stock", 256) == pytest.approx(256 * read_ms, rel=1e-6)
    assert grows_ms("ours", 1) == pytest.approx(62 * 8192 * 0.5e-6, rel=1e-6)
    assert grows_ms("ours", 16) == pytest.approx(16 * read_ms, rel=1e-6)


def test_a_step_changes_by_as_much_as_a_launch_in_its_table(monkeypatch):
    layout = settle(Flags(tp=4), M25, H200)
    constants = step.fitted()  # before the table changes
    before = step.predict(M25, layout, H200, 16, 529, constants).ms
    slower = [
        dataclasses.replace(each, us={16: each.at(16) + 0.6}) if each.context == 512 else each
        for each in launches.ENGINES["ours"]
    ]
    monkeypatch.setitem(launches.ENGINES, "ours", tuple(slower))
    after = step.predict(M25, layout, H200, 16, 529, constants).ms
    assert after - before == pytest.approx(62 * 0.6 / 1e3)


def test_across_nodes_a_tree_takes_the_latencies_that_nccl_has_for_it():
    """By hand: 4.4 + 2 * (7 steps of 0.52 * 1.8 over NVLink + 1 of 5.0 over the network), then the bytes."""
    assert collectives.over_nodes_us(8, 2, 0) == pytest.approx(27.504)
    assert collectives.over_nodes_us(1, 2, 0) == pytest.approx(14.4)
    small, large = (collectives.over_nodes_us(8, 2, size) for size in (98304, 1 << 20))
    assert small == pytest.approx(27.504 + 98304 / 8.7e3, rel=0.01)  # LL
    assert large == pytest.approx(4.4 + 2 * (7 * 1.2 + 8.5) + (1 << 20) / 30.2e3, rel=0.01)  # LL128


def test_a_counterparts_rows_are_read_where_they_are_held():
    """At TP16 over two nodes: 3 q heads and a KV head of 128 rows, a byte each, and a scale a block."""
    layout = settle(Flags(tp=16, nnodes=2), M25, H200)
    more = 4 * 128 * 3072 + 4 * (3072 // 128) * 4
    assert step.counterpart_bytes(M25, layout) == more
    crossing = step.predict(M25, layout, H200, 16, 529, counterpart=False)
    within = step.predict(M25, layout, H200, 16, 529)
    assert (within.memory_ms - crossing.memory_ms) * 1e-3 * 0.9 * 4.8e12 == pytest.approx(62 * more)
    saved = crossing.ms - within.ms
    assert saved == pytest.approx(62 * (collectives.over_nodes_us(8, 2, 128) - more / 4.32e6) / 1e3)
    assert saved > 0.03 * crossing.ms


A_TOKEN = 2 * 3072 * 2  # bytes of its hidden states that an all-reduce of a rank sends; half of it, a gather


def predicted(flags: Flags, batch: int, context: int = 529, model=M25, gpu: Gpu = H200, **more) -> step.Step:
    return step.predict(model, settle(flags, model, gpu), gpu, batch, context, **more)


def test_stages_of_a_pipeline_each_have_a_part_of_the_batch():
    """By hand, 6 requests of 100 tokens on four stages: each has up to two of them, so that all layers see two."""
    constants = step.Constants(step_us=100.0, request_us=10.0)
    flags = Flags(tp=4, pp=4, nnodes=2)  # of 15, 15, 16 and 16 layers
    made = predicted(flags, 6, 100, constants=constants)
    weights = [memory.weight_bytes(M25, settle(flags, M25, H200), stage) for stage in range(4)]
    read = sum(sum(stage.values()) - stage["experts"] - stage["embedding"] for stage in weights)
    read += sum(stage["experts"] for stage in weights) * (1 - (248 / 256) ** 2)  # of 256 experts a token misses 248
    read += 2 * 100 * 62 * 2 * 2 * 128 * 2  # tokens, layers, K and V, 2 heads of 128, bfloat16
    assert made.memory_ms == pytest.approx(read / 4.32e12 * 1e3, rel=1e-12)
    all_reduce_us = 5 + 2 * A_TOKEN * (3 / 4) / 450e3
    assert made.collectives_ms == pytest.approx((62 * 2 * all_reduce_us + 3 * 5) / 1e3, rel=1e-12)  # and three sends
    assert made.once_ms == pytest.approx(0.15, rel=1e-12)
    one_stage = predicted(Flags(tp=4), 2, 100, constants=constants)
    assert (made.launches_ms, made.arithmetic_ms) == (one_stage.launches_ms, one_stage.arithmetic_ms)


def test_under_dp_attention_a_rank_attends_to_its_requests_and_has_experts_of_all():
    """By hand, 5 requests on two groups of two ranks: one group has three."""
    flags = Flags(tp=4, dp=2, enable_dp_attention=True)
    made = predicted(flags, 5, 100, constants=step.Constants(dp_layer_us=7.0))
    weights = memory.weight_bytes(M25, settle(flags, M25, H200))
    read = sum(weights.values()) - weights["experts"] - weights["embedding"]
    read += weights["experts"] * (1 - (248 / 256) ** 5) + 3 * 100 * 62 * 2 * 4 * 128 * 2
    assert made.memory_ms == pytest.approx(read / 4.32e12 * 1e3, rel=1e-12)
    attention_us = 5 + 5 / 2 * A_TOKEN * (1 / 2) / 450e3
    gather_us = 5 + 5 * A_TOKEN / 2 * (3 / 4) / 450e3
    assert made.collectives_ms == pytest.approx(62 * (attention_us + 2 * gather_us) / 1e3, rel=1e-12)
    # q, o, k and v of 24 and 4 heads; scores and sums over 100 tokens; 8 experts and the head, divided by four.
    attention = 2 * 3072 * 128 * (2 * 24 + 2 * 4) + 4 * 24 * 128 * 100
    experts, head = 8 * 3 * 2 * 3072 * 1536 // 4, 2 * 3072 * 200064 // 4
    operations = 62 * (3 * attention + 5 * experts) + 5 * head
    assert made.arithmetic_ms == pytest.approx(operations / 1979e12 * 1e3, rel=1e-12)
    without = predicted(flags, 5, 100, constants=step.Constants())
    assert made.launches_ms - without.launches_ms == pytest.approx(62 * 7e-3)


def test_a_step_waits_for_memory_or_for_arithmetic_whichever_takes_longer():
    assert step.Step(1, 2.0, 3.0, 0.5, 0.25, 0.125).ms == 3.875
    assert step.Step(8, 4.0, 3.0, 0.5, 0.25, 0.25).tokens_per_s == 1600


@pytest.mark.parametrize(
    ("quantization", "backend", "share"),
    [("modelopt_fp4", "flashinfer_cutlass", 4.5 / 16), (None, "flashinfer_cutlass", 1)],
)
def test_tokens_are_gathered_in_four_and_a_half_bits_a_value_where_the_engine_does(quantization, backend, share):
    """Four bits, and a scale of eight for each 16 values, in place of bfloat16."""
    model = read_model("m2.7", quantization) if quantization else dataclasses.replace(M25, quantisation=Quantisation())
    flags = Flags(tp=4, dp=4, ep=4, enable_dp_attention=True, moe_runner_backend=backend, quantization=quantization)
    gather_us, scatter_us = (5 + 64 * A_TOKEN / 2 * part * (3 / 4) / 900e3 for part in (share, 1))
    made = predicted(flags, 64, model=model, gpu=B200)
    assert made.collectives_ms == pytest.approx(62 * (gather_us + scatter_us) / 1e3, rel=1e-12)


@pytest.mark.parametrize(
    ("flags", "engine", "sums_us", "launch_us"),
    [
        # Stock's launch has an all-reduce of 4.3 us in it, which is another one over two nodes.
        (Flags(tp=16, nnodes=2), "stock", collectives.over_nodes_us(8, 2, 4 * 8), 11.90 - 4.3),
        (Flags(tp=8), "stock", 0.0, 11.90),
        (Flags(tp=16, nnodes=2), "ours", 0.0, 2.75),  # which projects the counterpart's q and k
        (Flags(tp=16, nnodes=4), "ours", collectives.over_nodes_us(4, 4, 4 * 8), 2.75),  # where nobody has one
        (  # two of the tokens in a group
            Flags(tp=32, dp=2, nnodes=4, enable_dp_attention=True), "stock",
            collectives.over_nodes_us(8, 2, 2 * 8), 8.18 - 4.3,
        ),
    ],
)  # fmt: skip
def test_qk_norm_takes_its_launch_and_its_sums_where_they_cross_nodes(flags, engine, sums_us, launch_us):
    """Against a model without it; 4 tokens, of 8 bytes each."""
    without = predicted(flags, 4, model=dataclasses.replace(M25, use_qk_norm=False), engine=engine)
    made = predicted(flags, 4, engine=engine)
    assert made.launches_ms - without.launches_ms == pytest.approx(62 * launch_us / 1e3)
    assert made.collectives_ms - without.collectives_ms == pytest.approx(62 * sums_us / 1e3)


@pytest.mark.parametrize(("ep", "tokens"), [(1, 16), (2, 1), (4, 1), (4, 16), (8, 64), (16, 128)])
def test_the_busiest_ep_group_reads_about_as_many_experts_as_if_tokens_were_drawn(ep, tokens):
    """Never less than the mean of many draws, and at most 30% more."""
    random = Random(0)
    held, largest = 256 // ep, []
    for _ in range(200):
        touched = set(itertools.chain.from_iterable(random.sample(range(256), 8) for _ in range(tokens)))
        largest.append(max(Counter(expert // held for expert in touched).values()) / held)
    flags = Flags(tp=max(ep, 4), ep=ep, nnodes=max(ep // 8, 1))
    weights = memory.weight_bytes(M25, settle(flags, M25, H200))
    read = predicted(flags, tokens, context=0).memory_ms / 1e3 * 4.32e12
    share = (read - sum(weights.values()) + weights["embedding"]) / weights["experts"] + 1
    mean = statistics.mean(largest)
    assert 0.99 * mean <= share <= min(1, 1.3 * mean)


def test_the_document_of_scaling_has_what_the_model_says():
    assert scaling.between_marks(scaling.DOCUMENT.read_text(encoding="utf-8")) == scaling.tables().strip()


def test_more_gpus_are_not_slower_than_their_memory_says():
    """A step reads less a GPU with more ranks, and never less than nothing."""
    times = [step.predict(M25, settle(Flags(tp=tp), M25, H200), H200, 64, 4096).memory_ms for tp in (2, 4, 8)]
    assert times == sorted(times, reverse=True) and times[-1] > 0
