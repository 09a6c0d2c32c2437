"""The doctor: what it finds out about this host, and the real command."""

from __future__ import annotations

import compileall
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from unit.doctor_hosts import (
    GPU_FACTS,
    REPOSITORY,
    changed,
    doctor,
    environment_with_overlay,
    named,
    wait_until_gone,
)

from sglang_minimax import cli, cpu_host
from sglang_minimax.doctor import checks, command, facts, finding, probe, rank, self_check
from sglang_minimax.doctor.finding import Finding
from sglang_minimax.overlay import ENGINE_VERSION
from sglang_minimax.ports import free_port

# ------------------------------------------------------------------------------------------------ the facts


def test_a_port_that_someone_listens_on_is_taken_and_another_is_suggested():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        ports = facts.look_at_ports(port)
    assert ports.state == "taken"
    assert ports.suggestion is not None and ports.suggestion != port
    assert facts.port_state(0) == facts.port_state(65536) == "impossible"


def test_the_further_ports_are_the_engines():
    from sglang.srt import server_args

    arguments = SimpleNamespace(
        nccl_port=None, tokenizer_worker_num=1, enable_dp_attention=True, nnodes=1, dist_init_addr=None, port=20000
    )
    made = server_args.PortArgs.init_new(arguments)
    names = (
        "tokenizer_ipc_name",
        "scheduler_input_ipc_name",
        "detokenizer_ipc_name",
        "rpc_ipc_name",
        "metrics_ipc_name",
    )
    taken = {int(getattr(made, name).rsplit(":", 1)[1]) - 20000 for name in names}
    derived = {server_args.ZMQ_TCP_PORT_DELTA, server_args.DP_ATTENTION_HANDSHAKE_PORT_DELTA}
    assert taken | derived == set(facts.DP_ATTENTION_PORT_OFFSETS)


def test_gpus_on_the_pci_bus_are_counted_and_nothing_else(tmp_path):
    kinds = [("0x10de", "0x030200"), ("0x10de", "0x030000"), ("0x10de", "0x068000"), ("0x8086", "0x030000")]
    for number, (vendor, kind) in enumerate(kinds):  # two GPUs, an NVSwitch, another vendor's
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "vendor").write_text(vendor + "\n")
        (tmp_path / str(number) / "class").write_text(kind + "\n")
    (tmp_path / "unreadable").mkdir()
    assert facts._count_pci_gpus(tmp_path) == 2


def test_pins_are_the_engines_exact_versions():
    pins = probe._pins("sglang")
    assert {"torch", "transformers", "sglang-kernel", "flashinfer-python", "flashinfer-cubin"} <= pins.keys()
    assert pins["torch"] == torch.__version__.partition("+")[0]
    assert probe._pins("no-such-package") == {}


def test_a_package_whose_bytecode_is_neither_there_nor_may_be_written_is_found(tmp_path, monkeypatch):
    package = tmp_path / "some_large_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert probe._folder_without_bytecode("some_large_package") is None, "the first process may write it"
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert probe._folder_without_bytecode("some_large_package") == str(package)
    compileall.compile_dir(package, quiet=1)
    assert probe._folder_without_bytecode("some_large_package") is None
    assert probe._folder_without_bytecode("no_such_package") is None


# ---------------------------------------------------------------------------------------- the real command


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    return environment_with_overlay(tmp_path_factory.mktemp("hook"))


needs_cpu_host = pytest.mark.skipif(not cpu_host.has_no_accelerator(), reason="this host has an accelerator")


@needs_cpu_host
def test_the_command_checks_this_host_and_all_its_ranks(environment):
    done = doctor(environment, "--json", "--port", str(free_port()))
    assert done.stderr == ""
    answer = json.loads(done.stdout)
    by_name = {one["name"]: one for one in answer["findings"]}
    assert by_name["engine"]["status"] == by_name["overlay"]["status"] == by_name["torch"]["status"] == "ok"
    assert by_name["QK norm path"]["status"] == by_name["QK norm self-check"]["status"] == "ok", by_name
    assert by_name["GPUs"]["status"] == "not applicable" and "production" in by_name["GPUs"]["what"]
    assert done.returncode == answer["exit_code"] == finding.EXIT_CODES[answer["status"]]
    statuses = [one["status"] for one in answer["findings"]]
    assert answer["status"] == max(statuses, key=lambda status: finding.EXIT_CODES[status])
    assert [one["rank"] for one in answer["ranks"]] == [0, 1]
    for one in answer["ranks"]:
        assert one["failure"] is None and one["stage"] == "compared" and 0 < one["worst"] <= 1
        compared = {(row["operation"], row["kv_heads"], row["dtype"], row["tokens"]) for row in one["results"]}
        operations = ("norm_qk", "QKNormRope", "its KV store")
        assert compared == {
            (operation, kv_heads, dtype, tokens)
            for operation in operations
            for kv_heads in (8, 1)
            for dtype in rank.DTYPES["cpu"]
            for tokens in rank.TOKENS["cpu"]
        }


def test_a_switched_off_overlay_is_a_warning_and_stock_is_not_judged(environment):
    done = doctor({**environment, "SGLANG_MINIMAX_OVERLAY": "0"}, "--json")
    by_name = {one["name"]: one for one in json.loads(done.stdout)["findings"]}
    assert by_name["overlay"]["status"] == "warning"
    assert by_name["overlay"]["mend"] == "unset SGLANG_MINIMAX_OVERLAY"
    assert by_name["QK norm self-check"]["status"] == "not applicable"
    assert done.returncode >= 1


def shadowed(environment: dict[str, str], folder: Path, files: dict[str, str]) -> dict[str, str]:
    """The environment with packages of these files in front of the installed ones."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    first, *rest = environment["PYTHONPATH"].split(os.pathsep)
    return {**environment, "PYTHONPATH": os.pathsep.join([first, str(folder), *rest])}


def test_another_engine_version_is_an_error_on_one_line_each(environment, tmp_path):
    fake = {"sglang/__init__.py": "", "sglang/_version.py": "__version__ = '0.5.11'\n"}
    done = doctor(shadowed(environment, tmp_path, fake))
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
    lines = {line[16:].split("  ")[0].strip(): line for line in done.stdout.splitlines()}
    assert lines["engine"].startswith("error") and "sglang 0.5.11" in lines["engine"]
    assert lines["engine"].endswith(f"-> python -m pip install sglang=={ENGINE_VERSION}")
    assert lines["overlay"].startswith("error") and lines["QK norm self-check"].startswith("not applicable")
    assert done.stdout.rstrip().endswith("error, exit code 2")


def test_a_torch_that_cannot_be_imported_is_a_finding_and_no_traceback(environment, tmp_path):
    broken = {"torch/__init__.py": "raise ImportError('libtorch_cuda.so: undefined symbol: ncclCommWindow')"}
    done = doctor(shadowed(environment, tmp_path, broken), "--json")
    assert done.returncode == 2 and done.stderr == ""
    found = named([Finding(**one) for one in json.loads(done.stdout)["findings"]], "torch")
    assert found.status == "error" and "undefined symbol: ncclCommWindow" in found.what


def test_a_torch_that_hangs_is_given_up(environment, tmp_path):
    hanging = {"torch/__init__.py": "import time\ntime.sleep(600)"}
    done = doctor(shadowed(environment, tmp_path, hanging), "--json", "--timeout", "5", timeout=60)
    found = named([Finding(**one) for one in json.loads(done.stdout)["findings"]], "torch")
    assert done.returncode == 2 and "it did not end in time" in found.what


def test_a_terminated_doctor_leaves_no_child_behind(environment, tmp_path):
    write_id = f"open({str(tmp_path / 'id')!r}, 'w').write(str(os.getpid()))"
    hanging = {"torch/__init__.py": f"import os, time\n{write_id}\ntime.sleep(600)"}
    words = [sys.executable, "-m", "sglang_minimax", "doctor", "--json"]
    with subprocess.Popen(words, env=shadowed(environment, tmp_path, hanging), stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "id").exists() or not (tmp_path / "id").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert wait_until_gone(int((tmp_path / "id").read_text()))


def test_help_says_what_the_exit_code_means(capsys):
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--help"])
    said = capsys.readouterr().out
    assert "0 ok, 1 a warning, 2 an error" in said and "--port" in said and "--timeout" in said


@pytest.mark.parametrize("value", ["0", "-3", "nan", "soon"])
def test_a_time_limit_that_cannot_be_is_refused(value):
    with pytest.raises(SystemExit) as refused:
        cli.main(["doctor", "--timeout", value])
    assert refused.value.code == 2


def test_the_commands_own_process_imports_neither_torch_nor_the_engine():
    ask = (
        "import sys, sglang_minimax.cli\n"
        "print(sorted({'torch', 'sglang', 'triton', 'psutil', 'rich'} & sys.modules.keys()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "python")}
    assert subprocess.check_output([sys.executable, "-c", ask], env=environment, text=True).strip() == "[]"


def test_json_holds_the_same_lines_as_the_screen(capsys):
    findings = checks.all_checks(changed(GPU_FACTS, ports={"state": "taken"}))
    checked = self_check.SelfCheck([])
    data = json.loads(json.dumps(command.as_data(findings, checked, GPU_FACTS)))
    assert [Finding(**one) for one in data["findings"]] == findings
    assert data["status"] == "error" and data["exit_code"] == 2
    assert data["facts"]["torch"]["gpus"][0] == {"name": "NVIDIA H200", "capability": [9, 0]}
    command.show(findings, 2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(findings) + 2
    for one, line in zip(findings, lines, strict=False):
        assert line.startswith(one.status) and one.what in line and (one.mend or "") in line


def test_findings_are_plain_data():
    one = Finding("a", "ok", "b")
    assert dataclasses.asdict(one) == {"name": "a", "status": "ok", "what": "b", "mend": None}
