"""Looks at one part of the environment and prints what it sees as one line of JSON: ``python -m ... PART``.

Each part runs in a process of its own, started like a server's: what makes one of them fail leaves the others.
The keys are the fields of the dataclass of the same name in :mod:`sglang_minimax.doctor.facts`.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import os
import re
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "xgrammar",
    "sglang-kernel",
    "flashinfer-python",
    "flashinfer-cubin",
    "flashinfer-jit-cache",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)
LARGE_PACKAGES = ("sglang", "torch", "transformers")  # whose modules take long to compile
KERNEL_FILES = {
    "sm90": "sm90/common_ops.",
    "sm100": "sm100/common_ops.",
    "fa3": "flash_ops.",
}
_COPIED_VALUES = 1 << 18


def probe_engine() -> dict[str, Any]:
    """Imports neither the engine nor torch: finding a package is not importing it."""
    from sglang_minimax import overlay

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the overlay warns of another version, which is about to be said
        spec = importlib.util.find_spec("sglang")
    # Without the engine the folder of a checkout is found as a namespace package, which has no origin.
    places = list(spec.submodule_search_locations or []) if spec is not None and spec.origin is not None else []
    of_the_engine = [place for place in places if place != overlay.folder()]
    return {
        "version": overlay.engine_version(of_the_engine) if of_the_engine else None,
        "places": of_the_engine,
        "laid_over": bool(places) and places[0] == overlay.folder(),
        "finder_installed": any(isinstance(finder, overlay.EngineFinder) for finder in sys.meta_path),
        "switched_off": os.environ.get("SGLANG_MINIMAX_OVERLAY", "1") == "0",
        "python": list(sys.version_info[:3]),
        "packages": {name: _version(name) for name in PACKAGES},
        "pins": _pins("sglang"),
        "torch_pins": _pins("torch"),
        "kernel_files": _kernel_files(),
        "without_bytecode": [folder for name in LARGE_PACKAGES if (folder := _folder_without_bytecode(name))],
        "writes_no_bytecode": sys.dont_write_bytecode,
    }


def _folder_without_bytecode(package: str) -> str | None:
    """The package's folder, if its bytecode is not there and no process may write it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    folder, cached = os.path.dirname(spec.origin), importlib.util.cache_from_source(spec.origin)
    if os.path.exists(cached) or (os.access(folder, os.W_OK) and not sys.dont_write_bytecode):
        return None
    return folder


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _pins(package: str) -> dict[str, str]:
    """The exact versions that a package asks for, extras and other platforms left out."""
    try:
        required = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return {}
    pins = {}
    for requirement in required:
        what, _, condition = requirement.partition(";")
        match = re.fullmatch(r"\s*([\w.-]+)\s*\(?==\s*([\w.+!]+)\)?\s*", what)
        if match and "extra" not in condition and "aarch64" not in condition:
            pins[re.sub(r"[-_.]+", "-", match[1]).lower()] = match[2]
    return pins


def _kernel_files() -> list[str]:
    """Which of ``KERNEL_FILES`` the engine's kernel library has."""
    spec = importlib.util.find_spec("sgl_kernel")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    found = []
    for name, beginning in KERNEL_FILES.items():
        parent, _, stem = beginning.rpartition("/")
        for folder in (os.path.join(folder, parent) for folder in folders):
            if os.path.isdir(folder) and any(file.startswith(stem) and ".so" in file for file in os.listdir(folder)):
                found.append(name)
                break
    return found


def probe_torch() -> dict[str, Any]:
    """Imports torch and asks the driver, without starting work on a GPU."""
    import torch

    gpus = []
    unavailable = None
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append({"name": properties.name, "capability": [properties.major, properties.minor]})
    elif torch.version.cuda is not None or torch.version.hip is not None:
        try:
            torch.cuda.init()
        except Exception as error:
            unavailable = str(error).strip().splitlines()[0]
    has_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "driver_cuda": _driver_cuda(),
        "unavailable": unavailable,
        "gpus": gpus,
        "architectures": torch.cuda.get_arch_list(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else None,
    }


def _driver_cuda() -> list[int] | None:
    """Major and minor of the newest CUDA that the driver's library supports."""
    import ctypes

    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return [version.value // 1000, version.value % 1000 // 10]


def probe_devices() -> dict[str, Any]:
    """Uses every GPU: its memory, and a copy to each other one, whose values are then compared."""
    import torch

    memory, no_access, wrong_copies = [], [], []
    count = torch.cuda.device_count()
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        memory.append({"free": free, "total": total})
    for source, target in itertools.permutations(range(count), 2):
        if not torch.cuda.can_device_access_peer(source, target):
            no_access.append([source, target])
        values = torch.arange(_COPIED_VALUES, device=f"cuda:{source}") * (source + 1)
        copy = values.to(f"cuda:{target}")
        torch.cuda.synchronize(source)
        torch.cuda.synchronize(target)
        if not torch.equal(copy.cpu(), torch.arange(_COPIED_VALUES) * (source + 1)):
            wrong_copies.append([source, target])
    return {"memory": memory, "no_access": no_access, "wrong_copies": wrong_copies, "nvlink": _nvlink(count)}


def _nvlink(count: int) -> bool | None:
    """Whether NVLink joins every pair, asked of NVML; None where NVML, or its Python module, is missing."""
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        handles = [
            pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}".encode())
            for index in range(count)
        ]
        return all(
            pynvml.nvmlDeviceGetP2PStatus(one, other, pynvml.NVML_P2P_CAPS_INDEX_NVLINK) == pynvml.NVML_P2P_STATUS_OK
            for one, other in itertools.combinations(handles, 2)
        )
    except Exception:  # NVML's own errors, and what is missing of it: there is only one thing to say of them
        return None


def probe_kernels() -> dict[str, Any]:
    """Imports the engine's kernel library, which loads the file for this GPU."""
    importlib.import_module("sgl_kernel")
    return {}


def probe_flashinfer() -> dict[str, Any]:
    """Imports FlashInfer with the part that the fused all-reduce is in."""
    importlib.import_module("flashinfer.comm")
    return {}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "engine": probe_engine,
    "torch": probe_torch,
    "devices": probe_devices,
    "kernels": probe_kernels,
    "flashinfer": probe_flashinfer,
}

if __name__ == "__main__":
    print("\n" + json.dumps(PARTS[sys.argv[1]]()), flush=True)
