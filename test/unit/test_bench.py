"""``sglang-minimax bench``: a fake engine's whole steps, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sglang_minimax.bench import contestants, model_steps, operators, plots, record, tables
from sglang_minimax.bench.record import CannotBench
from sglang_minimax.checkpoints import SmallModel, published_config
from sglang_minimax.cli import main

FAKE = Path(__file__).parent / "fake_engine"
NO_OURS = ["--env", f"ours:PYTHONPATH={FAKE}"]  # nothing is laid over a fake engine, so ours is left out
HOST = {"identity": "a" * 16, "gpus": [], "cpu": "a processor", "cores": 2}


@pytest.fixture
def model(tmp_path) -> Path:
    """A folder with nothing but a config: no weights, no tokenizer."""
    folder = tmp_path / "m2-small"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(published_config(SmallModel())))
    return folder


def bench(model: Path, *words: str) -> int:
    arguments = ["bench", "--model", str(model), "--batch-sizes", "1", "16", "--output-len", "8", *words]
    return main([*arguments, "--logs", str(model.parent / "logs")])


# ---------------------------------------------------------------------------------------------- whole runs


def test_contestants_are_measured_in_their_own_environments(model, tmp_path, capsys):
    """Ours cannot be laid over a fake engine, so it is one that fails; the others go on."""
    out = tmp_path / "out.json"
    environments = f"stock={FAKE},peer={FAKE}:{tmp_path}"
    code = bench(
        model, "--compare", environments, "--env", "MS=20", "--env", "peer:MS=10", *NO_OURS,
        "--extra=--grammar-backend none", "--extra", "peer:--attention-backend triton", "--json", str(out),
        "--repeats", "2",
    )  # fmt: skip
    assert code == 1, "ours was not measured"
    written = record.read(out)
    assert list(written["contestants"]) == ["ours", "stock", "peer"]
    stock, peer = (written["contestants"][name] for name in ("stock", "peer"))
    assert stock["versions"]["sglang"] == "0.5.99" and stock["versions"]["python"].startswith("3.")
    assert [len(run["batches"]["16 x 128"]["decode_ms"]) for run in peer["runs"]] == [7, 7], (
        "the warm-up is not counted"
    )
    assert peer["runs"][0]["batches"]["1 x 128"]["prefill_ms"] == pytest.approx([30])
    assert "--attention-backend triton" in peer["command"] and "--attention-backend" not in stock["command"]
    assert all("--grammar-backend none" in one["command"] for one in (stock, peer))
    assert str(tmp_path) not in out.read_text(), "a record holds no folders of the host"
    assert "ours" in written["contestants"] and "not laid over" in written["contestants"]["ours"]["error"]

    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    row = next(row for row in rows if row[:3] == ["16", "128", "peer"])
    assert row[3:] == ["10.00", "(9.00", "to", "10.75)", "2.00", "30.00", "(30.00", "to", "30.00)", "2.00"]
    assert any(row[:3] == ["1", "128", "ours"] and "not laid over" in " ".join(row) for row in rows)


def test_a_contestant_that_fails_keeps_what_it_measured_and_ends_at_once(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(model_steps, "_GRACE_SECONDS", 0.5)
    started = time.monotonic()
    bench(model, "--compare", f"stock={FAKE}", "--env", "FAILS_AT=16", *NO_OURS, "--json", str(tmp_path / "out.json"))
    assert time.monotonic() - started < 60, "the rank that waits for the dead ones was waited for"
    (run,) = record.read(tmp_path / "out.json")["contestants"]["stock"]["runs"]
    assert list(run["batches"]) == ["1 x 128"]
    assert run["error"] == "RuntimeError: Push buffer is too small"
    lines = [line.split(maxsplit=3) for line in capsys.readouterr().out.splitlines()]
    assert ["16", "128", "stock", "RuntimeError: Push buffer is too small"] in lines


def test_a_contestant_that_hangs_is_ended(model, tmp_path):
    out = tmp_path / "out.json"
    bench(model, "--compare", f"stock={FAKE}", "--env", "HANGS=1", *NO_OURS, "--json", str(out), "--timeout", "3")
    (run,) = record.read(out)["contestants"]["stock"]["runs"]
    assert "no end after 3 s (--timeout)" in run["error"] and run["batches"] == {}
    assert "Warmup" in (tmp_path / "logs/stock.0.log").read_text()


def test_a_batch_that_the_cache_cannot_hold_says_so(model, tmp_path):
    out = tmp_path / "out.json"
    bench(model, "--compare", f"stock={FAKE}", "--env", "SKIPS=16 x 128", *NO_OURS, "--json", str(out))
    (run,) = record.read(out)["contestants"]["stock"]["runs"]
    assert "--max-total-tokens" in run["error"] and list(run["batches"]) == ["1 x 128"]


def test_each_batch_size_meets_each_context(model, tmp_path, capsys):
    """A line of the tool's log names the batch size at most, so a batch that is left out must not shift the others.

    Of three rounds the first is a warm-up.
    """
    out = tmp_path / "out.json"
    words = ["--rounds", "3", "--input-len", "8", "24", "16", "--json", str(out)]
    words += ["--env", "COMPILES=500", "--env", "SKIPS=1 x 24", "--env", "MS=10"]
    assert bench(model, "--compare", f"stock={FAKE}", *words, *NO_OURS) == 1, "one was left out"
    (run,) = record.read(out)["contestants"]["stock"]["runs"]
    prefills = {shape: batch["prefill_ms"] for shape, batch in run["batches"].items()}
    expected = {"1 x 8": 30, "1 x 16": 60, "16 x 8": 30, "16 x 24": 90, "16 x 16": 60}
    assert list(prefills) == list(expected)
    assert all(prefills[shape] == pytest.approx([ms, ms]) for shape, ms in expected.items())
    assert [len(batch["decode_ms"]) for batch in run["batches"].values()] == [14] * len(expected)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    stock = [row for row in rows if row[2:3] == ["stock"]]
    assert [row[:2] for row in stock] == [[size, tokens] for size in ("1", "16") for tokens in ("8", "16", "24")]
    assert "--max-total-tokens" in stock[2] and stock[5][3] == "10.00"


def test_side_by_side_all_load_before_one_is_measured(model, tmp_path):
    """And on one core, the same for all. One that never is ready is ended first, and has its error."""
    out, entered = tmp_path / "out.json", tmp_path / "entered"
    environments = f"stock={FAKE},peer={FAKE}:{tmp_path},late={FAKE}:{tmp_path}:{tmp_path}"
    words = ["--env", f"ENTERS={entered}", "--env", "stock:MS=20", "--env", "peer:MS=10", "--env", "late:MS=5"]
    words += ["--env", "late:HANGS=1", "--side-by-side", "--timeout", "8", "--json", str(out)]
    assert bench(model, "--compare", environments, *words, *NO_OURS) == 1
    lines = entered.read_text().splitlines()
    warm, measured = lines[:6], lines[6:]
    cores = sorted(os.sched_getaffinity(0))
    one = cores[-1:] if len(cores) >= 2 else cores
    assert sorted(warm) == sorted(f"{ms} {what} on {cores}" for ms in (20, 10, 5) for what in ("loads", "measures"))
    assert measured == [f"20 measures on {one}"] * 2 + [f"10 measures on {one}"] * 2
    found = record.read(out)
    assert found["side_by_side"] and "turns.py" in found["contestants"]["peer"]["command"]
    runs = {name: one["runs"] for name, one in found["contestants"].items()}
    assert [list(runs[name][0]["batches"]) for name in ("stock", "peer")] == [["1 x 128", "16 x 128"]] * 2
    assert "no end after 8 s" in runs["late"][0]["error"] and runs["late"][0]["batches"] == {}


def test_ending_the_benchmark_ends_what_it_started(model, tmp_path):
    words = ["--model", str(model), "--compare", f"stock={FAKE}", "--env", "HANGS=1", *NO_OURS, "--logs", str(tmp_path)]
    with subprocess.Popen([sys.executable, "-m", "sglang_minimax", "bench", *words], stderr=subprocess.PIPE) as process:
        log = tmp_path / "stock.0.log"
        deadline = time.monotonic() + 60
        while not (log.exists() and "Warmup" in log.read_text()):
            assert time.monotonic() < deadline and process.poll() is None, "the fake engine did not start"
            time.sleep(0.1)
        children = psutil.Process(process.pid).children()
        process.terminate()
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert children and not any(child.is_running() for child in children)


# --------------------------------------------------------------------------------------------------- model


def test_the_copy_of_a_model_has_fewer_layers_and_a_tokenizer(model, tmp_path):
    (model / "model.safetensors").write_bytes(b"weights")
    told = model_steps.prepare_model(model, tmp_path / "copy", num_layers=2)
    config = json.loads((tmp_path / "copy/config.json").read_text())
    assert config["num_hidden_layers"] == 2 and config["vocab_size"] == model_steps.SMALLEST_VOCABULARY
    assert told["name"] == "m2-small" and told["changes"][0] == "2 of 3 layers" and "10000" in told["changes"][1]
    assert (tmp_path / "copy/tokenizer.json").exists()
    assert not (tmp_path / "copy/model.safetensors").exists()
    assert json.loads((model / "config.json").read_text())["num_hidden_layers"] == 3, "the original is left alone"


def test_the_copy_of_a_model_has_the_shards_of_a_wider_tp(model, tmp_path):
    whole = json.loads((model / "config.json").read_text())
    told = model_steps.prepare_model(model, tmp_path / "copy", num_layers=None, part_of=2)
    half = json.loads((tmp_path / "copy/config.json").read_text())
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        assert half[name] * 2 == whole[name]
    for name in ("hidden_size", "head_dim", "num_local_experts", "num_experts_per_tok"):
        assert half[name] == whole[name]
    assert told["changes"][0] == "heads, experts' width and vocabulary divided by 2"


def test_a_models_own_tokenizer_is_taken(model, tmp_path):
    (model / "tokenizer.json").write_text("its own")
    model_steps.prepare_model(model, tmp_path / "copy", num_layers=None)
    assert (tmp_path / "copy/tokenizer.json").read_text() == "its own"


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--compare", "peer"], "--compare peer needs an environment"),
        (["--compare", "peer=/no/such"], "/no/such is not a folder"),
        (["--compare", f"ours={FAKE}"], "ours is this environment"),
        (["--env", "peer:A=1"], "peer is not measured here, only ours"),
        (["--env", "A"], "must be VARIABLE=VALUE"),
        (["--extra", "triton"], 'must be "--flag value ..."'),
        (["--num-layers", "9"], "--num-layers 9 must be from 1 to the model's 3"),
        (["--part-of", "3"], "--part-of 3 must divide num_attention_heads"),
        (["--part-of", "0"], "--part-of 0 must divide num_attention_heads"),
        (["--repeats", "0"], "--repeats 0 must be at least 1"),
        (["--output-len", "1"], "--output-len 1 must be at least 2"),
        (["--batch-sizes", "4", "4"], "--batch-sizes 4 4 must differ"),
        (["--input-len", "8", "0"], "--input-len 8 0 must differ and be at least 1"),
    ],
)
def test_a_question_that_cannot_be_answered(model, words, says, capsys):
    assert bench(model, *words) == 2
    assert says in capsys.readouterr().err


def test_a_model_without_a_config(tmp_path, capsys):
    assert bench(tmp_path) == 2
    assert "must be a folder with a config.json" in capsys.readouterr().err


def write(path: Path, flags: str = "", **changes) -> Path:
    batches = {"1 x 8": {"prefill_ms": [20.0], "decode_ms": [5.0, 5.4]}}
    run = {"seconds": 1, "error": None, "batches": batches, "clocks_before": [], "clocks_after": []}
    ours = {"versions": {"sglang": "1"}, "error": None, "variables": {}, "runs": [run], "command": f"bench {flags}"}
    found = {
        "format": 3, "kind": "model", "time": "now", "host": HOST, "model": {"name": "m2", "changes": []},
        "layout": "--tp 1", "batch_sizes": [1], "input_lens": [8], "output_len": 3, "contestants": {"ours": ours},
    }  # fmt: skip
    record.write({**found, **changes}, path)
    return path


def test_records_of_different_hosts_are_not_compared(tmp_path, capsys):
    other = {"identity": "b" * 16, "gpus": [{"name": "NVIDIA H200", "driver_version": "580"}], "cpu": "", "cores": 1}
    first, second = write(tmp_path / "a.json"), write(tmp_path / "b.json", host=other)
    assert main(["bench", "--show", str(first), str(second)]) == 2
    said = capsys.readouterr().err
    assert "a" * 16 in said and "b" * 16 in said and "1 x NVIDIA H200" in said and "--compare" in said


def test_records_of_other_work_are_not_compared(tmp_path, capsys):
    first, second = write(tmp_path / "a.json"), write(tmp_path / "b.json", input_lens=[128])
    assert main(["bench", "--show", str(first), str(second)]) == 2
    assert "input_lens is [8] in a.json and [128] in b.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rounds": 1}, "rounds is None in a.json and 1 in b.json"),
        ({"device": "cpu"}, "device is None in a.json and 'cpu' in b.json"),
        ({"flags": "--tp 4 --dp 4 --enable-dp-attention"}, "ours of a.json: 1, ours of b.json: 4"),
    ],
)
def test_records_of_other_rounds_devices_and_requests_a_batch_are_not_compared(changes, said, tmp_path, capsys):
    first, second = write(tmp_path / "a.json"), write(tmp_path / "b.json", **changes)
    assert main(["bench", "--show", str(first), str(second)]) == 2
    assert said in capsys.readouterr().err


def test_the_flags_of_each_engine_are_shown(tmp_path, capsys):
    assert main(["bench", "--show", str(write(tmp_path / "a.json", flags="--disable-cuda-graph"))]) == 0
    assert "bench --disable-cuda-graph" in capsys.readouterr().out


def test_records_of_one_host_stand_side_by_side(tmp_path, capsys):
    first, second = write(tmp_path / "a.json"), write(tmp_path / "b.json", layout="--tp 2")
    assert main(["bench", "--show", str(first), str(second)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("1      8          ours (a.json)  5.20 (5.10 to 5.30)") for line in lines)
    assert any(line.startswith("b.json: m2, dummy weights; --tp 2") for line in lines)
    assert any(line.startswith("1      8          ours (b.json)") and "same" in line for line in lines)


def test_a_file_that_is_no_record(tmp_path, capsys):
    (tmp_path / "a.json").write_text("[]")
    assert main(["bench", "--show", str(tmp_path / "a.json")]) == 2
    assert "is no record of format 3" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- spread and host


def test_a_difference_under_the_spread_is_the_same():
    wide = tables.Measured.of_runs([[9.0, 10.0, 11.0, 12.0]])
    assert tables.ratio(wide, tables.Measured.of_runs([[9.8, 9.9]])) == "same"
    assert tables.ratio(wide, tables.Measured.of_runs([[4.9, 5.1]])) == "2.10"
    assert tables.ratio(wide, "RuntimeError") == "-"


def test_the_spread_takes_in_what_differs_between_runs():
    """Steps of a run are alike, and the next run is slower as a whole: the quartiles alone would not cover it."""
    measured = tables.Measured.of_runs([[10.0] * 9, [12.0]])
    assert (measured.median, measured.low, measured.high) == (10.0, 10.0, 12.0)


def test_one_sample_has_no_spread():
    one = tables.Measured.of_runs([[10.0]])
    assert str(one) == "10.00" and tables.ratio(one, one) == "1.00 (1 run)"


def test_gpus_are_named_by_a_hash(monkeypatch, tmp_path):
    row = "GPU-1234, NVIDIA H200, 580.1, 143771, 1980, 3201, 700.00"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{row}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    host = record.host_facts()
    assert "GPU-1234" not in json.dumps(host) and len(host["identity"]) == 16
    assert record.describe_host(host) == "1 x NVIDIA H200, driver 580.1"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{row.replace('1234', '5678')}'\n")
    assert record.host_facts()["identity"] != host["identity"]


def test_clocks_before_and_after():
    samples = [[{"clocks.sm": "345", "clocks.mem": "3201"}], [{"clocks.sm": "1980", "clocks.mem": "3201"}]]
    assert record.describe_clocks(samples) == "SM clock 345 to 1980 MHz, memory clock 3201 to 3201 MHz"
    assert record.describe_clocks([[], []]) == "no GPU clocks"


# ---------------------------------------------------------------------------------------------- environments


def test_a_checkout_on_pythonpath_gets_the_overlay(tmp_path):
    """No start-up line runs for a folder on PYTHONPATH, and without one ours would be stock under another name."""
    python = str(Path(contestants.__file__).parents[2])
    bare = contestants.Contestant("ours", path=python, overlay=True)
    ready, found = contestants.inspect(bare, tmp_path / "hook")
    assert found["overlay"], "the child would not be laid over"
    assert ready.path.split(os.pathsep)[-1] == python


def test_stock_is_without_the_overlay(tmp_path):
    stock = contestants.parse("stock", [], [])[1]
    _, found = contestants.inspect(stock, tmp_path / "hook")
    assert not found["overlay"] and found["versions"]["torch"] and found["versions"]["triton"]


def test_a_virtual_environment_is_known_by_its_python(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    peer = contestants.parse(f"peer={tmp_path}", [], [])[1]
    assert peer.python == str(tmp_path / "bin/python") and peer.path == ""


def test_an_environment_without_an_engine(tmp_path):
    with pytest.raises(CannotBench, match="no engine"):
        contestants.inspect(contestants.Contestant("peer", python=_bare_python(tmp_path), path=""), tmp_path)


def _bare_python(tmp_path: Path) -> str:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    return str(tmp_path / "venv/bin/python")


# -------------------------------------------------------------------------------------- operators and plots


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A checkout whose script writes what it was asked, and this package lying outside any."""
    monkeypatch.setattr(operators, "__file__", str(tmp_path / "a/b/c/operators.py"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmark").mkdir()
    script = "import json, sys\nprint('tokens ours')\njson.dump(sys.argv[1:-2], open(sys.argv[-1], 'w'))\n"
    for name in operators.SCRIPTS.values():
        (tmp_path / "benchmark" / name).write_text(script)
    return tmp_path


def test_an_operators_script_gets_the_engines_to_compare(checkout, capsys):
    words = ["--op", "qk-norm", "--compare", f"stock,peer={FAKE}:{checkout}", "--extra=--tokens 1 4"]
    assert main(["bench", *words, "--json", "out.json"]) == 0
    written = record.read(checkout / "out.json")
    stock = written["results"][1].split(os.pathsep)
    assert written["results"] == [
        "--stock",
        os.pathsep.join(stock),
        "--peer",
        f"{FAKE}:{checkout}",
        "--tokens",
        "1",
        "4",
    ]
    assert written["host"]["identity"] and written["versions"]["sglang"] == "0.5.10.post1"
    assert "tokens ours" in capsys.readouterr().out
    assert main(["bench", "--show", "out.json"]) == 0
    assert "tokens ours" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["router", "--compare", "stock"], "its script has the engine's way in it"),
        (["qk-norm", "--compare", f"other={FAKE}"], "only with stock and peer"),
    ],
)
def test_an_engine_that_an_operators_script_does_not_know(checkout, words, says, capsys):
    assert main(["bench", "--op", *words]) == 2
    assert says in capsys.readouterr().err


def test_an_operators_script_that_fails(checkout, capsys):
    (checkout / "benchmark/router.py").write_text("raise RuntimeError('no such kernel')\n")
    assert main(["bench", "--op", "router"]) == 2
    assert "RuntimeError: no such kernel" in capsys.readouterr().err


def test_an_operator_without_a_checkout(checkout, monkeypatch, capsys):
    monkeypatch.chdir("/")
    (checkout / "benchmark").rename(checkout / "elsewhere")
    assert main(["bench", "--op", "router"]) == 2
    assert "benchmark/router.py of a checkout, which is not in the wheel" in capsys.readouterr().err


def test_every_operators_script_is_there():
    for name in operators.SCRIPTS:
        assert operators.find_script(name).parent.name == "benchmark"


def test_plots_without_matplotlib_say_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "--show", str(write(tmp_path / "a.json")), "--plots", str(tmp_path)]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sizes", "contexts", "panels", "marks"),
    [
        ([1], [8], 1, "bars"),
        ([1, 2, 4, 8, 16], [8], 1, "lines"),
        ([1, 64], [512, 4096], 2, "lines"),
    ],
)
def test_whole_steps_are_drawn(tmp_path, monkeypatch, sizes, contexts, panels, marks):
    """Bars or lines of every contestant, as high as what was measured, and a file that is a PNG."""
    batches = {
        f"{size} x {context}": {"prefill_ms": [1.0], "decode_ms": [size + context / 1000]}
        for size in sizes
        for context in contexts
    }
    run = {"seconds": 1, "error": None, "batches": batches, "clocks_before": [], "clocks_after": []}
    one = {"versions": {"sglang": "1"}, "error": None, "variables": {}, "runs": [run]}
    contestants = {"ours": one, "stock": one, "peer": {**one, "runs": [], "error": "no engine"}}
    found = write(tmp_path / "a.json", batch_sizes=sizes, input_lens=contexts, contestants=contestants)
    figures = []
    plt = plots.check_matplotlib()
    monkeypatch.setattr(plt, "close", figures.append)
    assert main(["bench", "--show", str(found), "--plots", str(tmp_path)]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    assert len(figure.axes) == panels
    assert figure.axes[0].get_legend_handles_labels()[1] == ["ours", "stock"]
    for axes, size in zip(figure.axes, sizes, strict=False):
        if marks == "bars":
            assert [bar.get_height() for bar in axes.patches] == [1.008, 1.008]
        elif panels == 1:
            assert [list(line.get_ydata()) for line in axes.lines[:2]] == [[size + 0.008 for size in sizes]] * 2
        else:
            assert list(axes.lines[0].get_xdata()) == contexts
            assert list(axes.lines[0].get_ydata()) == [size + context / 1000 for context in contexts]


def test_sizes_that_fit_one_context_share_a_panel(tmp_path, monkeypatch):
    steps = {(1, 512): 2.0, (1, 4096): 4.0, (64, 512): 8.0, (256, 512): 16.0}
    batches = {f"{size} x {context}": {"prefill_ms": [1.0], "decode_ms": [ms]} for (size, context), ms in steps.items()}
    run = {"seconds": 1, "error": None, "batches": batches, "clocks_before": [], "clocks_after": []}
    contestants = {"ours": {"versions": {"sglang": "1"}, "error": None, "variables": {}, "runs": [run]}}
    found = write(tmp_path / "a.json", batch_sizes=[1, 64, 256], input_lens=[512, 4096], contestants=contestants)
    figures = []
    monkeypatch.setattr(plots.check_matplotlib(), "close", figures.append)
    assert main(["bench", "--show", str(found), "--plots", str(tmp_path)]) == 0
    over_sizes, over_contexts = (axes.lines[0] for axes in figures[0].axes)
    assert list(over_sizes.get_xdata()) == [1, 64, 256] and list(over_sizes.get_ydata()) == [2, 8, 16]
    assert list(over_contexts.get_xdata()) == [512, 4096] and list(over_contexts.get_ydata()) == [2, 4]


@pytest.mark.parametrize(
    ("results", "plot"),
    [
        ("qk_norm_rope_2_h200", "qk_norm_rope_2_h200"),
        ("steps_tp4_62_layers_h200", "steps_tp4_62_layers_h200"),
        ("steps_tp4_16_layers_four_engines_h200", "steps_tp4_16_layers_h200"),
    ],
)
def test_the_plots_in_the_docs_are_of_the_results(tmp_path, results, plot):
    repository = Path(__file__).parents[2]
    found = json.loads((repository / f"benchmark/results/{results}.json").read_text())
    plots.draw(found, tmp_path / "drawn.png")
    size = slice(16, 24)  # width and height in a PNG's header; pixels depend on the fonts and on matplotlib's version
    kept = (repository / f"docs/{plot}.png").read_bytes()
    assert (tmp_path / "drawn.png").read_bytes()[size] == kept[size]


# ------------------------------------------------------------------------------------------------- for real


def test_whole_steps_on_this_machine(model, tmp_path, capsys, monkeypatch):
    """The engine's own tool, on the CPU, with the overlay: the benchmark keeps working."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    out = tmp_path / "out.json"
    code = bench(
        model, "--device", "cpu", "--layout", "--tp 1", "--num-layers", "1", "--input-len", "8", "--json", str(out),
        "--timeout", "120",
    )  # fmt: skip
    written = record.read(out)
    ours = written["contestants"]["ours"]
    assert code == 0, ours["runs"][0]["error"]
    assert ours["overlay"] and ours["versions"]["sglang"] == "0.5.10.post1"
    for size in (1, 16):
        batch = ours["runs"][0]["batches"][f"{size} x 8"]
        assert len(batch["decode_ms"]) == 7 and min(batch["prefill_ms"]) > 0 and min(batch["decode_ms"]) > 0
    said = capsys.readouterr().out
    assert "1 of 3 layers" in said and "sglang 0.5.10.post1" in said
    assert [line.split()[:3] for line in said.splitlines() if line[:1].isdigit()] == [
        ["1", "8", "ours"],
        ["16", "8", "ours"],
    ]
