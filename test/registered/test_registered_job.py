"""The registered 8-GPU job: executed on CPU ranks, its skips, and its flags through the engine's own parser."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_minimax.checkpoints import SmallModel, write_checkpoint
from sglang_minimax.cpu_host import has_no_accelerator
from sglang_minimax.ports import free_port
from sglang_minimax.server_process import SessionProcess

JOB = Path(__file__).parent / "8-gpu-models" / "test_minimax_m25.py"


def environment(**variables: str) -> dict[str, str]:
    """For a run of the job: the engine's helpers start `sglang` and `python3` from the path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {"PATH": path, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **variables}


@pytest.fixture
def job(monkeypatch):
    """The job's module, as for a person who set nothing."""
    for name in ("MODEL", "HEAD", "NODE_RANK"):
        monkeypatch.delenv(f"MINIMAX_M2_{name}", raising=False)
    spec = importlib.util.spec_from_file_location("registered_job", JOB)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_in_the_engines_nightly_8_gpu_suite():
    from sglang.test.ci.ci_register import HWBackend, collect_tests

    [entry] = collect_tests([str(JOB)])
    assert (entry.backend, entry.suite, entry.nightly) == (HWBackend.CUDA, "nightly-8-gpu-common", True)
    assert entry.disabled is None


@pytest.mark.skipif(not has_no_accelerator(), reason="this host has an accelerator")
def test_on_cpu_ranks_it_answers_as_transformers(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", SmallModel(num_hidden_layers=2))
    variables = environment(MINIMAX_M2_MODEL=str(checkpoint), PYTHONUNBUFFERED="1")
    work = tmp_path / "work"
    work.mkdir()
    command = ["env", "-C", str(work), sys.executable, str(JOB)]
    with SessionProcess(command, tmp_path / "log", environment=variables) as process:
        code = process.wait(540)
    log = (tmp_path / "log").read_text(errors="replace")
    assert code == 0, log[-4000:]
    compared = re.findall(r"^(\S+): answers as transformers, largest difference (\S+) nats", log, re.MULTILINE)
    assert [variant for variant, _ in compared] == ["TP8+EP8", "TP8+DP8+EP8"]
    assert all(0 < float(difference) <= 1e-4 for _, difference in compared)
    assert re.search(r"Ran 3 tests in .*\n\nOK \(skipped=2\)", log), "the variants for GPUs are skipped, no other"
    assert list(work.glob("results_*TP8+EP8*.json")) and list(work.glob("performance_profiles_minimax_m25/*"))


@pytest.mark.skipif(not has_no_accelerator(), reason="this host has an accelerator")
def test_on_cpu_ranks_its_two_nodes_answer_as_transformers(tmp_path):
    """Both on this host: test/layouts/test_two_hosts.py has two."""
    shape = SmallModel(num_hidden_layers=2, num_attention_heads=48, num_key_value_heads=8, head_dim=32)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", shape)
    variables = environment(
        MINIMAX_M2_MODEL=str(checkpoint), MINIMAX_M2_HEAD=f"127.0.0.1:{free_port()}",
        GLOO_SOCKET_IFNAME="lo", PYTHONUNBUFFERED="1",
    )  # fmt: skip
    logs = [tmp_path / f"node{rank}.log" for rank in range(2)]
    with contextlib.ExitStack() as running:
        nodes = [
            running.enter_context(
                SessionProcess([sys.executable, str(JOB)], log, environment=variables | {"MINIMAX_M2_NODE_RANK": rank})
            )
            for rank, log in zip("01", logs, strict=True)
        ]
        codes = [node.wait(300) for node in nodes]
    texts = [log.read_text(errors="replace") for log in logs]
    assert codes == [0, 0], "\n".join(text[-4000:] for text in texts)
    [difference] = re.findall(r"^TP16: answers as transformers, largest difference (\S+) nats", texts[0], re.MULTILINE)
    assert 0 < float(difference) <= 1e-4
    for text in texts:
        assert re.search(r"Ran 3 tests in .*\n\nOK \(skipped=2\)", text), "the variants of one node are skipped"


@pytest.mark.skipif(not has_no_accelerator(), reason="this host has an accelerator")
def test_without_gpus_it_says_what_it_lacks_and_skips(tmp_path):
    run = subprocess.run(
        [sys.executable, str(JOB), "-v"],
        env=os.environ | environment(MINIMAX_M2_MODEL="MiniMaxAI/MiniMax-M2.5"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0 and "OK (skipped=3)" in run.stderr, run.stderr
    assert "8 GPUs are needed for MiniMaxAI/MiniMax-M2.5, and this host has 0" in run.stderr
    assert "MINIMAX_M2_HEAD" in run.stderr and "sglang_minimax.checkpoints" in run.stderr


def test_gsm8k_gets_all_that_the_engines_evaluation_reads(job, monkeypatch):
    from sglang.test import run_eval, simple_eval_gsm8k

    class Read(Exception):
        """All arguments of the evaluation were there."""

    def evaluate(**arguments):
        raise Read(arguments)

    monkeypatch.setattr(simple_eval_gsm8k, "GSM8KEval", evaluate)
    with pytest.raises(Read, match="'num_examples': None, 'num_threads': 1024"):
        run_eval.run_eval(job.gsm8k_arguments("http://127.0.0.1:1"))


@pytest.mark.parametrize(("num_gpus", "lacks"), [(0, True), (4, True), (7, True), (8, False)])
def test_it_counts_the_gpus(job, monkeypatch, num_gpus, lacks):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    lacking = job.what_is_lacking()
    assert (lacking is not None) == lacks
    assert not lacks or f"this host has {num_gpus}" in lacking


def test_a_large_checkpoint_does_not_run_on_cpu_ranks(job, monkeypatch, tmp_path):
    monkeypatch.setattr(job, "MODEL", str(tmp_path))
    weights = tmp_path / "model.safetensors"
    for size, fits in ((10**6, has_no_accelerator()), (2 * 10**9, False)):
        with open(weights, "wb") as stream:
            stream.truncate(size)
        assert job.runs_on_cpu() == fits


def test_on_8_gpus_it_measures_both_variants_with_flags_that_the_engine_takes(job, monkeypatch):
    import sglang.test.run_combined_tests as engine
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    calls = []
    monkeypatch.setattr(engine, "run_combined_tests", lambda **options: calls.append(options))
    result = job.unittest.TestResult()
    job.TestOneNode("test_on_gpus").run(result)
    assert result.wasSuccessful() and not result.skipped, (result.errors, result.skipped)
    [options] = calls
    assert options["accuracy_params"].dataset == "gsm8k"
    assert options["accuracy_params"].baseline_accuracy == job.GSM8K_FLOOR
    assert options["performance_params"].batch_sizes and options["performance_params"].profile_dir
    layouts = {settings.variant: parsed(settings) for settings in options["models"]}
    assert layouts == {"TP8+EP8": (8, 8, 1, False, 1), "TP8+DP8+EP8": (8, 8, 8, True, 1)}


def test_tp16_takes_two_nodes(job):
    [(variant, flags)] = job.TWO_NODES.items()
    settings = job.launch_settings(variant, [*flags, "--node-rank", "1", "--dist-init-addr", "10.0.0.1:20000"])
    assert parsed(settings) == (16, 1, 1, False, 2)


def parsed(settings) -> tuple[int, int, int, bool, int]:
    """TP, EP, DP, DP attention and nodes, as the engine's command line reads a variant's flags."""
    import argparse

    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    options = parser.parse_args(["--model-path", settings.model_path, *settings.extra_args])
    return (
        options.tensor_parallel_size,
        options.expert_parallel_size,
        options.data_parallel_size,
        options.enable_dp_attention,
        options.nnodes,
    )
