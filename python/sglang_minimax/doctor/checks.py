"""One function a check: from facts to one finding. Nothing is looked up here, so that a test can tell any tale."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from sglang_minimax.doctor.facts import Devices, Engine, Facts, Gpu, Host, Ports, Torch
from sglang_minimax.doctor.finding import Finding, Status
from sglang_minimax.overlay import ENGINE_VERSION

GIB = 1 << 30
MIB = 1 << 20

INSTALL_ENGINE = f"python -m pip install sglang=={ENGINE_VERSION}"
NO_GPU = (
    "none: ranks run on the CPU over gloo, for tests with small models in float32 or bfloat16; no CUDA graphs, and not "
    "a speed for production"
)
SUPPORTED_PYTHON = ((3, 10), (3, 12))

# What NVIDIA advises for NCCL in a container (--shm-size=1g); below the second even the engine's own broadcast queue
# of 24 MiB a TP group is at risk beside it. 64 MiB is what a container gets if nothing is said.
SHARED_MEMORY_ENOUGH = 1 * GIB
SHARED_MEMORY_LEAST = 64 * MIB

_BUSY_SHARE = 0.1  # of a GPU's memory that others hold: the engine's default leaves about as much beside its pools
# The first branch for CUDA 13, and newer than any CUDA 12 asks for. Blackwell takes the open kernel modules alone.
_DRIVER_PACKAGE = "nvidia-driver-580-server-open"


def all_checks(facts: Facts) -> list[Finding]:
    """Every check but those of QK norm, in the order of the report."""
    engine, torch, host, ports = facts.engine, facts.torch, facts.host, facts.ports
    return [
        check_engine(engine),
        check_overlay(engine),
        check_python(engine),
        check_bytecode(engine),
        check_torch(torch, engine),
        check_pins(engine),
        check_driver(host, torch, engine),
        check_gpus(host, torch, facts.devices),
        check_architecture(torch, engine),
        check_peers(torch, facts.devices),
        check_nccl(torch, engine),
        check_kernels(torch, engine, facts.kernels_failure),
        check_flashinfer(torch, engine, facts.flashinfer_failure),
        check_compiler(torch, host, engine),
        check_shared_memory(host),
        check_port(ports),
        check_further_ports(ports),
    ]


# ------------------------------------------------------------------------------------ engine and packages


def check_engine(engine: Engine) -> Finding:
    name = "engine"
    if engine.failure:
        what = f"a fresh Python process of this environment cannot look for it: {engine.failure}"
        return Finding(name, "error", what, "python -m pip install .")
    if engine.version is None:
        return Finding(name, "error", "sglang is not installed in this environment", INSTALL_ENGINE)
    if engine.version != ENGINE_VERSION:
        what = f"sglang {engine.version}, and the overlay is for {ENGINE_VERSION} alone"
        return Finding(name, "error", what, INSTALL_ENGINE)
    return Finding(name, "ok", f"sglang {engine.version} in {engine.places[0]}")


def check_overlay(engine: Engine) -> Finding:
    name = "overlay"
    if engine.version is None:
        return Finding(name, "not applicable", "there is no engine to lay it over")
    if engine.laid_over:
        return Finding(name, "ok", "active: a fresh Python process takes the model from sglang-minimax")
    stock = "MiniMax-M2 runs on the stock model, wrongly above 8 attention-TP ranks and not at all under DP attention"
    if engine.switched_off:
        what = f"switched off by SGLANG_MINIMAX_OVERLAY=0: {stock}"
        return Finding(name, "warning", what, "unset SGLANG_MINIMAX_OVERLAY")
    if engine.version != ENGINE_VERSION:
        return Finding(name, "error", f"not active over sglang {engine.version}: {stock}", INSTALL_ENGINE)
    cause = "its start-up line ran, and its folder is not in front" if engine.finder_installed else (
        "its start-up line did not run when Python started"
    )  # fmt: skip
    return Finding(
        name, "error", f"not active: {cause}; {stock}", "python -m pip install --force-reinstall --no-deps ."
    )


def check_python(engine: Engine) -> Finding:
    name = "Python"
    if not engine.python:
        return Finding(name, "not applicable", "not known without the environment's packages")
    version = ".".join(map(str, engine.python))
    oldest, newest = (".".join(map(str, one)) for one in SUPPORTED_PYTHON)
    if SUPPORTED_PYTHON[0] <= tuple(engine.python[:2]) <= SUPPORTED_PYTHON[1]:
        return Finding(name, "ok", version)
    what = f"{version}, and {oldest} to {newest} are what was tested"
    return Finding(name, "warning", what, f"python -m uv venv --python {newest}")


def check_bytecode(engine: Engine) -> Finding:
    name = "bytecode"
    if not engine.python:
        return Finding(name, "not applicable", "not known without the environment's packages")
    if not engine.without_bytecode:
        return Finding(name, "ok", "kept beside the packages, or can be")
    names = ", ".join(os.path.basename(folder) for folder in engine.without_bytecode)
    why = "PYTHONDONTWRITEBYTECODE is set" if engine.writes_no_bytecode else "this user cannot write it"
    return Finding(
        name,
        "warning",
        f"that of {names} is not there, and {why}: every process of a server compiles all that it imports, which can "
        f"take half a minute each",
        "unset PYTHONDONTWRITEBYTECODE"
        if engine.writes_no_bytecode
        else f"python -m compileall -q {' '.join(engine.without_bytecode)}",
    )


def check_torch(torch: Torch, engine: Engine) -> Finding:
    name = "torch"
    if torch.failure:
        mend = f"python -m pip install --force-reinstall {engine.pin('torch')}"
        return Finding(name, "error", f"it cannot be imported: {torch.failure}", mend)
    built = f"CUDA {torch.cuda}" if torch.cuda else f"ROCm {torch.hip}" if torch.hip else "no GPU"
    return Finding(name, "ok", f"{torch.version}, built for {built}")


def check_pins(engine: Engine) -> Finding:
    """The versions that the engine asks for exactly, for those packages whose version decides what a kernel does."""
    name = "versions"
    if engine.version is None:
        return Finding(name, "not applicable", "there is no engine to ask for any")
    if not engine.pins:
        what = "the engine was installed without package metadata, so what it asks for is not known"
        return Finding(name, "warning", what, INSTALL_ENGINE)
    pinned = {package: engine.pins[package] for package in engine.packages if package in engine.pins}
    others = {
        package: f"{package} {engine.packages[package] or 'missing'} instead of {version}"
        for package, version in pinned.items()
        if not _same_release(engine.packages[package] or "", version)
    }
    if others:
        mend = "python -m pip install " + " ".join(map(engine.pin, others))
        what = f"not what the engine was released with: {', '.join(others.values())}"
        return Finding(name, "warning", what, mend)
    return Finding(name, "ok", ", ".join(f"{package} {version}" for package, version in pinned.items()))


def _same_release(installed: str, pinned: str) -> bool:
    """Whether they differ in no more than the part after ``+``, which names the build: 2.9.1+cu128 is 2.9.1."""
    return installed.partition("+")[0] == pinned.partition("+")[0]


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])))


# ----------------------------------------------------------------------------------------- driver and GPUs


def check_driver(host: Host, torch: Torch, engine: Engine) -> Finding:
    """torch's CUDA against the driver's: a newer driver runs all older CUDA, an older one the same major version."""
    name = "driver"
    if reason := _no_cuda_reason(host, torch):
        return Finding(name, "not applicable", reason)
    if torch.cuda is None:
        what = f"there is one, and torch {torch.version} is built without CUDA"
        return Finding(name, "error", what, f"python -m pip install --force-reinstall {engine.pin('torch')}")
    driver = f"driver {host.driver or 'of unknown version'}"
    if torch.driver_cuda is None:
        return Finding(name, "error", f"{driver} does not say which CUDA it supports", "nvidia-smi")
    supported = ".".join(map(str, torch.driver_cuda))
    needed = tuple(int(number) for number in torch.cuda.split("."))
    mend = f"sudo apt-get install {_DRIVER_PACKAGE}"
    said = f"{driver} supports CUDA up to {supported}, and torch {torch.version} is built for CUDA {torch.cuda}"
    if torch.driver_cuda[0] < needed[0]:
        return Finding(name, "error", f"{said}: too old, torch cannot use a GPU", mend)
    if tuple(torch.driver_cuda) < needed:
        what = f"{said}: it runs, but for kernels that come as PTX and for features of the newer CUDA"
        return Finding(name, "warning", what, mend)
    return Finding(name, "ok", said)


def check_gpus(host: Host, torch: Torch, devices: Devices | None) -> Finding:
    """How many, which, and their memory; on a host without one, what that means."""
    name = "GPUs"
    if torch.failure:
        return Finding(name, "not applicable", "not known without torch")
    if host.has_no_accelerator and host.pci_gpus:
        what = (
            f"{host.pci_gpus} of NVIDIA on the PCI bus, and no libcuda.so.1: a container without its GPUs, or a host "
            "without the driver. As it is, ranks run on the CPU, for tests"
        )
        return Finding(name, "warning", what, "docker run --gpus all --shm-size 32g IMAGE")
    if host.has_no_accelerator:
        return Finding(name, "not applicable", NO_GPU)
    if not torch.gpus:
        return _no_gpu_seen(host, torch)
    if devices is None or devices.failure:
        failure = devices.failure if devices else "nothing was tried"
        return Finding(name, "error", f"{_names(torch.gpus)} cannot be used: {failure}", "nvidia-smi")
    if ids := re.findall(r"[^\d,\s][^,]*", host.visible_devices or ""):
        what = f"{_names(torch.gpus)}; CUDA_VISIBLE_DEVICES names {ids[0]}, and the engine reads numbers there"
        return Finding(name, "warning", what, "nvidia-smi -L")  # which has the number of each name
    least = min(one["free"] for one in devices.memory)
    sizes = f"{min(one['total'] for one in devices.memory) / GIB:.1f} GiB each, at least {least / GIB:.1f} free"
    what = f"{_names(torch.gpus)}: {sizes}"
    visible = host.visible_devices or ",".join(map(str, range(len(torch.gpus))))
    numbers = [number.strip() for number in visible.split(",")]  # of torch's GPUs, which it counts from 0
    busy = [
        gpu for gpu, one in zip(numbers, devices.memory, strict=False) if one["free"] < (1 - _BUSY_SHARE) * one["total"]
    ]
    if busy:
        mend = "nvidia-smi --query-compute-apps=gpu_uuid,pid,used_memory,name --format=csv"
        return Finding(name, "warning", f"{what}; others hold memory of GPU {', '.join(busy)}", mend)
    if len({gpu.name for gpu in torch.gpus}) > 1:
        alike = [number for number, gpu in zip(numbers, torch.gpus, strict=False) if gpu.name == torch.gpus[0].name]
        what += "; not all the same, so the smallest sets the memory and the slowest the pace"
        return Finding(name, "warning", what, f"export CUDA_VISIBLE_DEVICES={','.join(alike)}")
    return Finding(name, "ok", what)


def _no_gpu_seen(host: Host, torch: Torch) -> Finding:
    what = f"torch sees none, and there is a driver: {torch.unavailable or 'it is built without CUDA'}"
    if host.visible_devices is not None:
        what += f" (CUDA_VISIBLE_DEVICES={host.visible_devices!r})"
        return Finding("GPUs", "error", what, "unset CUDA_VISIBLE_DEVICES")
    return Finding("GPUs", "error", what, "nvidia-smi")


def check_architecture(torch: Torch, engine: Engine) -> Finding:
    """Whether torch's own kernels were compiled for these GPUs, or can be at load."""
    name = "GPU architecture"
    if not torch.gpus or torch.hip:
        return Finding(name, "not applicable", _without_gpus(torch))
    capabilities = sorted({gpu.capability for gpu in torch.gpus})
    said = ", ".join(f"{major}.{minor}" for major, minor in capabilities)
    missing = [one for one in capabilities if not is_built_for(torch.architectures, one)]
    if missing:
        what = f"compute capability {said}, and torch {torch.version} has {', '.join(torch.architectures)}"
        return Finding(name, "error", what, f"python -m pip install --force-reinstall {engine.pin('torch')}")
    return Finding(name, "ok", f"compute capability {said}; torch has kernels for it")


def is_built_for(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code for one of ``architectures`` runs on a GPU of this capability.

    ``sm_90`` runs on 9.0 and later 9.x, ``sm_90a`` on 9.0 alone, ``compute_90`` is compiled at load for 9.0 and later.
    """
    for architecture in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
        if not match:
            continue
        built = (int(match[2]), int(match[3]))
        if match[4] == "a":
            fits = built == capability
        elif match[1] == "compute" and not match[4]:
            fits = built <= capability
        else:
            fits = built[0] == capability[0] and built <= capability
        if fits:
            return True
    return False


def check_peers(torch: Torch, devices: Devices | None) -> Finding:
    """Whether each GPU reads and writes the memory of each other one, and whether what it copies arrives."""
    name = "peer access"
    if len(torch.gpus) < 2:
        what = _without_gpus(torch) if not torch.gpus else "one GPU has no peer"
        return Finding(name, "not applicable", what)
    if devices is None or devices.failure:
        return Finding(name, "not applicable", "not known: the GPUs cannot be used")
    if devices.wrong_copies:
        what = f"copies arrive with other values: {_pairs(devices.wrong_copies)}"
        return Finding(name, "error", what, "export NCCL_P2P_DISABLE=1")
    number = len(torch.gpus) * (len(torch.gpus) - 1) // 2
    if devices.no_access:
        what = f"none for {_pairs(devices.no_access)}: collectives take the way over host memory there, which is slower"
        return Finding(name, "warning", what, "nvidia-smi topo -p2p r")
    links = {True: "NVLink between all", False: "over PCIe, or not all over NVLink", None: "NVLink not known: no NVML"}
    return Finding(name, "ok", f"all {number} pair(s), both ways, copies compared; {links[devices.nvlink]}")


def check_nccl(torch: Torch, engine: Engine) -> Finding:
    name = "NCCL"
    if not torch.gpus:
        return Finding(name, "not applicable", _without_gpus(torch))
    if torch.nccl is None:
        what = f"torch {torch.version} is built without it"
        return Finding(name, "error", what, f"python -m pip install --force-reinstall {engine.pin('torch')}")
    package, wanted = next(
        ((package, version) for package, version in engine.torch_pins.items() if package.startswith("nvidia-nccl-")),
        (None, None),
    )
    if wanted and not _same_release(torch.nccl, wanted):
        what = f"{torch.nccl} is loaded, and torch {torch.version} was released with {wanted}"
        if _release(torch.nccl) < _release(wanted):
            return Finding(name, "warning", what, f"python -m pip install {package}=={wanted}")
        return Finding(name, "ok", what)  # as in the engine's own images
    return Finding(name, "ok", f"{torch.nccl} is loaded")


# ----------------------------------------------------------------------------------------- kernel libraries


def check_kernels(torch: Torch, engine: Engine, failure: str | None) -> Finding:
    """The engine's compiled kernels: the file for this architecture, FA3 on Hopper, and that they load."""
    name = "sgl_kernel"
    if not torch.gpus or torch.hip:
        return Finding(name, "not applicable", _without_gpus(torch))
    reinstall = f"python -m pip install --force-reinstall --no-deps {engine.pin('sglang-kernel')}"
    version = engine.packages.get("sglang-kernel")
    if version is None and not engine.kernel_files:
        return Finding(name, "error", "the package sglang-kernel is not installed", reinstall)
    version = version or "one of unknown version"
    hopper = torch.gpus[0].capability == (9, 0)
    wanted = "sm90" if hopper else "sm100"  # as its loader chooses: the second holds all but Hopper
    if wanted not in engine.kernel_files:
        return Finding(name, "error", f"{version} has no kernels for {wanted}", reinstall)
    if failure:
        return Finding(name, "error", f"{version} cannot be imported: {failure}", reinstall)
    if hopper and "fa3" not in engine.kernel_files:
        what = f"{version} loads, without FA3, the engine's attention on Hopper; --attention-backend triton works"
        return Finding(name, "warning", what, reinstall)
    return Finding(name, "ok", f"{version} loads, with kernels for {wanted}")


def check_flashinfer(torch: Torch, engine: Engine, failure: str | None) -> Finding:
    """FlashInfer: attention on Blackwell by default, and a fused all-reduce + norm where ours cannot run."""
    name = "FlashInfer"
    if not torch.gpus or torch.hip:
        return Finding(name, "not applicable", _without_gpus(torch))
    status: Status = "error" if torch.gpus[0].capability[0] >= 10 else "warning"
    means = "no attention by default" if status == "error" else "no fused all-reduce + norm where ours cannot run"
    both = [engine.pin(package) for package in ("flashinfer-python", "flashinfer-cubin")]
    install = "python -m pip install " + " ".join(both)
    version, cubin = (engine.packages.get(package) for package in ("flashinfer-python", "flashinfer-cubin"))
    if version is None and failure:
        return Finding(name, status, f"it is not installed: {means}", install)
    if failure and cubin is not None and version is not None and not _same_release(cubin, version):
        what = f"flashinfer-python {version} refuses flashinfer-cubin {cubin}: {means}"
        return Finding(name, status, what, install)
    if failure:
        return Finding(name, status, f"{version} cannot be imported: {failure}: {means}", install)
    return Finding(name, "ok", f"{version or 'of unknown version'} loads")


def check_compiler(torch: Torch, host: Host, engine: Engine) -> Finding:
    """FlashInfer and the engine compile some CUDA kernels when they are first used."""
    name = "CUDA compiler"
    if not torch.gpus or torch.cuda is None:
        return Finding(name, "not applicable", _without_gpus(torch))
    if host.nvcc:
        return Finding(name, "ok", host.nvcc)
    package = f"cuda-nvcc-{torch.cuda.replace('.', '-')}"
    what = (
        "no nvcc: kernels that are compiled at first use are missing, FlashInfer's fused all-reduce + norm among them"
    )
    if engine.packages.get("flashinfer-jit-cache"):
        return Finding(name, "ok", "no nvcc; FlashInfer's kernels come compiled, in flashinfer-jit-cache")
    return Finding(name, "warning", what, f"sudo apt-get install {package}")


# -------------------------------------------------------------------------------------------------- the host


def check_shared_memory(host: Host) -> Finding:
    name = "shared memory"
    remount = "sudo mount -o remount,size=8G /dev/shm"
    if host.shared_memory_free is None or host.shared_memory_total is None:
        what = "/dev/shm is no file system: NCCL and the engine's queues between ranks cannot start"
        return Finding(name, "error", what, "sudo mount -t tmpfs -o size=8G tmpfs /dev/shm")
    free, total = host.shared_memory_free, host.shared_memory_total
    said = f"{_size(free)} free of {_size(total)} in /dev/shm"
    if free < SHARED_MEMORY_LEAST:
        return Finding(name, "error", f"{said}: ranks on one host will not start", remount)
    if free < SHARED_MEMORY_ENOUGH:
        return Finding(
            name, "warning", f"{said}: NCCL may run out of it; {_size(SHARED_MEMORY_ENOUGH)} is safe", remount
        )
    return Finding(name, "ok", said)


def check_port(ports: Ports) -> Finding:
    name = f"port {ports.port}"
    if ports.state == "free":
        return Finding(name, "ok", "free, for the HTTP server")
    whys = {
        "taken": "another process has it",
        "not allowed": "this user may not listen on it",
        "impossible": "ports are 1 to 65535",
    }
    return Finding(name, "error", whys[ports.state], _with_port(ports))


def check_further_ports(ports: Ports) -> Finding:
    """Without DP attention the engine takes sockets in files and ports that the system says are free."""
    name = "further ports"
    first, last = min(ports.further), max(ports.further)
    taken = [f"{port} {state}" for port, state in ports.further.items() if state != "free"]
    if taken:
        what = f"{', '.join(taken)}: --enable-dp-attention takes them beside --port {ports.port}"
        return Finding(name, "warning", what, _with_port(ports))
    return Finding(name, "ok", f"{first} and {last - 5} to {last} free, for --enable-dp-attention")


def _with_port(ports: Ports) -> str | None:
    if ports.suggestion is None:
        return "ss --listening --tcp --processes"
    return f"python -m sglang.launch_server --model-path MiniMaxAI/MiniMax-M2.5 --port {ports.suggestion}"


# ------------------------------------------------------------------------------------------------- in words


def _no_cuda_reason(host: Host, torch: Torch) -> str | None:
    if torch.failure:
        return "not known without torch"
    if host.has_no_accelerator:
        return "no GPU"
    if torch.hip:
        return f"torch is built for ROCm {torch.hip}: only NVIDIA's driver is checked"
    return None


def _without_gpus(torch: Torch) -> str:
    if torch.failure:
        return "not known without torch"
    return f"torch is built for ROCm {torch.hip}: only NVIDIA's is checked" if torch.hip else "no GPU"


def _names(gpus: Sequence[Gpu]) -> str:
    counts: dict[str, int] = {}
    for gpu in gpus:
        counts[gpu.name] = counts.get(gpu.name, 0) + 1
    return ", ".join(f"{count} x {name}" for name, count in counts.items())


def _pairs(pairs: Sequence[Sequence[int]]) -> str:
    shown = ", ".join(f"{one} to {other}" for one, other in pairs[:6])
    return shown + (f" and {len(pairs) - 6} more" if len(pairs) > 6 else "")


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"
