"""The GPUs that a plan can be made for: memory and bandwidths, and where each figure is from.

These are vendors' figures, not measurements. Bandwidths are of one direction where the vendor adds up both, and
arithmetic is dense: the vendors' larger numbers count sparsity.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang_minimax.plan.shape import CannotPlan

GPUS_PER_NODE = 8  # HGX and DGX boards, and AMD's Universal Base Board, carry eight of each of these


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    architecture: "hopper", "blackwell" or "cdna3".
    memory_mib: what the driver reports (nvidia-smi, rocm-smi); that is what the engine divides.
    hbm_gb_per_s, link_gb_per_s: 10^9 bytes a second; the link is what one GPU sends to its node's others.
    fp8_tflops: 10^12 operations a second of dense FP8.
    source: the vendor's document; memory_source: where the driver's figure can be seen.
    """

    name: str
    architecture: str
    memory_mib: int
    hbm_gb_per_s: float
    link_gb_per_s: float
    fp8_tflops: float
    source: str
    memory_source: str

    @property
    def is_hopper_or_blackwell(self) -> bool:
        return self.architecture in ("hopper", "blackwell")

    @property
    def chunked_prefill_size(self) -> int:
        """The engine's default for a GPU of this memory, before DP attention divides it by ``dp``."""
        return 16384 if self.memory_mib >= 160 * 1024 else 8192


GPUS = {
    "h100": Gpu(
        "NVIDIA H100 SXM 80 GB", "hopper", 81559, 3350, 450, 1979,
        "NVIDIA H100 Tensor Core GPU datasheet: 80 GB, 3.35 TB/s, NVLink 900 GB/s both ways, FP8 3,958 TFLOPS sparse",
        "nvidia-smi, modal-labs/modal-client pull request 2797",
    ),
    "h200": Gpu(
        "NVIDIA H200 SXM 141 GB", "hopper", 143771, 4800, 450, 1979,
        "NVIDIA H200 Tensor Core GPU datasheet: 141 GB, 4.8 TB/s, NVLink 900 GB/s both ways, FP8 3,958 TFLOPS sparse",
        "nvidia-smi, sgl-project/sglang issue 3196",
    ),
    "b200": Gpu(
        "NVIDIA B200 SXM 180 GB", "blackwell", 183359, 8000, 900, 4500,
        "NVIDIA DGX B200 datasheet, an eighth of it: 1,440 GB, 64 TB/s, NVLink 14.4 TB/s both ways, FP8 72 PFLOPS "
        "sparse",
        "nvidia-smi, NVIDIA/TensorRT-LLM issue 10278",
    ),
    "b300": Gpu(
        "NVIDIA B300 SXM 288 GB", "blackwell", 275040, 8000, 900, 4500,
        "NVIDIA DGX B300 datasheet, an eighth of it: 2.3 TB, 64 TB/s, NVLink 14.4 TB/s both ways, FP8 72 PFLOPS sparse",
        "268.6 GiB, as public reports of nvidia-smi have it; look at your own",
    ),
    "mi300x": Gpu(
        "AMD Instinct MI300X 192 GB", "cdna3", 196592, 5300, 448, 2614,
        "AMD Instinct MI300X data sheet: 192 GB, 5.3 TB/s, seven Infinity Fabric links of 128 GB/s both ways, FP8 "
        "2,614.9 TFLOPS",
        "rocm-smi (206,141,652,992 bytes), ROCm/legacy-rocm-build issue 4750",
    ),
    "mi325x": Gpu(
        "AMD Instinct MI325X 256 GB", "cdna3", 262144, 6000, 448, 2614,
        "AMD Instinct MI325X data sheet: 256 GB, 6 TB/s, seven Infinity Fabric links of 128 GB/s both ways, FP8 "
        "2,614.9 TFLOPS",
        "the data sheet's 256 GB read as GiB; look at your own",
    ),
}  # fmt: skip


def gpu_named(name: str) -> Gpu:
    """The GPU of a name as ``--gpu`` takes it.

    Raises:
        CannotPlan: a GPU that is not in the table.
    """
    try:
        return GPUS[name.lower()]
    except KeyError:
        raise CannotPlan(f"--gpu {name} is not in the table; these are: {', '.join(GPUS)}") from None
