"""What the demo promises: the widest layout that fits, no process left behind, and no wrong answer accepted."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from sglang_minimax import comparison, demo
from sglang_minimax.comparison import Answer
from sglang_minimax.demo_layouts import Host, Layout, ModelShape, choose_layouts, memory_needed_gb
from sglang_minimax.ports import free_port
from sglang_minimax.reference import Completion
from sglang_minimax.server_process import (
    Interrupted,
    Interrupts,
    Server,
    ServerError,
    SessionProcess,
    StartProgress,
)

SMALL = ModelShape(num_heads=16, num_kv_heads=8, num_experts=16, expert_width=256)
PUBLISHED = ModelShape(num_heads=48, num_kv_heads=8, num_experts=256, expert_width=1536)
ROOMY = Host(num_gpus=0, free_memory_gb=22.0)
FAKE_SERVER = Path(__file__).with_name("fake_server.py")
SCRIPT = Path(__file__).parents[2] / "scripts/demo.sh"


# ------------------------------------------------------------------------------------------------ layouts


def test_sixteen_ranks_on_a_cpu_with_memory_to_spare_then_dp_attention():
    plan = choose_layouts(ROOMY, SMALL)
    assert plan.layouts == [Layout(16, 1, None, False), Layout(16, 2, None, False)]
    assert plan.notes == []
    assert plan.layouts[0].flags() == ["--tp", "16", "--device", "cpu"]
    assert plan.layouts[1].flags() == ["--tp", "16", "--dp", "2", "--enable-dp-attention", "--device", "cpu"]


def test_less_memory_takes_the_widest_layout_that_fits_and_says_so():
    plan = choose_layouts(Host(0, memory_needed_gb(SMALL, 16) - 0.01), SMALL)
    assert plan.layouts[0].tp == 8  # 15 fit; 8 is the widest of them that divides 16 heads and 8 KV heads
    assert "TP8 is the widest" in plan.notes[0] and "TP16 needs" in plan.notes[0]
    assert choose_layouts(Host(0, memory_needed_gb(SMALL, 7)), SMALL).layouts[0].tp == 4


def test_weights_count_towards_the_memory():
    heavy = dataclasses.replace(SMALL, weights_gb=18.0)
    assert choose_layouts(ROOMY, heavy).layouts[0].tp == 8
    with pytest.raises(ValueError, match=r"30\.\d GB"):
        choose_layouts(ROOMY, dataclasses.replace(SMALL, weights_gb=28.0))


def test_memory_for_no_rank_is_an_error_with_both_numbers():
    with pytest.raises(ValueError, match=r"1\.0 GB of memory are free.*needs"):
        choose_layouts(Host(0, 1.0), SMALL)


@pytest.mark.parametrize(("num_gpus", "widest"), [(2, 2), (3, 2), (4, 4), (6, 4), (8, 8)])
def test_the_widest_layout_of_the_gpus(num_gpus, widest):
    plan = choose_layouts(Host(num_gpus, free_memory_gb=1.0), SMALL)
    assert [layout.tp for layout in plan.layouts] == [widest, widest]
    assert "--device" not in plan.layouts[0].flags()


def test_one_gpu_leaves_dp_attention_out_and_says_so():
    plan = choose_layouts(Host(1, 100.0), SMALL)
    assert plan.layouts == [Layout(1, 1, None, True)]
    assert "DP attention" in plan.notes[0]


def test_what_the_person_chose_is_taken():
    plan = choose_layouts(ROOMY, PUBLISHED, tp=8, dp=8, ep=4)
    assert plan.layouts == [Layout(8, 1, 4, False), Layout(8, 8, 4, False)]
    assert "--ep" in plan.layouts[1].flags()
    scarce = choose_layouts(Host(0, 3.0), SMALL, tp=16)
    assert scarce.layouts[0].tp == 16 and "as asked" in scarce.notes[0]


@pytest.mark.parametrize(
    ("chosen", "words"),
    [({"tp": 5}, "5"), ({"tp": 4, "dp": 3}, "--dp 3"), ({"tp": 4, "ep": 3}, "--ep 3"), ({"tp": 0}, "--tp 0")],
)
def test_an_impossible_choice_is_an_error_that_names_it(chosen, words):
    with pytest.raises(ValueError, match=words):
        choose_layouts(ROOMY, SMALL, **chosen)


def test_more_ranks_than_gpus_is_an_error():
    with pytest.raises(ValueError, match="this host has 4"):
        choose_layouts(Host(4, 100.0), SMALL, tp=8)


def test_a_quantised_or_foreign_checkpoint_is_refused(tmp_path):
    for config, words in (({"model_type": "llama"}, "llama"), ({"quantization_config": {"a": 1}}, "quantised")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "minimax_m2", **config}))
        with pytest.raises(demo.CannotRun, match=words):
            demo.read_model(tmp_path)
    with pytest.raises(demo.CannotRun, match=r"config\.json"):
        demo.read_model(tmp_path / "nowhere")


# --------------------------------------------------------------------------------------------- comparison

REFERENCE = Completion(
    prompt=[1],
    tokens=[7, 8, 9],
    logprobs=[-1.0, -0.5, -2.0],
    top=[[(7, -1.0), (3, -1.5)], [(8, -0.5), (4, -0.50001)], [(9, -2.0), (5, -3.0)]],
)
TEXTS = ["a", "b", "c"]


def compared(tokens=(7, 8, 9), logprobs=(-1.0, -0.5, -2.0), text="abc"):
    return comparison.compare(Answer("p", text, list(tokens), list(logprobs)), REFERENCE, TEXTS, "abc")


def test_the_same_answer_agrees():
    one = compared()
    assert one.largest == 0.0 and one.parted_at is None
    assert comparison.exact().accepts([one])
    assert comparison.exact().accepts([compared(text="abc\ufffd")])  # the first bytes of a character to come
    assert comparison.exact().accepts([compared(tokens=TEXTS)])  # an API that gives texts in place of ids


def test_a_log_probability_off_by_more_than_the_tolerance_does_not_agree():
    assert comparison.exact().accepts([compared(logprobs=(-1.0, -0.50009, -2.0))])
    off = compared(logprobs=(-1.0, -0.50011, -2.0))
    assert off.largest == pytest.approx(1.1e-4)
    assert not comparison.exact().accepts([compared(), off])


def test_another_token_or_text_does_not_agree_even_where_nearly_tied():
    assert not comparison.exact().accepts([compared(tokens=(7, 4, 9))])
    assert not comparison.exact().accepts([compared(tokens=["a", "x", "c"])])
    assert not comparison.exact().accepts([compared(text="abd")])


def test_after_the_ways_part_nothing_is_compared():
    one = compared(tokens=(7, 4, 1), logprobs=(-1.0, -0.5, -77.0))
    assert one.parted_at == 1 and one.differences == (0.0, pytest.approx(1e-5))
    assert compared(tokens=(3, 8, 9)).differences == (pytest.approx(0.5),)
    # Nearly tied in the reference, and so the server must find its own choice as likely.
    assert compared(tokens=(7, 4, 1), logprobs=(-1.0, -3.0, -77.0)).largest == 2.5


def test_nothing_compared_does_not_agree():
    assert not comparison.exact().accepts([])


def test_a_share_of_the_differences_is_at_most_the_limit():
    for count in range(1, 31):
        values = [((7 * i) % count) / 4 for i in range(count)]
        for share in (0.5, 0.9, 1.0):
            expected = min(value for value in values if sum(one <= value for one in values) >= share * count)
            assert comparison.quantile(values, share) == expected, (count, share)
    off_by_a_half = compared(logprobs=(-1.5, -0.5, -2.0))
    assert comparison.Tolerance(0.5, 1.0, "it is the limit").accepts([off_by_a_half])


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"tokens": (7, 8)}, "2 tokens"),
        ({"logprobs": (-1.0, -0.5)}, "2 log-probabilities"),
        ({"logprobs": (-1.0, math.nan, -2.0)}, "not finite"),
        ({"logprobs": (-1.0, None, -2.0)}, "not finite"),
    ],
)
def test_a_malformed_answer_is_an_error(answer, words):
    with pytest.raises(ValueError, match=words):
        compared(**answer)


def test_the_tolerance_for_rounding_comes_from_the_reference_and_still_sees_faults():
    precise = [dataclasses.replace(REFERENCE, tokens=[7] * 20, logprobs=[-1.0] * 20, top=[[(7, -1.0), (3, -4.0)]] * 20)]
    rounded = [dataclasses.replace(precise[0], logprobs=[-1.01] * 19 + [-3.0])]  # one choice of a router tipped over
    tolerance = comparison.from_rounding(precise, rounded, "bfloat16")
    assert tolerance.limit == pytest.approx(0.03)

    def answered(logprobs, tokens=None):
        answer = Answer("p", "abc", tokens or [7] * 20, logprobs)
        return comparison.compare(answer, precise[0], ["a"] * 20, "abc")

    assert tolerance.accepts([answered([-1.02] * 19 + [-2.5])])
    assert not tolerance.accepts([answered([-1.2] * 20)])
    assert not tolerance.accepts([answered([-4.0] * 20, [3] * 20)])


@pytest.mark.parametrize(
    ("tipped_over", "verdict", "within"), [(1, "agrees", "1.00e-02"), (5, "DOES NOT AGREE", "5.00e-01")]
)
def test_a_request_is_judged_by_all_its_answers(tipped_over, verdict, within, capsys, monkeypatch):
    """One of 25 may have met a near tie of the router."""
    monkeypatch.setattr(demo, "console", Console(width=200))
    answers = [compared(logprobs=(-1.5, -1.0, -2.5))] * tipped_over
    answers += [compared(logprobs=(-1.01, -0.51, -2.01))] * (25 - tipped_over)
    assert demo.report("a request", answers, comparison.Tolerance(0.03, 0.9, "measured")) == (tipped_over == 1)
    said = f"{verdict}: 90% of log-probabilities differ by at most {within}, where 0.03 is allowed; the largest"
    assert said in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- server


@pytest.fixture
def fake(tmp_path):
    """Starts fake servers: ``fake(*flags)`` gives a :class:`Server` that is stopped after the test."""
    started = []

    def start(*flags: str) -> Server:
        port, answers = free_port(), tmp_path / "answers.json"
        answers.write_text(json.dumps({"/generate": {"text": "hello"}}))
        command = [sys.executable, str(FAKE_SERVER), "--port", str(port), "--answers", str(answers), *flags]
        started.append(Server(command, tmp_path / "server.log", port=port))
        return started[-1]

    yield start
    for server in started:
        server.stop()


def test_every_process_is_gone_after_stop_orphans_too(fake):
    server, seen = fake("--ranks", "4"), []
    server.wait_until_ready(60, seen.append)
    deadline = time.monotonic() + 20
    while len(members := server.members()) != 5:  # four ranks, once their parents are gone, and the server
        assert time.monotonic() < deadline, [process.cmdline() for process in members]
        time.sleep(0.1)
    server.stop()
    assert server.members() == []
    assert not [process for process in members if is_alive(process)]
    assert {(one.tp_rank, one.stage) for one in seen} == {
        (rank, stage) for rank in range(4) for stage in ("started", "connected", "loaded")
    }


def test_processes_that_ignore_sigterm_are_gone_too(fake, monkeypatch):
    monkeypatch.setattr("sglang_minimax.server_process._GRACE_SECONDS", 1.0)
    server = fake("--stubborn")
    server.wait_until_ready(60, lambda _: None)
    members = server.members()
    server.stop()
    assert members and not [process for process in members if is_alive(process)]


def test_nothing_that_was_not_started_here_is_ended(fake):
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as bystander:
        server = fake()
        server.wait_until_ready(60, lambda _: None)
        assert bystander.pid not in [process.pid for process in server.members()]
        server.stop()
        assert bystander.poll() is None
        bystander.kill()


def test_a_server_that_dies_is_reported_with_its_last_lines(fake):
    with pytest.raises(ServerError, match="a reason that a person must see"):
        fake("--die").wait_until_ready(60, lambda _: None)


def test_an_error_of_the_server_is_an_error_here(fake):
    server = fake()
    server.wait_until_ready(60, lambda _: None)
    assert server.post("/generate", {"text": "x"}, timeout_seconds=10) == {"text": "hello"}
    with pytest.raises(ServerError, match="400"):
        server.post("/v1/completions", {}, timeout_seconds=10)
    server.stop()
    with pytest.raises(ServerError, match="no answer"):
        server.post("/generate", {}, timeout_seconds=10)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("line", "rank", "stage"),
    [
        ("[2026-01-31 12:00:00 TP3] Init torch distributed begin.", 3, "started"),
        ("[2026-01-31 12:00:00 DP1 TP12 EP4] Load weight end. elapsed=1 s", 12, "loaded"),
        ("[2026-01-31 12:00:00] Load weight begin. avail mem=1 GB", 0, "connected"),
        ("shards:   0% | 0/1 [00:00<?, ?it/s][2026-01-31 12:00:00 DP0 TP6] Load weight end. e=1", 6, "loaded"),
    ],
)
def test_progress_is_read_from_the_log(line, rank, stage):
    progress = StartProgress()
    reached = progress.read(line)
    assert (reached.tp_rank, reached.stage, reached.reached) == (rank, stage, 1)
    assert progress.read(line) is None  # said once
    assert progress.read("[2026-01-31 12:00:00 TP3] Capture cuda graph begin.") is None


def test_a_command_has_the_environment_that_it_was_given_and_its_own_exit_code(tmp_path, monkeypatch):
    monkeypatch.setenv("GIVEN", "to this process")
    code = "import os, sys; print(os.environ['GIVEN']); sys.exit(7)"
    with SessionProcess([sys.executable, "-c", code], tmp_path / "log", environment={"GIVEN": "to it"}) as command:
        assert command.wait(60) == 7
    assert (tmp_path / "log").read_text() == "to it\n"


def test_a_line_of_the_log_is_read_once_it_is_whole(tmp_path):
    """A rank's line may be written in two goes, and half of it says nothing of its progress."""
    with SessionProcess([sys.executable, "-c", ""], tmp_path / "log") as command:
        command.wait(60)
        for written, read in ((b"one\ntw", ["one"]), (b"", []), (b"o\n", ["two"])):
            with open(tmp_path / "log", "ab") as log:
                log.write(written)
            assert list(command.new_lines()) == read


# ------------------------------------------------------------------------------------------------ signals

INTERRUPTED_RUN = """
import sys
from pathlib import Path
from sglang_minimax.demo import running
from sglang_minimax.server_process import Interrupted, Interrupts, Server
port, log, command = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
try:
    with Interrupts() as interrupts, running(interrupts, lambda: Server(command, log, port=port)) as server:
        server.wait_until_ready(60, lambda _: None)
        print(*(process.pid for process in server.members()), flush=True)
        while True:
            server.post("/generate", {}, timeout_seconds=10)
except Interrupted as interruption:
    sys.exit(interruption.exit_code)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_every_process_is_gone_after_a_signal(tmp_path, signum):
    port, answers = free_port(), tmp_path / "answers.json"
    answers.write_text(json.dumps({"/generate": {}}))
    server = [sys.executable, str(FAKE_SERVER), "--port", str(port), "--answers", str(answers)]
    command = [sys.executable, "-c", INTERRUPTED_RUN, str(port), str(tmp_path / "log"), *server]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        members = [psutil.Process(int(pid)) for pid in run.stdout.readline().split()]
        assert len(members) == 3
        run.send_signal(signum)
        assert run.wait(60) == 128 + signum
    assert not [process for process in members if is_alive(process)]


def test_a_signal_during_a_deferred_block_comes_at_its_end():
    finished = False
    with Interrupts() as interrupts, pytest.raises(Interrupted) as raised, interrupts.deferred():
        with interrupts.deferred():  # as a clean-up within a clean-up, which is not at its end with this one
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        finished = True
    assert finished and raised.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_call_for_help_installs_nothing(tmp_path):
    """Beside the copy there is no environment.sh that could."""
    copy = shutil.copy(SCRIPT, tmp_path)
    command = ["bash", copy, "--tp", "4", "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "--model-path CHECKPOINT" in said.stdout and not said.stderr
