"""Triton's compiler on a host without a GPU: what a launch would run, through ptxas, and what it takes of a GPU."""

from __future__ import annotations

import contextlib
import inspect
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"
REGISTERS_OF_SM = 65536
# Compute capability: bytes of shared memory of a multiprocessor, of which one CTA may have all but RESERVED and every
# CTA takes RESERVED more. CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SHARED_OF_SM = {80: 164 << 10, 89: 100 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}
RESERVED = 1 << 10


class Kernel(NamedTuple):
    """A compiled kernel: bytes of shared memory of a CTA; registers, and bytes spilled from them, of a thread."""

    name: str
    capability: int
    threads: int
    shared: int
    registers: int
    spilled: int
    cubin: Path

    def ctas_of_sm(self) -> int:
        """How many fit on a multiprocessor; 0: the GPU refuses the launch."""
        by_registers = REGISTERS_OF_SM // (self.threads * -(-self.registers // 8) * 8)
        return min(SHARED_OF_SM[self.capability] // (self.shared + RESERVED), by_registers, 2048 // self.threads)

    def loops(self) -> list[list[str]]:
        """The instructions of each loop, by name, in their order: HMMA multiplies, LDG loads, LDGSTS copies to shared
        memory."""
        found = subprocess.run([BINARIES / "nvdisasm", "-c", self.cubin], capture_output=True, text=True, check=True)
        names, begins, loops = [], {}, []
        for line in found.stdout.splitlines():
            if label := re.match(r"\.(L_x_\d+):", line):
                begins[label[1]] = len(names)
            elif instruction := re.search(r"\*/ +(?:@!?U?P\w+ +)?([A-Z]\w*)", line):
                names.append(instruction[1])
                back = re.search(r"BRA `\(\.(L_x_\d+)\)", line)
                if back and back[1] in begins:
                    loops.append(names[begins[back[1]] :])
        return loops


class _Driver:
    """A GPU that can be compiled for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def __getattr__(self, name: str):
        raise AssertionError(f"nothing is launched here, and {name} was asked for")

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextlib.contextmanager
def compiling_for(capability: int, monkeypatch) -> Iterator[list[Kernel]]:
    """Launches compile for such a GPU, and do nothing else. Yields what was compiled, once for each launch."""
    run, compiled = inspect.unwrap(JITFunction.run), []

    def compile_only(self, *args, grid, warmup, **options):
        binary = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append(_taken(self.fn.__name__, capability, binary))
        return binary

    with monkeypatch.context() as patch:
        patch.setattr(driver, "_active", _Driver(capability))
        patch.setattr(JITFunction, "run", compile_only)
        yield compiled


def _taken(name: str, capability: int, binary) -> Kernel:
    cubin = Path(binary.metadata_group[f"{binary.metadata.name}.cubin"])
    found = subprocess.run(
        [BINARIES / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", found)}
    threads = 32 * binary.metadata.num_warps
    return Kernel(name, capability, threads, binary.metadata.shared, used["REG"], used["STACK"], cubin)


def meta(*size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")
