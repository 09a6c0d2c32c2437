"""The matrix's layouts through the real server: what is started, asked and made of its answers."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
import time

import pytest
from layouts import nodes, proof, servers
from layouts.matrix import Oracles, Outcome
from layouts.rows import CHUNK, CPU, GPUS, IN_FP8, ROWS, STEPS, TOLERANCE
from layouts.servers import environment_of, launch_of, names_of_servers, run_server
from sglang.srt.server_args import prepare_server_args

from sglang_minimax.checkpoints import published_config
from sglang_minimax.server_process import ServerError


@pytest.fixture(scope="module")
def oracles(tmp_path_factory) -> Oracles:
    return Oracles(tmp_path_factory.mktemp("checkpoints"))


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


@pytest.fixture(scope="module")
def on_gpus(tmp_path_factory):
    """What servers on GPUs are held against, here computed on a CPU."""
    return Oracles(tmp_path_factory.mktemp("checkpoints"), dataclasses.replace(GPUS, name="cpu", arguments={}))


@pytest.mark.parametrize("parts", [False, True], ids=["numbers", "tokens"])
@pytest.mark.parametrize(("wrong_in", "sets", "holds"), [((), 1, True), ((0,), 5, True), (range(5), 5, False)])
def test_a_server_on_gpus_that_leaves_a_doubt_is_asked_for_more(wrong_in, sets, holds, parts, on_gpus, monkeypatch):
    """One prompt of five may have met a near tie of the router; if the same one of every five is off, it is a fault."""
    fives, shape = [on_gpus.prompts, *on_gpus.more_prompts], ROWS["tp4_kv2"].shape
    wrong = [fives[number][1] for number in wrong_in]

    def change(prompt, steps):
        for step in steps if prompt in wrong else ():
            step[0], step[1] = step[0] + 3, step[1] + parts

    server = Answering([*on_gpus.of(shape)[2], *on_gpus.more(shape)[0]], change)
    monkeypatch.setattr(servers, "_started", lambda *_: contextlib.nullcontext(server))
    outcome = run_server(ROWS["tp4_kv2"], on_gpus)
    assert server.asked == [prompts for five in fives[:sets] for prompts in (five, five, five[:1])]
    # A wrong prompt is asked twice, and nothing of it is compared behind its first step if that parts.
    assert outcome.compared == sets * 11 * STEPS - parts * len(wrong) * 2 * (STEPS - 1)
    assert not outcome.faults if holds else "90% of log-probabilities differ by up to 3.00e+00" in outcome.faults[0]


@pytest.mark.parametrize(("share", "sets"), [(0.25, 1), (0.75, 5)])
def test_a_server_that_only_just_holds_is_asked_for_more(share, sets, on_gpus, monkeypatch):
    fives, shape = [on_gpus.prompts, *on_gpus.more_prompts], ROWS["tp4_kv2"].shape
    off = share * on_gpus.tolerance(shape, chosen_only=True).limit

    def change(prompt, steps):
        for step in steps if prompt == fives[0][1] else ():
            step[0] += off

    server = Answering([*on_gpus.of(shape)[2], *on_gpus.more(shape)[0]], change)
    monkeypatch.setattr(servers, "_started", lambda *_: contextlib.nullcontext(server))
    outcome = run_server(ROWS["tp4_kv2"], on_gpus)
    assert len(server.asked) == 3 * sets and not outcome.faults


def test_the_table_of_servers_says_how_stock_ends(monkeypatch):
    monkeypatch.setattr(proof, "hardware", lambda device: "two GPUs")
    monkeypatch.setattr(proof, "count_gpus", lambda: 2)
    right = Outcome(0.75, 0.03125, 0.125, 1234, 2.5, [])
    ours = dict.fromkeys(["tp2_kv8", "tp4_kv2", "tp4_dp2", "tp4_dp4", "tp16_kv8"], right)
    of_stock = {
        "tp2_kv8": right,
        "tp4_kv2": Outcome(1.75, 0.625, 0.125, 1234, 2.5, ["90% of log-probabilities differ by up to 6.25e-01"]),
        "tp4_dp2": Outcome.of_failure(["AttributeError: no `norm` | none", "the log"]),
        "tp4_dp4": Outcome.of_failure(["word " * 50]),
        "tp16_kv8": Outcome.of_failure(["a log-probability for '[7]' is not finite: [-0.5, None]"]),
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
        "tp16_kv8": "wrong: a log-probability is not finite",
    }


def test_a_run_of_stock_beside_ours_is_kept_and_goes_on(monkeypatch, tmp_path, capsys):
    """Whatever stock answers, the run holds if ours does."""
    right, wrong = (
        Outcome(0.75, 0.03125, 0.125, 1234, 2.5, []),
        Outcome.of_failure(["ValueError: heads", "the end of a log"]),
    )
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
    assert [one.faults for one in proof.read_kept(tmp_path / "kept").values()] == [[], [], *[["ValueError: heads"]] * 2]
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
            launchers.extend(server.launchers())
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
