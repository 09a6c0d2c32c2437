"""What is so on this host and in this environment: gathered here, judged in :mod:`sglang_minimax.doctor.checks`."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from sglang_minimax import cpu_host
from sglang_minimax.doctor import child

PortState = Literal["free", "taken", "not allowed", "impossible"]

# What the engine (0.5.10.post1) adds to --port under DP attention: a handshake with the other nodes, the start of the
# ranks, the detokenizer, RPC, metrics, the controller. Its other ports are ones that the system says are free.
DP_ATTENTION_PORT_OFFSETS = (13, *range(233, 239))

_NVIDIA = "0x10de"  # the PCI vendor
_DISPLAY_CONTROLLER = "0x03"  # the PCI class that GPUs have, 3D controllers without a screen too


@dataclass(frozen=True)
class Engine:
    """The engine and the overlay, as a fresh Python process of this environment finds them.

    version: what the overlay goes by; None where there is no engine. laid_over: whether our folder is in front.
    finder_installed: whether the start-up line ran. switched_off: by ``SGLANG_MINIMAX_OVERLAY=0``.
    packages: installed versions by name. pins, torch_pins: the exact versions that the engine and torch ask for.
    kernel_files: which of ``sm90``, ``sm100`` and ``fa3`` the engine's kernel library has.
    without_bytecode: folders of packages that every process compiles anew, since their bytecode is not kept.
    writes_no_bytecode: ``PYTHONDONTWRITEBYTECODE`` is set, or ``python -B`` was called.
    failure: why nothing else here is known.
    """

    version: str | None = None
    places: list[str] = field(default_factory=list)
    laid_over: bool = False
    finder_installed: bool = False
    switched_off: bool = False
    python: list[int] = field(default_factory=list)
    packages: dict[str, str | None] = field(default_factory=dict)
    pins: dict[str, str] = field(default_factory=dict)
    torch_pins: dict[str, str] = field(default_factory=dict)
    kernel_files: list[str] = field(default_factory=list)
    without_bytecode: list[str] = field(default_factory=list)
    writes_no_bytecode: bool = False
    failure: str | None = None

    def pin(self, package: str) -> str:
        """``package==version`` as the engine wants it, or the bare name: what is given to pip."""
        return f"{package}=={self.pins[package]}" if package in self.pins else package


@dataclass(frozen=True)
class Gpu:
    """One GPU as torch sees it. capability: (major, minor)."""

    name: str
    capability: tuple[int, int]


@dataclass(frozen=True)
class Torch:
    """torch, and what it sees of the driver.

    cuda: the CUDA version it was built for. driver_cuda: the newest one that the driver supports.
    unavailable: what torch says where it was built for GPUs and sees none. architectures: what its kernels are
    compiled for, as ``sm_90`` or ``compute_90``. nccl: the version that is loaded.
    """

    version: str = ""
    cuda: str | None = None
    hip: str | None = None
    driver_cuda: list[int] | None = None
    unavailable: str | None = None
    gpus: list[Gpu] = field(default_factory=list)
    architectures: list[str] = field(default_factory=list)
    nccl: str | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Devices:
    """The GPUs at work. memory: ``free`` and ``total`` bytes of each. Pairs are (from, to).

    wrong_copies: pairs whose copy arrived with other values. nvlink: between every pair; None is not known.
    """

    memory: list[dict[str, int]] = field(default_factory=list)
    no_access: list[list[int]] = field(default_factory=list)
    wrong_copies: list[list[int]] = field(default_factory=list)
    nvlink: bool | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Host:
    """What the operating system says. Shared memory is in bytes, None where /dev/shm is no file system.

    pci_gpus: NVIDIA GPUs on the PCI bus, whether or not this container may use them.
    nvcc: the CUDA compiler that kernels would be compiled with at run time.
    """

    has_no_accelerator: bool
    driver: str | None = None
    pci_gpus: int = 0
    visible_devices: str | None = None
    shared_memory_total: int | None = None
    shared_memory_free: int | None = None
    nvcc: str | None = None


@dataclass(frozen=True)
class Ports:
    """``port`` is the server's, ``further`` what DP attention adds; all of these are free for ``suggestion``."""

    port: int
    state: PortState
    further: dict[int, PortState]
    suggestion: int | None


@dataclass(frozen=True)
class Facts:
    """All of it. An import is None where it was not tried, and else empty or why it failed."""

    engine: Engine
    torch: Torch
    host: Host
    ports: Ports
    devices: Devices | None = None
    kernels_failure: str | None = None
    flashinfer_failure: str | None = None


def gather(port: int, timeout_seconds: float) -> Facts:
    """Looks at everything but QK norm. Every child process has ``timeout_seconds``."""
    host, ports = look_at_host(), look_at_ports(port)
    engine_data, torch_data = _probe(["engine", "torch"], timeout_seconds)
    engine, torch = _engine(engine_data), _torch(torch_data)
    if not torch.gpus:
        return Facts(engine, torch, host, ports)
    devices, kernels, flashinfer = _probe(["devices", "kernels", "flashinfer"], timeout_seconds)
    return Facts(
        engine,
        torch,
        host,
        ports,
        devices=_filled(Devices, devices),
        kernels_failure=kernels.get("failure"),
        flashinfer_failure=flashinfer.get("failure"),
    )


def _probe(parts: Sequence[str], timeout_seconds: float) -> list[dict[str, Any]]:
    """What each part of :mod:`sglang_minimax.doctor.probe` printed; ``failure`` alone where it did not get there."""
    commands = [child.python("sglang_minimax.doctor.probe", part) for part in parts]
    answers = []
    for ended in child.run_together(commands, timeout_seconds):
        # Libraries may print at their end, so the answer need not be the last line.
        line = next((line for line in reversed(ended.stdout.splitlines()) if line.startswith("{")), None)
        failure = ended.failure or (None if line else "it printed no answer")
        answers.append({"failure": failure} if failure or line is None else json.loads(line))
    return answers


def _engine(data: dict[str, Any]) -> Engine:
    return _filled(Engine, data)


def _torch(data: dict[str, Any]) -> Torch:
    gpus = [Gpu(gpu["name"], (gpu["capability"][0], gpu["capability"][1])) for gpu in data.get("gpus", [])]
    return _filled(Torch, {**data, "gpus": gpus})


_T = TypeVar("_T", Engine, Torch, Devices)


def _filled(kind: type[_T], data: dict[str, Any]) -> _T:
    known = {one.name for one in fields(kind)}
    assert known >= data.keys(), f"{kind.__name__} has no fields {sorted(data.keys() - known)}"
    return kind(**data)


# ------------------------------------------------------------------------------------------------ the host


def look_at_host() -> Host:
    """What needs neither torch nor a child process, but for ``nvidia-smi``, which only reads."""
    total, free = _shared_memory()
    return Host(
        has_no_accelerator=cpu_host.has_no_accelerator(),
        driver=_driver_version(),
        pci_gpus=_count_pci_gpus(Path("/sys/bus/pci/devices")),
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        shared_memory_total=total,
        shared_memory_free=free,
        nvcc=_find_nvcc(),
    )


def _shared_memory() -> tuple[int | None, int | None]:
    try:
        usage = os.statvfs("/dev/shm")
    except OSError:
        return None, None
    return usage.f_blocks * usage.f_frsize, usage.f_bavail * usage.f_frsize


def _driver_version() -> str | None:
    with contextlib.suppress(OSError):
        match = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", Path("/proc/driver/nvidia/version").read_text())
        if match:
            return match[1]
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = answer.stdout.split()
    return lines[0] if answer.returncode == 0 and lines else None


def _count_pci_gpus(devices: Path) -> int:
    count = 0
    for device in devices.glob("*"):
        with contextlib.suppress(OSError):
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
            count += vendor == _NVIDIA and kind.startswith(_DISPLAY_CONTROLLER)
    return count


def _find_nvcc() -> str | None:
    """Where FlashInfer and the engine's own kernels look for it."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    on_the_path = shutil.which("nvcc")
    candidates = [os.environ.get("FLASHINFER_NVCC"), on_the_path, *(f"{one}/bin/nvcc" for one in folders if one)]
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


# ----------------------------------------------------------------------------------------------- the ports


def look_at_ports(port: int) -> Ports:
    """The server's port and those that it derives from it, on all interfaces."""
    further = {port + offset: port_state(port + offset) for offset in DP_ATTENTION_PORT_OFFSETS}
    return Ports(port, port_state(port), further, _suggestion(port))


def _suggestion(port: int) -> int | None:
    """The next port above, in steps of 1000, that is free with all that follow from it."""
    candidates: list[int] = [*range(max(port, 9000) + 1000, 64000, 1000), *range(30000, 64000, 1000)]
    for candidate in candidates:
        if all(port_state(candidate + offset) == "free" for offset in (0, *DP_ATTENTION_PORT_OFFSETS)):
            return candidate
    return None


def port_state(port: int) -> PortState:
    """Whether a server may listen on ``port``; a port whose last connections still fade counts as free."""
    if not 0 < port < 65536:
        return "impossible"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return "not allowed" if error.errno in (errno.EACCES, errno.EPERM) else "taken"
    return "free"
