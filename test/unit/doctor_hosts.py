"""What the tests of the doctor share: hosts to tell tales of, and the real command with the overlay at work."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil

from sglang_minimax.doctor import command
from sglang_minimax.doctor.facts import Devices, Engine, Facts, Gpu, Host, Ports, Torch
from sglang_minimax.doctor.finding import Finding
from sglang_minimax.overlay import ENGINE_VERSION

REPOSITORY = Path(__file__).parents[2]
GIB = 1 << 30

ENGINE = Engine(
    version=ENGINE_VERSION,
    places=["site-packages/sglang"],
    laid_over=True,
    finder_installed=True,
    python=[3, 12, 1],
    packages={
        "torch": "2.9.1+cu128",
        "triton": "3.5.1",
        "sglang-kernel": "0.4.1",
        "flashinfer-python": "0.6.7.post3",
        "flashinfer-cubin": "0.6.7.post3",
        "flashinfer-jit-cache": None,
        "nvidia-nccl-cu12": "2.27.5",
    },
    pins={
        "torch": "2.9.1",
        "sglang-kernel": "0.4.1",
        "flashinfer-python": "0.6.7.post3",
        "flashinfer-cubin": "0.6.7.post3",
        "openai": "2.6.1",
    },
    torch_pins={"nvidia-cublas-cu12": "12.8.4.1", "nvidia-nccl-cu12": "2.27.5"},
    kernel_files=["sm90", "sm100", "fa3"],
)
H200 = Gpu("NVIDIA H200", (9, 0))
B200 = Gpu("NVIDIA B200", (10, 0))
TORCH = Torch(
    version="2.9.1+cu128",
    cuda="12.8",
    driver_cuda=[12, 8],
    gpus=[H200] * 4,
    architectures=["sm_80", "sm_90", "sm_100"],
    nccl="2.27.5",
)
TORCH_WITHOUT_GPU = Torch(version="2.9.1+cu128", cuda="12.8", unavailable="Found no NVIDIA driver", nccl="2.27.5")
BROKEN_TORCH = Torch(failure="ImportError: libcudart.so.12: cannot open shared object file")
DEVICES = Devices(memory=[{"free": 139 * GIB, "total": 140 * GIB}] * 4, nvlink=True)
HOST = Host(False, "570.86.10", 4, None, 64 * GIB, 63 * GIB, "/usr/local/cuda/bin/nvcc")
CPU_HOST = Host(True, shared_memory_total=16 * GIB, shared_memory_free=15 * GIB)
PORTS = Ports(30000, "free", {30013: "free", **{port: "free" for port in range(30233, 30239)}}, 31000)

GPU_FACTS = Facts(ENGINE, TORCH, HOST, PORTS, DEVICES)
CPU_FACTS = Facts(ENGINE, TORCH_WITHOUT_GPU, CPU_HOST, PORTS)


def changed(whole: Facts, **parts) -> Facts:
    """``whole`` with some fields of its parts replaced: ``changed(GPU_FACTS, host={"driver": None})``."""
    return replace(whole, **{part: replace(getattr(whole, part), **fields) for part, fields in parts.items()})


def named(findings: list[Finding], name: str) -> Finding:
    (found,) = [one for one in findings if one.name == name]
    return found


def assert_is_read(mend: str) -> None:
    words = [word for word in shlex.split(mend) if not word.startswith("NCCL_")]
    if words[:3] == ["python", "-m", "sglang.launch_server"]:
        from sglang.srt.server_args import ServerArgs

        parser = argparse.ArgumentParser(exit_on_error=False)
        ServerArgs.add_cli_args(parser)
        parser.parse_args(words[3:])
    elif words[0] == "sglang-minimax":
        parser = argparse.ArgumentParser(exit_on_error=False)
        command.add_arguments(parser)
        parser.parse_args(words[2:])
    elif words[:3] == ["python", "-m", "compileall"]:
        assert words[3] == "-q" and len(words) > 4
    elif words[:3] == ["python", "-m", "pip"]:
        assert words[3] == "install" and words[-1] != "install"
    else:
        programs = {"sudo apt-get", "sudo mount", "nvidia-smi", "docker run", "export", "unset", "ss", "python -m uv"}
        assert any(mend.startswith(program) for program in programs), mend


def environment_with_overlay(folder: Path) -> dict[str, str]:
    """Variables with which a fresh Python has the overlay, also where the tests run without an install: ``folder`` then
    holds what the start-up line would do."""
    paths = [str(REPOSITORY / "python"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    plain = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    plain.pop("SGLANG_MINIMAX_OVERLAY", None)
    ask = "import sys; print(any(type(one).__name__ == 'EngineFinder' for one in sys.meta_path))"
    if subprocess.check_output([sys.executable, "-c", ask], env=plain, text=True).strip() == "True":
        return plain
    (folder / "sitecustomize.py").write_text("import sglang_minimax.overlay as overlay\noverlay.install()\n")
    return {**plain, "PYTHONPATH": f"{folder}{os.pathsep}{plain['PYTHONPATH']}"}


def doctor(environment: dict[str, str], *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "sglang_minimax", "doctor", *arguments]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=timeout)


def wait_until_gone(process_id: int) -> bool:
    deadline = time.monotonic() + 10
    while psutil.pid_exists(process_id) and psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
