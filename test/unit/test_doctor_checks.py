"""Every check of the doctor, told every tale: hosts that are healthy and hosts that are not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from unit.doctor_hosts import (
    B200,
    BROKEN_TORCH,
    CPU_FACTS,
    DEVICES,
    ENGINE,
    GIB,
    GPU_FACTS,
    H200,
    PORTS,
    assert_is_read,
    changed,
    named,
)

from sglang_minimax.doctor import checks, finding
from sglang_minimax.doctor.facts import Devices, Engine, Gpu
from sglang_minimax.doctor.finding import Finding
from sglang_minimax.overlay import ENGINE_VERSION

# The facts, the check, its status, what it must say, what the command that mends it must hold.
TALES = {
    "engine": (GPU_FACTS, "engine", "ok", ENGINE_VERSION, None),
    "engine missing": (
        replace(GPU_FACTS, engine=Engine(python=[3, 11, 0])),
        "engine", "error", "not installed", f"python -m pip install sglang=={ENGINE_VERSION}",
    ),
    "engine of another version": (
        changed(GPU_FACTS, engine={"version": "0.5.11", "laid_over": False}),
        "engine", "error", "sglang 0.5.11", f"sglang=={ENGINE_VERSION}",
    ),
    "environment that cannot even look": (
        replace(GPU_FACTS, engine=Engine(failure="it ended with exit code 1")),
        "engine", "error", "exit code 1", "pip install .",
    ),
    "overlay": (GPU_FACTS, "overlay", "ok", "active", None),
    "overlay switched off": (
        changed(GPU_FACTS, engine={"laid_over": False, "finder_installed": False, "switched_off": True}),
        "overlay", "warning", "SGLANG_MINIMAX_OVERLAY=0", "unset SGLANG_MINIMAX_OVERLAY",
    ),
    "overlay over another engine": (
        changed(GPU_FACTS, engine={"version": "0.5.11", "laid_over": False}),
        "overlay", "error", "not active over sglang 0.5.11", f"sglang=={ENGINE_VERSION}",
    ),
    "overlay without start-up line": (
        changed(GPU_FACTS, engine={"laid_over": False, "finder_installed": False}),
        "overlay", "error", "start-up line did not run", "--force-reinstall",
    ),
    "overlay behind": (
        changed(GPU_FACTS, engine={"laid_over": False}),
        "overlay", "error", "not in front", "--force-reinstall",
    ),
    "overlay without engine": (
        replace(GPU_FACTS, engine=Engine()), "overlay", "not applicable", "no engine", None,
    ),
    "Python": (GPU_FACTS, "Python", "ok", "3.12.1", None),
    "Python, the oldest": (changed(GPU_FACTS, engine={"python": [3, 10, 0]}), "Python", "ok", "3.10.0", None),
    "Python too old": (
        changed(GPU_FACTS, engine={"python": [3, 9, 21]}), "Python", "warning", "3.9.21, and 3.10 to 3.12 are", "venv",
    ),
    "Python too new": (changed(GPU_FACTS, engine={"python": [3, 13, 0]}), "Python", "warning", "3.13.0", "venv"),
    "Python unknown": (replace(GPU_FACTS, engine=Engine(failure="x")), "Python", "not applicable", "not known", None),
    "bytecode": (GPU_FACTS, "bytecode", "ok", "kept", None),
    "bytecode that is not to be written": (
        changed(GPU_FACTS, engine={"without_bytecode": ["a/sglang", "a/torch"], "writes_no_bytecode": True}),
        "bytecode", "warning", "that of sglang, torch is not there, and PYTHONDONTWRITEBYTECODE is set",
        "unset PYTHONDONTWRITEBYTECODE",
    ),
    "bytecode that cannot be written": (
        changed(GPU_FACTS, engine={"without_bytecode": ["a/sglang"]}),
        "bytecode", "warning", "this user cannot write it", "python -m compileall -q a/sglang",
    ),
    "bytecode unknown": (
        replace(GPU_FACTS, engine=Engine(failure="x")), "bytecode", "not applicable", "not known", None,
    ),
    "torch": (GPU_FACTS, "torch", "ok", "2.9.1+cu128, built for CUDA 12.8", None),
    "torch of another vendor": (
        changed(GPU_FACTS, torch={"version": "2.9.1", "hip": "6.4", "cuda": None}),
        "torch", "ok", "2.9.1, built for ROCm 6.4", None,
    ),
    "torch for the CPU": (
        changed(CPU_FACTS, torch={"version": "2.9.1+cpu", "cuda": None}), "torch", "ok", "built for no GPU", None,
    ),
    "torch broken": (
        replace(GPU_FACTS, torch=BROKEN_TORCH), "torch", "error", "libcudart.so.12", "--force-reinstall torch==2.9.1",
    ),
    "versions": (GPU_FACTS, "versions", "ok", "sglang-kernel 0.4.1", None),
    "versions of others": (
        changed(GPU_FACTS, engine={"packages": {**ENGINE.packages, "torch": "2.11.0+cu130", "sglang-kernel": None}}),
        "versions", "warning", "torch 2.11.0+cu130 instead of 2.9.1, sglang-kernel missing instead of 0.4.1",
        "python -m pip install torch==2.9.1 sglang-kernel==0.4.1",
    ),
    "versions without metadata": (
        changed(GPU_FACTS, engine={"pins": {}}), "versions", "warning", "without package metadata", "sglang==",
    ),
    "versions without engine": (replace(GPU_FACTS, engine=Engine()), "versions", "not applicable", "no engine", None),
    "driver": (GPU_FACTS, "driver", "ok", "driver 570.86.10 supports CUDA up to 12.8", None),
    "driver newer": (changed(GPU_FACTS, torch={"driver_cuda": [13, 0]}), "driver", "ok", "13.0", None),
    "driver of an older minor version": (
        changed(GPU_FACTS, torch={"driver_cuda": [12, 4]}),
        "driver", "warning", "12.4", "apt-get install nvidia-driver",
    ),
    "driver too old": (
        changed(GPU_FACTS, torch={"driver_cuda": [11, 8], "gpus": []}),
        "driver", "error", "11.8, and torch 2.9.1+cu128 is built for CUDA 12.8: too old",
        "apt-get install nvidia-driver-580-server-open",
    ),
    "driver that does not answer": (
        changed(GPU_FACTS, torch={"driver_cuda": None}), "driver", "error", "does not say", "nvidia-smi",
    ),
    "driver, torch without CUDA": (
        changed(GPU_FACTS, torch={"cuda": None, "gpus": []}), "driver", "error", "without CUDA", "torch==2.9.1",
    ),
    "driver of unknown version": (
        changed(GPU_FACTS, host={"driver": None}), "driver", "ok", "driver of unknown version supports", None,
    ),
    "driver on a CPU host": (CPU_FACTS, "driver", "not applicable", "no GPU", None),
    "driver of another vendor": (
        changed(GPU_FACTS, torch={"hip": "6.4", "cuda": None}), "driver", "not applicable", "ROCm 6.4", None,
    ),
    "driver, torch broken": (replace(GPU_FACTS, torch=BROKEN_TORCH), "driver", "not applicable", "torch", None),
    "GPUs": (GPU_FACTS, "GPUs", "ok", "4 x NVIDIA H200: 140.0 GiB each, at least 139.0 free", None),
    "GPUs, none": (CPU_FACTS, "GPUs", "not applicable", "not a speed for production", None),
    "GPUs that the container does not have": (
        changed(CPU_FACTS, host={"pci_gpus": 8}), "GPUs", "warning", "8 of NVIDIA on the PCI bus", "--gpus all",
    ),
    "GPUs hidden": (
        changed(GPU_FACTS, torch={"gpus": [], "unavailable": "No CUDA GPUs"}, host={"visible_devices": ""}),
        "GPUs", "error", "No CUDA GPUs (CUDA_VISIBLE_DEVICES='')", "unset CUDA_VISIBLE_DEVICES",
    ),
    "GPUs that torch does not see": (
        changed(GPU_FACTS, torch={"gpus": [], "unavailable": "The NVIDIA driver on your system is too old"}),
        "GPUs", "error", "too old", "nvidia-smi",
    ),
    "GPUs, torch without CUDA": (
        changed(GPU_FACTS, torch={"cuda": None, "gpus": []}), "GPUs", "error", "it is built without CUDA", "nvidia-smi",
    ),
    "GPUs, torch broken": (replace(GPU_FACTS, torch=BROKEN_TORCH), "GPUs", "not applicable", "without torch", None),
    "GPUs that nothing was tried on": (
        replace(GPU_FACTS, devices=None), "GPUs", "error", "cannot be used: nothing was tried", "nvidia-smi",
    ),
    "GPUs that fail": (
        replace(GPU_FACTS, devices=Devices(failure="it did not end in time")),
        "GPUs", "error", "cannot be used: it did not end in time", "nvidia-smi",
    ),
    "GPUs named by UUID": (
        changed(GPU_FACTS, host={"visible_devices": "GPU-1b2c,GPU-77aa"}),
        "GPUs", "warning", "names GPU-1b2c,", "nvidia-smi -L",
    ),
    "GPUs that others use": (
        changed(GPU_FACTS, devices={"memory": [*DEVICES.memory[:3], {"free": 100 * GIB, "total": 140 * GIB}]}),
        "GPUs", "warning", "others hold memory of GPU 3", "--query-compute-apps=",
    ),
    "GPUs of two kinds": (
        changed(GPU_FACTS, torch={"gpus": [B200, H200, H200, B200]}),
        "GPUs", "warning", "not all the same", "export CUDA_VISIBLE_DEVICES=0,3",
    ),
    "architecture": (GPU_FACTS, "GPU architecture", "ok", "9.0", None),
    "architecture that torch has no kernels for": (
        changed(GPU_FACTS, torch={"gpus": [Gpu("NVIDIA GeForce RTX 5090", (12, 0))]}),
        "GPU architecture", "error", "12.0, and torch 2.9.1+cu128 has sm_80, sm_90, sm_100", "torch==2.9.1",
    ),
    "architectures of three kinds": (
        changed(GPU_FACTS, torch={"gpus": [B200, H200, Gpu("NVIDIA A100", (8, 0))]}),
        "GPU architecture", "ok", "compute capability 8.0, 9.0, 10.0; torch has kernels", None,
    ),
    "architecture of another vendor": (
        changed(GPU_FACTS, torch={"hip": "6.4", "cuda": None, "architectures": ["gfx942"]}),
        "GPU architecture", "not applicable", "ROCm 6.4", None,
    ),
    "architecture on a CPU host": (CPU_FACTS, "GPU architecture", "not applicable", "no GPU", None),
    "peers": (GPU_FACTS, "peer access", "ok", "all 6 pair(s), both ways, copies compared; NVLink between all", None),
    "peers over PCIe": (changed(GPU_FACTS, devices={"nvlink": False}), "peer access", "ok", "over PCIe", None),
    "peers without NVML": (changed(GPU_FACTS, devices={"nvlink": None}), "peer access", "ok", "no NVML", None),
    "peers out of reach": (
        changed(GPU_FACTS, devices={"no_access": [[0, 3], [3, 0]]}),
        "peer access", "warning", "none for 0 to 3, 3 to 0", "nvidia-smi topo -p2p r",
    ),
    "peers whose copies are wrong": (
        changed(GPU_FACTS, devices={"wrong_copies": [[1, 2]], "no_access": [[0, 3]]}),
        "peer access", "error", "other values: 1 to 2", "export NCCL_P2P_DISABLE=1",
    ),
    "peers of two": (changed(GPU_FACTS, torch={"gpus": [H200] * 2}), "peer access", "ok", "all 1 pair(s)", None),
    "peers that nothing was tried on": (
        replace(GPU_FACTS, devices=None), "peer access", "not applicable", "not known", None,
    ),
    "peers of one GPU": (changed(GPU_FACTS, torch={"gpus": [H200]}), "peer access", "not applicable", "one GPU", None),
    "peers on a CPU host": (CPU_FACTS, "peer access", "not applicable", "no GPU", None),
    "peers unknown": (
        replace(GPU_FACTS, devices=Devices(failure="x")), "peer access", "not applicable", "not known", None,
    ),
    "NCCL": (GPU_FACTS, "NCCL", "ok", "2.27.5 is loaded", None),
    "NCCL of another version": (
        changed(GPU_FACTS, torch={"nccl": "2.19.3"}),
        "NCCL", "warning", "2.19.3 is loaded, and torch 2.9.1+cu128 was released with 2.27.5",
        "nvidia-nccl-cu12==2.27.5",
    ),
    "NCCL of a later version": (
        changed(GPU_FACTS, torch={"nccl": "2.28.3"}),
        "NCCL", "ok", "2.28.3 is loaded, and torch 2.9.1+cu128 was released with 2.27.5", None,
    ),
    "NCCL that torch does not ask for": (
        changed(GPU_FACTS, engine={"torch_pins": {}}), "NCCL", "ok", "2.27.5 is loaded", None,
    ),
    "NCCL, torch broken": (replace(GPU_FACTS, torch=BROKEN_TORCH), "NCCL", "not applicable", "without torch", None),
    "NCCL missing": (changed(GPU_FACTS, torch={"nccl": None}), "NCCL", "error", "without it", "torch==2.9.1"),
    "NCCL on a CPU host": (CPU_FACTS, "NCCL", "not applicable", "no GPU", None),
    "sgl_kernel": (GPU_FACTS, "sgl_kernel", "ok", "0.4.1 loads, with kernels for sm90", None),
    "sgl_kernel on Blackwell": (
        changed(GPU_FACTS, torch={"gpus": [B200]}, engine={"kernel_files": ["sm100"]}),
        "sgl_kernel", "ok", "for sm100", None,
    ),
    "sgl_kernel without metadata": (
        changed(GPU_FACTS, engine={"packages": {}}), "sgl_kernel", "ok", "one of unknown version loads", None,
    ),
    "sgl_kernel without its files": (
        changed(GPU_FACTS, engine={"kernel_files": []}),
        "sgl_kernel", "error", "0.4.1 has no kernels for sm90", "sglang-kernel==0.4.1",
    ),
    "sgl_kernel of another vendor": (
        changed(GPU_FACTS, torch={"hip": "6.4", "cuda": None}), "sgl_kernel", "not applicable", "ROCm 6.4", None,
    ),
    "FlashInfer of another vendor": (
        replace(changed(GPU_FACTS, torch={"hip": "6.4", "cuda": None}), flashinfer_failure="absent"),
        "FlashInfer", "not applicable", "ROCm 6.4", None,
    ),
    "sgl_kernel missing": (
        changed(GPU_FACTS, engine={"packages": {}, "kernel_files": []}),
        "sgl_kernel", "error", "not installed", "sglang-kernel==0.4.1",
    ),
    "sgl_kernel without this architecture": (
        changed(GPU_FACTS, engine={"kernel_files": ["sm100", "fa3"]}),
        "sgl_kernel", "error", "no kernels for sm90", "sglang-kernel==0.4.1",
    ),
    "sgl_kernel that does not load": (
        replace(GPU_FACTS, kernels_failure="it was ended by SIGSEGV"),
        "sgl_kernel", "error", "0.4.1 cannot be imported: it was ended by SIGSEGV", "sglang-kernel",
    ),
    "sgl_kernel without FA3": (
        changed(GPU_FACTS, engine={"kernel_files": ["sm90", "sm100"]}),
        "sgl_kernel", "warning", "0.4.1 loads, without FA3", "sglang-kernel",
    ),
    "sgl_kernel on a CPU host": (CPU_FACTS, "sgl_kernel", "not applicable", "no GPU", None),
    "FlashInfer": (GPU_FACTS, "FlashInfer", "ok", "0.6.7.post3 loads", None),
    "FlashInfer missing": (
        replace(
            changed(GPU_FACTS, engine={"packages": {}}), flashinfer_failure="No module named 'flashinfer'",
        ),
        "FlashInfer", "warning", "it is not installed: no fused all-reduce",
        "flashinfer-python==0.6.7.post3 flashinfer-cubin==0.6.7.post3",
    ),
    "FlashInfer without metadata": (
        changed(GPU_FACTS, engine={"packages": {}}), "FlashInfer", "ok", "of unknown version loads", None,
    ),
    "FlashInfer without its kernels": (
        replace(
            changed(GPU_FACTS, engine={"packages": {"flashinfer-python": "0.6.7.post3"}}),
            flashinfer_failure="no cubin",
        ),
        "FlashInfer", "warning", "0.6.7.post3 cannot be imported: no cubin", "flashinfer-cubin==0.6.7.post3",
    ),
    "FlashInfer that loads with kernels of another version": (
        changed(GPU_FACTS, engine={"packages": {**ENGINE.packages, "flashinfer-cubin": "0.6.5"}}),
        "FlashInfer", "ok", "0.6.7.post3 loads", None,
    ),
    "FlashInfer broken on Blackwell": (
        replace(changed(GPU_FACTS, torch={"gpus": [B200]}), flashinfer_failure="ImportError: x"),
        "FlashInfer", "error", "ImportError: x: no attention by default", "flashinfer-python",
    ),
    "FlashInfer and its kernels of two versions": (
        replace(
            changed(GPU_FACTS, engine={"packages": {**ENGINE.packages, "flashinfer-cubin": "0.6.5"}}),
            flashinfer_failure="RuntimeError: version",
        ),
        "FlashInfer", "warning", "0.6.7.post3 refuses flashinfer-cubin 0.6.5", "flashinfer-cubin==0.6.7.post3",
    ),
    "FlashInfer on a CPU host": (CPU_FACTS, "FlashInfer", "not applicable", "no GPU", None),
    "compiler": (GPU_FACTS, "CUDA compiler", "ok", "/usr/local/cuda/bin/nvcc", None),
    "compiler missing": (
        changed(GPU_FACTS, host={"nvcc": None}),
        "CUDA compiler", "warning", "no nvcc", "apt-get install cuda-nvcc-12-8",
    ),
    "compiler not needed": (
        changed(GPU_FACTS, host={"nvcc": None}, engine={"packages": {"flashinfer-jit-cache": "0.6.7.post3"}}),
        "CUDA compiler", "ok", "flashinfer-jit-cache", None,
    ),
    "compiler of another vendor": (
        changed(GPU_FACTS, torch={"hip": "6.4", "cuda": None}), "CUDA compiler", "not applicable", "ROCm 6.4", None,
    ),
    "compiler on a CPU host": (CPU_FACTS, "CUDA compiler", "not applicable", "no GPU", None),
    "shared memory": (GPU_FACTS, "shared memory", "ok", "63.0 GiB free of 64.0 GiB", None),
    "shared memory small": (
        changed(GPU_FACTS, host={"shared_memory_total": GIB // 2, "shared_memory_free": GIB // 2}),
        "shared memory", "warning", "512 MiB free of 512 MiB", "mount -o remount",
    ),
    "shared memory of a container": (
        changed(GPU_FACTS, host={"shared_memory_total": GIB // 16, "shared_memory_free": GIB // 16 - 4096}),
        "shared memory", "error", "of 64 MiB", "mount -o remount",
    ),
    "shared memory, the least": (
        changed(GPU_FACTS, host={"shared_memory_total": GIB // 16, "shared_memory_free": GIB // 16}),
        "shared memory", "warning", "64 MiB free of 64 MiB in /dev/shm: NCCL may run out of it; 1.0 GiB is safe",
        "mount -o remount",
    ),
    "shared memory, enough": (
        changed(GPU_FACTS, host={"shared_memory_free": GIB}), "shared memory", "ok", "1.0 GiB free of 64.0 GiB", None,
    ),
    "shared memory missing": (
        changed(GPU_FACTS, host={"shared_memory_total": None, "shared_memory_free": None}),
        "shared memory", "error", "no file system", "mount -t tmpfs",
    ),
    "port": (GPU_FACTS, "port 30000", "ok", "free", None),
    "port taken": (
        changed(GPU_FACTS, ports={"state": "taken"}), "port 30000", "error", "another process", "--port 31000",
    ),
    "port of the system": (
        changed(GPU_FACTS, ports={"port": 80, "state": "not allowed"}), "port 80", "error", "this user", "--port 31000",
    ),
    "port that cannot be": (
        changed(GPU_FACTS, ports={"port": 70000, "state": "impossible", "suggestion": None}),
        "port 70000", "error", "1 to 65535", "ss --listening",
    ),
    "further ports": (GPU_FACTS, "further ports", "ok", "30013 and 30233 to 30238 free", None),
    "further ports taken": (
        changed(GPU_FACTS, ports={"further": {**PORTS.further, 30234: "taken"}}),
        "further ports", "warning", "30234 taken: --enable-dp-attention", "--port 31000",
    ),
}  # fmt: skip


@pytest.mark.parametrize("tale", TALES, ids=lambda tale: tale.replace(" ", "-"))
def test_a_check_says_what_is_so_and_what_mends_it(tale):
    told, name, status, what, mend = TALES[tale]
    found = named(checks.all_checks(told), name)
    assert found.status == status, found
    assert what in found.what
    assert (found.mend is None) == (mend is None) == (status in ("ok", "not applicable")), found
    if mend is not None:
        assert mend in found.mend


def test_only_packages_of_other_versions_are_to_be_installed_again():
    told, _, _, _, mend = TALES["versions of others"]
    assert named(checks.all_checks(told), "versions").mend == mend


@pytest.mark.parametrize(
    ("visible", "alike", "busy"),
    [(None, "0,3", "GPU 1, 3"), ("4,5, 6,7", "4,7", "GPU 5, 7"), ("7,3,5,1", "7,1", "GPU 3, 1")],
)
def test_gpus_have_the_numbers_of_cuda_visible_devices(visible, alike, busy):
    """torch counts those that it sees from 0; a number of its own in that variable would mean another GPU."""
    told = changed(GPU_FACTS, torch={"gpus": [B200, H200, H200, B200]}, host={"visible_devices": visible})
    assert named(checks.all_checks(told), "GPUs").mend == f"export CUDA_VISIBLE_DEVICES={alike}"
    memory = [
        {"free": free * GIB, "total": total * GIB} for free, total in ((139, 140), (20, 180), (170, 180), (9, 140))
    ]
    found = named(checks.all_checks(changed(told, devices={"memory": memory})), "GPUs")
    assert found.what.startswith("2 x NVIDIA B200, 2 x NVIDIA H200: 140.0 GiB each, at least 9.0 free")
    assert found.what.endswith(f"others hold memory of {busy}")


@pytest.mark.parametrize(("count", "end"), [(6, "4 to 5, 5 to 6: "), (7, "4 to 5, 5 to 6 and 1 more: ")])
def test_of_many_pairs_the_first_six_are_named(count, end):
    pairs = [[gpu, gpu + 1] for gpu in range(count)]
    found = named(checks.all_checks(changed(GPU_FACTS, devices={"no_access": pairs})), "peer access")
    assert found.what.startswith(f"none for 0 to 1, 1 to 2, 2 to 3, 3 to 4, {end}")


def test_every_check_has_a_tale_of_each_status_that_it_can_have():
    told = {(name.split()[0], status) for _, name, status, _, _ in TALES.values()}
    names = {finding.name.split()[0] for finding in checks.all_checks(GPU_FACTS)}
    assert {name for name, status in told if status in ("warning", "error")} == names
    assert {name for name, status in told if status == "ok"} == names


def test_a_healthy_gpu_host_and_a_healthy_cpu_host_have_nothing_to_mend():
    for told in (GPU_FACTS, CPU_FACTS):
        found = checks.all_checks(told)
        assert finding.EXIT_CODES[finding.worst(found)] == 0, [one for one in found if one.mend]
    gpu_only = {
        "driver",
        "GPUs",
        "GPU architecture",
        "peer access",
        "NCCL",
        "sgl_kernel",
        "FlashInfer",
        "CUDA compiler",
    }
    assert {one.name for one in checks.all_checks(CPU_FACTS) if one.status == "not applicable"} == gpu_only


@pytest.mark.parametrize("tale", TALES, ids=lambda tale: tale.replace(" ", "-"))
def test_the_command_that_mends_is_one_that_its_program_reads(tale):
    mend = named(checks.all_checks(TALES[tale][0]), TALES[tale][1]).mend
    if mend is not None:
        assert_is_read(mend)


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (["sm_80"], (8, 9), True),
        (["sm_90"], (8, 9), False),
        (["sm_80"], (9, 0), False),
        (["sm_86"], (8, 0), False),
        (["compute_80"], (9, 0), True),
        (["compute_90"], (9, 0), True),
        (["compute_90a"], (10, 0), False),
        (["compute_100f"], (10, 3), True),
        (["compute_100f"], (12, 0), False),
        (["compute_90"], (8, 9), False),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),
        (["sm_100f"], (10, 3), True),
        (["sm_120"], (12, 1), True),
        (["gfx942"], (9, 4), False),
        (["sm_90x"], (9, 0), False),  # whatever it will mean
        ([], (9, 0), False),
    ],
)
def test_which_code_runs_on_which_gpu(architectures, capability, runs):
    assert checks.is_built_for(architectures, capability) is runs


def test_the_exit_code_is_that_of_the_worst_line():
    lines = [Finding("a", "ok", ""), Finding("b", "not applicable", "")]
    assert finding.EXIT_CODES[finding.worst(lines)] == 0
    lines.append(Finding("c", "warning", ""))
    assert finding.EXIT_CODES[finding.worst(lines)] == 1
    lines.insert(0, Finding("d", "error", ""))
    assert finding.EXIT_CODES[finding.worst(lines)] == 2
