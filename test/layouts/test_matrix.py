"""Every row of the matrix on this host's CPU, and faults in the model that the matrix must find."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from layouts import nodes, proof, servers, simulations, spies
from layouts.harness import LayoutFailed, run_layout
from layouts.matrix import (
    CHUNK,
    CPU,
    GPUS,
    IN_FP8,
    NUM_LAYERS,
    OVERLAPPED,
    REDUNDANT,
    ROWS,
    SHAPES,
    SHARE,
    STEPS,
    TOLERANCE,
    TWO_NODES,
    Oracles,
    Outcome,
    distributions,
    run_row,
    small,
)
from layouts.servers import environment_of, launch_of, names_of_servers, run_server
from sglang.srt.layers import minimax_counterpart
from sglang.srt.models import minimax_m2, minimax_m2_moe
from sglang.srt.server_args import prepare_server_args

from sglang_minimax.checkpoints import published_config, write_checkpoint
from sglang_minimax.reference import Reference
from sglang_minimax.server_process import ServerError


@pytest.fixture(scope="module")
def oracles(tmp_path_factory) -> Oracles:
    return Oracles(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("name", ROWS)
def test_row(name, oracles):
    outcome = run_row(ROWS[name], oracles)
    assert not outcome.faults, "\n".join(outcome.faults)
    assert outcome.compared > 0


@pytest.mark.parametrize(
    "name",
    [
        *["tp1", "tp4_kv2", "tp16_kv8", "tp2_mixed", "tp4_prefix", "tp2_pp2", "tp4_dp2_one_idle", "tp4_dp4_staggered"],
        *["tp16_dp4_kv2", "tp4_dp2_overlap", "tp4_dp2_stages", "tp4_kv2_2_nodes", "tp8_dp2_4_nodes"],
    ],
)
def test_row_through_the_one_kernel_operator(name, oracles):
    row = ROWS[name]

    def simulation(monkeypatch):
        if row.simulation:
            row.simulation(monkeypatch)
        simulations.one_kernel(monkeypatch)

    outcome = run_row(dataclasses.replace(row, simulation=simulation), oracles)
    assert not outcome.faults, "\n".join(outcome.faults)
    assert outcome.compared > 0


@pytest.mark.parametrize("name", ["tp1", "tp2_ep2_redundant", "tp4_dp2_one_idle"])
def test_row_whose_router_also_chooses(name, oracles):
    """As where its second kernel does, by that operator's plain torch; the engine's choice would fail."""
    outcome = run_row(dataclasses.replace(ROWS[name], simulation=simulations.route_at_once), oracles)
    assert not outcome.faults, "\n".join(outcome.faults)
    assert outcome.compared > 0


@pytest.mark.parametrize("overlapped", [False, True])
def test_the_ranks_of_an_attention_group_exchange_the_same_rows_in_the_same_order(oracles, monkeypatch, overlapped):
    """Else one of them would wait for sums that nobody sends. In two-batch overlap, and else with a DP rank that idles
    first and ends early; the engine cannot overlap that."""
    simulations.one_kernel(monkeypatch)
    first, second, third, fourth, _ = oracles.prompts
    if overlapped:
        simulations.token_exchange(monkeypatch)
        run = dict(ep=4, chunk=64, prompts_by_dp_rank=[[first, second], [third, fourth]], server_arguments=OVERLAPPED)
    else:
        prompts = [[second, fourth], [first]]
        run = dict(prompts_by_dp_rank=prompts, arrivals=[[0, 3], [2]], lengths=[[4, 4], [2]])
    checkpoint, *_ = oracles.of("2 KV heads")
    ranks = run_layout(checkpoint, tp=4, dp=2, steps=STEPS, probe=spies.watch_exchanges, **run).probed
    assert ranks[0] == ranks[1] and ranks[2] == ranks[3]
    assert ranks[0] != ranks[2] and min(map(len, ranks)) > NUM_LAYERS


def test_copies_of_the_experts_that_are_divided_by_ep_are_summed_within_each_copy(oracles):
    """The row of this name divides them by width, and the sums over EP and over width are two groups'."""
    outcome = run_row(dataclasses.replace(ROWS["tp4_moe_dp2"], ep=2), oracles)
    assert not outcome.faults, "\n".join(outcome.faults)
    assert outcome.compared > 0


@pytest.mark.parametrize("one_kernel", [False, True])
@pytest.mark.parametrize(
    ("shape", "tp", "switch", "crosses"),
    [
        ("8 KV heads", 16, {}, False),
        ("2 KV heads", 4, {}, False),
        ("1 KV head", 4, {}, True),  # held on both nodes
        ("2 KV heads", 4, {0: "0"}, True),  # off on one rank is off on all: none waits for another
        ("8 KV heads", 2, {}, None),  # a rank a node: nothing to sum
    ],
)
def test_no_sum_of_qk_norm_crosses_nodes(oracles, monkeypatch, shape, tp, switch, crosses, one_kernel):
    if one_kernel:
        simulations.one_kernel(monkeypatch)
    made = minimax_counterpart._choices_of_any_rank.__wrapped__

    def choices():
        rank = torch.distributed.get_rank()
        monkeypatch.setenv(minimax_counterpart.SWITCH, switch.get(rank, "1"))
        return made()

    monkeypatch.setattr(minimax_counterpart, "_choices_of_any_rank", functools.cache(choices))
    checkpoint, *_ = oracles.of(shape)
    ranks = run_layout(
        checkpoint, tp=tp, prompts_by_dp_rank=[[[3, 1, 4]]], steps=2, probe=spies.watch_norm_sums,
        server_arguments=TWO_NODES,
    ).probed  # fmt: skip
    everyone, half = tuple(range(tp)), tp // 2
    for rank, sums in enumerate(ranks):
        node = everyone[:half] if rank < half else everyone[half:]
        expected = everyone if crosses else node
        assert sums == ({} if crosses is None else {expected: 2 * NUM_LAYERS}), (rank, sums)


def test_copies_of_experts_that_each_rank_would_choose_for_itself_are_refused(oracles):
    checkpoint, *_ = oracles.of("2 KV heads")
    arguments = {**REDUNDANT, "ep_dispatch_algorithm": "static"}
    with pytest.raises(LayoutFailed, match="--ep-num-redundant-experts 4 --ep-dispatch-algorithm static need an a2a"):
        run_layout(checkpoint, tp=2, ep=2, prompts_by_dp_rank=[[[1]]], steps=0, server_arguments=arguments)


# --- What the matrix must find ---------------------------------------------------------------------------


def leave_out_the_sum(monkeypatch):
    monkeypatch.setattr(minimax_m2_moe.MiniMaxM2MoE, "_all_reduce", lambda self, output: output)


def sum_twice(monkeypatch):
    once = minimax_m2_moe.MiniMaxM2MoE._all_reduce
    monkeypatch.setattr(minimax_m2_moe.MiniMaxM2MoE, "_all_reduce", lambda self, output: once(self, once(self, output)))


def norm_own_heads_alone(monkeypatch):
    monkeypatch.setattr(minimax_m2, "attention_tensor_model_parallel_all_reduce", lambda sums: sums)


def count_replicas_once(monkeypatch):
    monkeypatch.setattr(minimax_m2.MiniMaxM2RMSNormTP, "reduced_count", property(lambda self: self.hidden_size))


@pytest.mark.parametrize(
    ("fault", "name", "found"),
    [
        (leave_out_the_sum, "tp2_kv8", ["experts ran 1 times and were summed 0 times", "differ by up to"]),
        (sum_twice, "tp2_kv8", ["experts ran 1 times and were summed 2 times", "differ by up to"]),
        (norm_own_heads_alone, "tp2_kv8", ["differ by up to"]),
        (count_replicas_once, "tp4_kv2", ["differ by up to"]),
    ],
)
def test_a_fault_in_the_model_is_found(oracles, fault, name, found):
    faults = run_row(dataclasses.replace(ROWS[name], simulation=fault), oracles).faults
    for said in found:
        assert any(said in line for line in faults), faults
    assert len(found) > 1 or len(faults) == 1


def test_a_row_that_does_not_meet_what_it_says_is_a_fault(oracles):
    row = dataclasses.replace(ROWS["tp2_kv8"], meets=("IDLE",), reduced_by=(frozenset({"NEXT_NORM"}),) * 3)
    faults = run_row(row, oracles).faults
    assert "no rank met IDLE" in faults
    assert "layer 2 was summed by ['MODEL'], not ['NEXT_NORM']" in faults and len(faults) == 4


def test_bfloat16_stays_near_float32(tmp_path):
    """The same bfloat16 weights: transformers computes in float32, the ranks in bfloat16, on the same tokens."""
    steps = 16
    path = write_checkpoint(tmp_path, small(num_key_value_heads=2, dtype="bfloat16"))
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8]]
    expected = Reference(path).greedy(prompts, steps)
    tokens = [completion.tokens for completion in expected]
    result = run_layout(path, tp=4, dtype="bfloat16", prompts_by_dp_rank=[prompts], forced_tokens=[tokens], steps=steps)
    for completion, rows in zip(expected, result.logprobs[0], strict=True):
        got = rows[np.arange(steps), completion.tokens]
        assert np.abs(got - completion.logprobs).mean() < 0.1
        assert np.abs(got - completion.logprobs).max() < 0.5


def test_in_bfloat16_a_row_holds_and_a_fault_is_found(tmp_path):
    """As the rows are judged on GPUs, whose kernels do not compute in float32."""
    oracles = Oracles(tmp_path, dataclasses.replace(GPUS, name="cpu", arguments={}))
    assert not run_row(ROWS["tp4_kv2"], oracles).faults
    assert not run_row(ROWS["tp4_dp2_eagle3"], oracles).faults  # hidden states are judged likewise
    (fault,) = run_row(dataclasses.replace(ROWS["tp4_kv2"], simulation=count_replicas_once), oracles).faults
    assert "log-probabilities differ by up to" in fault


def test_a_forward_hook_gets_tensors_where_modules_would_leave_parts(oracles):
    """--forward-hooks, and --debug-tensor-dump-output-folder likewise, take what modules return for tensors."""
    modules = ["model.layers.?", "model.layers.*.self_attn", "model.layers.*.block_sparse_moe"]
    hook = {"target_modules": modules, "hook_factory": "layouts.spies:hook_that_wants_tensors"}
    row = dataclasses.replace(ROWS["tp4_ep2_one_launch"], arguments={"forward_hooks": [hook]})
    assert not run_row(row, oracles).faults


# --- The document ----------------------------------------------------------------------------------------


def test_the_table_is_written_between_its_marks_and_nowhere_else(tmp_path):
    document, marks = tmp_path / "proof.md", proof.MARKS["cpu", False]
    document.write_text(f"before\n{marks.begin}\nold\n{marks.end}\nbehind\n")
    outcomes = {"tp2_next_norm": Outcome(1.2e-6, 1.2e-6, 1e-4, 1234, 2.5, [])}
    proof.write(document, marks, proof.table(outcomes, proof.COMMAND, 60))
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("\nbehind\n") and "old" not in text
    assert "1,234 log-probabilities" in text and "1 rows in 60 s" in text
    assert "| tp2_next_norm | TP2 | 8 KV heads; the next norm | 2 | 1.2e-06 | 2.5 | CPU ranks, simulated: " in text
    document.write_text("no marks")
    with pytest.raises(ValueError, match="needs the lines"):
        proof.write(document, marks, "")


def test_the_table_of_gpus_says_what_was_allowed(monkeypatch):
    monkeypatch.setattr(proof, "hardware", lambda device: "two GPUs")
    monkeypatch.setattr(proof, "count_gpus", lambda: 2)
    outcomes = dict.fromkeys(["tp2_kv8", "tp8_kv8"], Outcome(0.75, 0.03125, 0.125, 1234, 2.5, []))
    lines = proof.table(outcomes, "the command", 60, GPUS).splitlines()
    numbers = "0.031 | 0.125 | 7.5e-01 | 2.5"
    assert f"| tp2_kv8 | TP2 | 8 KV heads; 4 KV heads a rank | 2 | {numbers} | a GPU a rank |" in lines
    assert f"| tp8_kv8 | TP8 | 8 KV heads; 1 KV head a rank | 8 | {numbers} | took turns on 2 GPUs |" in lines
    assert any(line.startswith("`the command` on two GPUs: ") and "90% of the differences" in line for line in lines)


def test_rows_at_once_come_as_they_end_and_one_that_fails_is_a_fault(monkeypatch):
    prepared = []

    class Prepared:
        def __init__(self, folder, device):
            pass

        def prepare(self, shape):
            prepared.append(shape)

    def run(row, oracles):
        if row is ROWS["tp2_kv8"]:
            raise LayoutFailed("rank 1 failed")
        time.sleep(0.2 if row is ROWS["tp1"] else 0)
        return Outcome(0.75, 0.03125, 0.125, 1234, 2.5, [])

    monkeypatch.setattr(proof, "Oracles", Prepared)
    runs = [proof.Run(name) for name in ("tp1", "tp2_kv8", "tp4_kv8")]
    outcomes = list(proof.outcomes_of(runs, GPUS, run, at_once=3))
    assert {found for found, _ in outcomes} == set(runs) and outcomes[-1][0] == proof.Run("tp1")
    assert {found.name: one.faults for found, one in outcomes if one.faults} == {"tp2_kv8": ["rank 1 failed"]}
    assert sorted(prepared) == ["2 KV heads", "8 KV heads"]


@pytest.mark.parametrize(("at_once", "ranks"), [(2, None), (4, 8), (8, 20), (8, 2)])
def test_rows_at_once_have_so_many_ranks_together(monkeypatch, at_once, ranks):
    monkeypatch.setattr(proof, "Oracles", lambda folder, device: SimpleNamespace(prepare=lambda shape: None))
    lock, running, together = threading.Lock(), [], []

    def run(row, oracles, stock=False):
        with lock:
            running.append(row.ranks)
            together.append(list(running))
        time.sleep(0.02)
        with lock:
            running.remove(row.ranks)
        return Outcome(0.75, 0.03125, 0.125, 1234, 2.5, ["wrong"] if stock else [])

    names = ["tp1", "tp16_kv8", "tp2_kv8", "tp8_kv8", "tp4_kv8", "tp4_kv2"]
    runs = [proof.Run(name, stock) for stock in (False, True) for name in names]
    outcomes = dict(proof.outcomes_of(runs, GPUS, run, at_once, ranks))
    assert {run: bool(outcome.faults) for run, outcome in outcomes.items()} == {run: run.stock for run in runs}
    assert together[0][0] == 16 and max(map(len, together)) <= at_once
    assert all(len(rows) == 1 or sum(rows) <= (ranks or 100) for rows in together)
    assert max(map(len, together)) > 1 or ranks == 2


def test_a_run_that_was_cut_off_goes_on_with_the_rows_that_did_not_hold(monkeypatch, tmp_path, capsys):
    ran = []

    def outcomes_of(runs, device, how, at_once, ranks):
        assert how is run_row
        ran.append([run.name for run in runs])
        faults = {"tp4_kv2": ["rank 1 failed"]} if len(ran) == 1 else {}
        yield from ((run, Outcome(0.75, 0.03125, 0.125, 1234, 2.5, faults.get(run.name, []))) for run in runs)

    monkeypatch.setattr(proof, "outcomes_of", outcomes_of)
    options = ["--only", "tp4_kv2", "tp4_kv1", "--keep", str(tmp_path / "kept")]
    assert [proof.main(options), proof.main(options), proof.main(options)] == [1, 0, 0]
    held = [name for name in ROWS if "tp4_kv1" in name or "tp4_kv2" in name]
    assert ran == [held, ["tp4_kv2"], []]
    said = capsys.readouterr().out.splitlines()
    assert [text for text in said if "rows hold" in text] == [
        f"{count} of {len(held)} rows hold; 0 s, the reference included"
        for count in (len(held) - 1, len(held), len(held))
    ]


def test_the_first_prompt_begins_with_a_near_tie_which_rounding_may_tip_over(tmp_path):
    """Why captured states are judged over all prompts together: in the model of the rows of EAGLE3 on GPUs, the last
    expert that the first token chooses in the first layer is no further from the next than rounding moves them."""
    oracles = Oracles(tmp_path, dataclasses.replace(GPUS, name="cpu"))  # their model; the reference runs here
    shape = ROWS["tp4_eagle3"].shape
    _, precise, _ = oracles.of(shape)

    def scores(reference) -> torch.Tensor:
        """By which the first layer chooses experts for the first token."""
        block, found = reference.model.model.layers[0].mlp, []
        handle = block.gate.register_forward_hook(lambda _, inputs, outputs: found.append(outputs[0]))
        with torch.inference_mode():
            reference.model(input_ids=torch.tensor([oracles.prompts[0][:1]]), use_cache=False)
        handle.remove()
        (bias,) = (value for name, value in block.state_dict().items() if name.endswith("correction_bias"))
        return found[0][0].float().sigmoid() + bias.float()

    exact, chosen = scores(precise), precise.model.config.num_experts_per_tok
    ordered = exact.sort(descending=True).values
    assert ordered[chosen - 1] - ordered[chosen] < (scores(oracles.rounded(shape)) - exact).abs().max()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--at-once", "2"], "--at-once 2 must be 1 on the CPU"),
        (["--servers", "--stock"], "--stock needs --servers --device cuda"),
        (["--device", "cuda", "--stock"], "--stock needs --servers --device cuda"),
        (["--write", "--only", "tp1"], "--write needs all rows"),
        (["--device", "cuda", "--only", "tp2_a2a"], "none of these rows can run on"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit):
        proof.main(arguments)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("servers", "names"), [(False, list(ROWS)), (True, names_of_servers(ROWS, CPU))])
def test_the_document_names_every_row(servers, names):
    """A row that was added or taken away asks for another run of the command."""
    text = proof.DOCUMENT.read_text()
    marks = proof.MARKS["cpu", servers]
    table = text[text.index(marks.begin) : text.index(marks.end)]
    written = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| tp")]
    assert written == names


# --- The same layouts through the server -----------------------------------------------------------------


def test_every_layout_has_a_server():
    """But those that are simulated, capture, or on a CPU have stages; each once. FP8 is simulated on a CPU only."""
    on_cpu, on_gpus = (names_of_servers(ROWS, device) for device in (CPU, GPUS))
    real = [row for row in ROWS.values() if row.simulation is None or row.shape == IN_FP8]
    layouts = {(row.shape, row.tp, row.dp, row.ep, row.pp) for row in real}
    assert {(row.shape, row.tp, row.dp, row.ep, row.pp) for row in map(ROWS.get, on_gpus)} == layouts
    only_on_gpus = {name for name in on_gpus if ROWS[name].pp > 1 or ROWS[name].shape == IN_FP8}
    assert set(on_gpus) - set(on_cpu) == only_on_gpus and "tp4_dp2_fp8" in only_on_gpus
    assert "tp4_dp2" in on_cpu and "tp4_dp2_uneven" not in on_cpu
    assert {"tp2_mixed", "tp4_cp2", "tp4_kv2_2_nodes", "tp4_moe_dp2", "tp4_dp2_head"} <= set(on_cpu)


@pytest.mark.parametrize("name", names_of_servers(ROWS, GPUS))
def test_the_engine_takes_a_servers_flags_and_reads_the_rows_layout_from_them(name, tmp_path):
    """Those for GPUs, where the engine is told that there is none: of them it reads the layout alike."""
    row = ROWS[name]
    config = published_config(GPUS.model_of(row.shape))
    (tmp_path / "config.json").write_text(json.dumps(config))
    launch = launch_of(row, GPUS, 2)
    nodes = ["--nnodes", str(launch.nodes), "--node-rank", "0", "--dist-init-addr", "127.0.0.1:5000"]
    fixed = ["--model-path", str(tmp_path), "--device", "cpu", "--skip-tokenizer-init"]
    args = prepare_server_args([*fixed, *launch.flags, *nodes])
    args.check_server_args()
    sizes = args.tp_size, args.dp_size if args.enable_dp_attention else 1, args.ep_size, args.pp_size
    assert sizes == (row.tp, row.dp, row.ep, row.pp)
    given = {field: value for field, value in row.arguments.items() if field != "nnodes"} | row.on_gpus
    assert {field: getattr(args, field) for field in given} == given
    assert args.chunked_prefill_size == CHUNK


@pytest.mark.parametrize("name", names_of_servers(ROWS, GPUS))
@pytest.mark.parametrize("gpus", [1, 2, 4, 16])
def test_on_gpus_each_rank_of_a_node_has_one_and_nodes_share_them_evenly(name, gpus):
    row = ROWS[name]
    launch = launch_of(row, GPUS, gpus)
    environments = [environment_of(launch, rank, GPUS, gpus) for rank in range(launch.nodes)]
    if launch.nodes == 1:
        assert row.ranks <= gpus and "CUDA_VISIBLE_DEVICES" not in environments[0]
        assert "--disable-custom-all-reduce" not in launch.flags
        return
    seen = [one["CUDA_VISIBLE_DEVICES"].split(",") for one in environments]
    assert all(len(set(own)) == len(own) == row.ranks // launch.nodes for own in seen), "no rank shares within a node"
    ranks_of = collections.Counter(gpu for own in seen for gpu in own)
    assert sum(ranks_of.values()) == row.ranks and max(ranks_of.values()) == -(-row.ranks // gpus)
    assert len({one["NCCL_HOSTID"] for one in environments}) == launch.nodes
    assert "--disable-custom-all-reduce" in launch.flags


@pytest.mark.parametrize("name", ["tp4_dp2_head", "tp4_kv2_2_nodes"])
def test_server(name, oracles):
    outcome = run_server(ROWS[name], oracles)
    assert not outcome.faults, "\n".join(outcome.faults)
    assert outcome.compared == 11 * STEPS  # five prompts, again, and one alone
    assert outcome.largest_difference < TOLERANCE


class Answering:
    """In place of a server: what ``completions`` say, once ``change`` has had each prompt's steps to change.

    ``asked``: the prompts of each request.
    """

    def __init__(self, completions, change) -> None:
        self.steps_of = {}
        for one in completions:
            steps = [list(pair) for pair in zip(one.logprobs, one.tokens, strict=True)]
            self.steps_of[str(one.prompt)] = steps
            change(one.prompt, steps)
        self.asked = []

    def generate(self, prompts, steps):
        self.asked.append(prompts)
        return [{"output_token_logprobs": self.steps_of[str(prompt)]} for prompt in prompts]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("token", "another token at step 2"),
        ("number", "100% of log-probabilities differ by up to 2.00e-04"),
        ("NaN", "is not finite"),
        ("end", "the server has ended"),
        ("error", "AssertionError: 3 heads"),
    ],
)
def test_a_server_that_answers_wrongly_is_a_fault(wrong, said, oracles, monkeypatch):
    def change(prompt, steps):
        if prompt == oracles.prompts[1]:
            by = {"token": (0, 1), "number": (2 * TOLERANCE, 0), "NaN": (float("nan"), 0)}[wrong]
            steps[2] = [value + more for value, more in zip(steps[2], by, strict=True)]

    @contextlib.contextmanager
    def started(row, checkpoint, device, folder, stock):
        if wrong == "end":
            (folder / "node0.log").write_text("out of memory\n")
            raise ServerError("the server has ended")
        if wrong == "error":
            (folder / "node0.log").write_text("[2026-11-23 TP0] Scheduler hit an exception:\nAssertionError: 3 heads\n")
            (folder / "node1.log").write_text("RuntimeError: connection closed\n")
            raise ServerError("the server has ended")
        yield Answering(oracles.of(row.shape)[2], change)

    monkeypatch.setattr(servers, "_started", started)
    faults = run_server(ROWS["tp4_kv2"], oracles).faults
    assert any(said in fault for fault in faults)
    assert wrong != "end" or faults == [said, "out of memory"]


@pytest.mark.parametrize("parts", [False, True], ids=["numbers", "tokens"])
@pytest.mark.parametrize(("wrong_in", "sets", "holds"), [((), 1, True), ((0,), 5, True), (range(5), 5, False)])
def test_a_server_on_gpus_that_leaves_a_doubt_is_asked_for_more(wrong_in, sets, holds, parts, tmp_path, monkeypatch):
    """One prompt of five may have met a near tie of the router; if the same one of every five is off, it is a fault."""
    oracles = Oracles(tmp_path, dataclasses.replace(GPUS, name="cpu", arguments={}))
    fives, shape = [oracles.prompts, *oracles.more_prompts], ROWS["tp4_kv2"].shape
    wrong = [fives[number][1] for number in wrong_in]

    def change(prompt, steps):
        for step in steps if prompt in wrong else ():
            step[0], step[1] = step[0] + 3, step[1] + parts

    server = Answering([*oracles.of(shape)[2], *oracles.more(shape)[0]], change)
    monkeypatch.setattr(servers, "_started", lambda *_: contextlib.nullcontext(server))
    outcome = run_server(ROWS["tp4_kv2"], oracles)
    assert server.asked == [prompts for five in fives[:sets] for prompts in (five, five, five[:1])]
    # A wrong prompt is asked twice, and nothing of it is compared behind its first step if that parts.
    assert outcome.compared == sets * 11 * STEPS - parts * len(wrong) * 2 * (STEPS - 1)
    assert not outcome.faults if holds else "90% of log-probabilities differ by up to 3.00e+00" in outcome.faults[0]


@pytest.mark.parametrize(("share", "sets"), [(0.25, 1), (0.75, 5)])
def test_a_server_that_only_just_holds_is_asked_for_more(share, sets, tmp_path, monkeypatch):
    oracles = Oracles(tmp_path, dataclasses.replace(GPUS, name="cpu", arguments={}))
    fives, shape = [oracles.prompts, *oracles.more_prompts], ROWS["tp4_kv2"].shape
    off = share * oracles.tolerance(shape, chosen_only=True).limit

    def change(prompt, steps):
        for step in steps if prompt == fives[0][1] else ():
            step[0] += off

    server = Answering([*oracles.of(shape)[2], *oracles.more(shape)[0]], change)
    monkeypatch.setattr(servers, "_started", lambda *_: contextlib.nullcontext(server))
    outcome = run_server(ROWS["tp4_kv2"], oracles)
    assert len(server.asked) == 3 * sets and not outcome.faults


def test_the_table_of_servers_says_how_stock_ends(monkeypatch):
    monkeypatch.setattr(proof, "hardware", lambda device: "two GPUs")
    monkeypatch.setattr(proof, "count_gpus", lambda: 2)
    right = Outcome(0.75, 0.03125, 0.125, 1234, 2.5, [])
    ours = dict.fromkeys(["tp2_kv8", "tp4_kv2", "tp4_dp2", "tp4_dp4"], right)
    of_stock = {
        "tp2_kv8": right,
        "tp4_kv2": Outcome(1.75, 0.625, 0.125, 1234, 2.5, ["90% of log-probabilities differ by up to 6.25e-01"]),
        "tp4_dp2": Outcome.of_failure(["AttributeError: no `norm` | none", "the log"]),
        "tp4_dp4": Outcome.of_failure(["word " * 50]),
    }
    text = proof.table(ours, "the command", 60, GPUS, True, of_stock)
    rows = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    cells = {row[0]: row[-1] for row in rows}
    assert cells.pop("tp4_dp4").endswith("word …`")
    assert cells == {
        "row": "stock",
        "---": "---",
        "tp2_kv8": "right",
        "tp4_kv2": "wrong: 90% within 0.625",
        "tp4_dp2": "ends: `AttributeError: no norm / none`",
    }


def test_a_run_of_stock_beside_ours_is_kept_and_goes_on(monkeypatch, tmp_path, capsys):
    """Whatever stock answers, the run holds if ours does."""
    right, wrong = Outcome(0.75, 0.03125, 0.125, 1234, 2.5, []), Outcome.of_failure(["ValueError: heads"])
    ran = []

    def outcomes_of(runs, device, how, at_once, ranks):
        assert how is run_server and (at_once, ranks) == (12, 32)
        ran.append(runs)
        yield from ((run, wrong if run.stock else right) for run in runs)

    monkeypatch.setattr(proof, "outcomes_of", outcomes_of)
    monkeypatch.setattr(proof, "count_gpus", lambda: 2)
    options = ["--device", "cuda", "--servers", "--stock", "--at-once", "12", "--ranks", "32", "--only", "tp16_kv8"]
    assert proof.main([*options, "--keep", str(tmp_path / "kept")]) == 0
    assert proof.main([*options, "--keep", str(tmp_path / "kept")]) == 0
    names = ["tp16_kv8", "tp16_kv8_2_nodes"]
    assert ran == [[proof.Run(name, stock) for stock in (False, True) for name in names], []]
    assert "2 of 2 rows hold" in capsys.readouterr().out
    assert (
        proof.command_of(proof.parse(options[:-2]))
        == "python test/layouts/matrix.py --write --servers --device cuda --stock --at-once 12 --ranks 32"
    )


def test_stocks_end_is_told_by_its_cause():
    """Not by what a node says that lost another, nor by what was raised while the cause was handled."""
    lost = "RuntimeError: [transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:45954"
    logs = [
        f"[2026-01-31 12:00:07 TP0] Scheduler hit an exception: Traceback\n  File\n{lost}\n[2026-01-31 12:00:07] end",
        "[2026-01-31 12:00:06 TP4] Scheduler hit an exception: Traceback\nRuntimeError: shape [4, 768]\n"
        "During handling of the above exception, another exception occurred:\nTypeError: no way out",
        "[2026-01-31 12:00:08] ERROR:    Traceback\nKeyError: 'late'\n"
        "[2026-01-31 12:00:05] AttributeError: 'NoneType' object has no attribute 'server_args'",
    ]
    assert servers.first_error(logs) == "RuntimeError: shape [4, 768]"
    assert servers.first_error([logs[0], "no line of this one"]) == lost
    assert servers.first_error(["[2026-01-31 12:00:07 TP0] all is well"]) is None


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_signal_ends_the_servers_of_every_thread(at_once, monkeypatch, tmp_path):
    """They are in sessions of their own, and would go on for ever, with the memory of the next run's."""
    running = nodes._Running()
    monkeypatch.setattr(nodes, "_RUNNING", running)
    monkeypatch.setattr(proof, "end_servers", running.end)
    launchers, waiting = [], []

    def serve(row, oracles):
        logs = [tmp_path / f"{row.ranks}_{node}" for node in range(2)]
        command = [sys.executable, "-c", "import time; time.sleep(600)"]
        with nodes.serve_on_nodes(command, 2, logs, lambda rank: {}) as server:
            launchers.extend([server._first, *server._others])
            waiting.append(row)
            if len(waiting) == at_once:
                threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
            server.wait_until_ready(300)

    monkeypatch.setattr(proof, "run_server", serve)
    started = time.monotonic()
    options = ["--servers", "--only", "tp2_kv8", "tp4_kv8", "tp8_kv8", "--at-once", str(at_once)]
    assert proof.main(options) == 128 + signal.SIGTERM
    assert time.monotonic() - started < 60 and len(launchers) == 2 * at_once
    assert all(launcher.has_ended() and not launcher.members() for launcher in launchers)


def test_what_fp8_does_to_the_reference_bounds_rows_in_fp8_on_gpus(tmp_path):
    """More than bfloat16 does, and so little that a norm over each head alone would still be found."""
    oracles = Oracles(tmp_path, dataclasses.replace(GPUS, name="cpu"))  # their model; the reference runs here
    _, precise, completions = oracles.of(IN_FP8)
    allowed = oracles.tolerance(IN_FP8).limit
    tokens, top_k = [one.tokens for one in completions], SHAPES[IN_FP8].vocab_size

    def within(reference) -> float:
        pairs = zip(reference.score(oracles.prompts, tokens, top_k=top_k), completions, strict=True)
        differences = [np.abs(distributions(one) - distributions(other)).ravel() for one, other in pairs]
        return float(np.quantile(np.concatenate(differences), SHARE))

    def norm_each_head(norm, x):
        heads = x.unflatten(-1, (-1, 128))
        mean = heads.square().mean(-1, keepdim=True)
        return (heads * torch.rsqrt(mean + norm.variance_epsilon)).flatten(-2) * norm.weight

    dequantised = oracles.folder / "FP8_blocks" / "meant"
    assert 3 * within(Reference(dequantised, dtype="bfloat16")) < allowed
    for layer in precise.model.model.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            norm.forward = functools.partial(norm_each_head, norm)
    assert within(precise) > allowed
