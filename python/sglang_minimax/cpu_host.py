"""What the engine lacks on a host without an accelerator: one function a gap.

SGLang's CPU engine is built for Xeon servers with AMX: its wheel of CPU kernels installed, one rank a NUMA node.
What pip installs is the CUDA build, and a test machine has a few cores and many ranks. Each function below
takes one engine module, right after its import, and mends one assumption that does not hold there. Nothing
here replaces a kernel by an approximation: a path in plain torch is chosen, and a GPU kernel that is reached
after all raises an error that names it.

On a host with an accelerator none of this runs: see :func:`has_no_accelerator`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sglang_minimax.adjustments import EngineModule, EngineObject
from sglang_minimax.node_address import interface_of

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

DEFAULT_KV_CACHE_TOKENS = 16384  # a DP rank; the engine would fill the host's memory, once for each rank
DEFAULT_RUNNING_REQUESTS = 32  # a DP rank; the engine's least, 2048, costs 1.6 GB a rank at 196608 tokens
DEFAULT_MEM_FRACTION_STATIC = 0.8  # of the memory that is free before the weights are loaded, all ranks together


def has_no_accelerator() -> bool:
    """Whether this host has no GPU or other accelerator that the engine supports.

    Asks for drivers, not for devices: starting CUDA here would cost every process and forbid it to fork.
    """
    if not sys.platform.startswith("linux"):
        return False  # the engine serves macOS through MPS
    try:
        ctypes.CDLL("libcuda.so.1")
        return False
    except OSError:
        pass
    devices = ("/dev/kfd", "/dev/davinci_manager", "/dev/accel", "/dev/dri/renderD128", "/dev/mtgpu.0")
    stacks = ("torch_npu", "habana_frameworks", "torchada", "intel_extension_for_pytorch")
    return not any(map(os.path.exists, devices)) and not any(map(importlib.util.find_spec, stacks))


def prepare_environment() -> None:
    """Sets what has to be set before the engine, or torch, is imported. What the person set is left alone."""
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    # The engine decorates small functions with torch.compile. On a CPU that needs a C++ compiler, which a fresh
    # machine may lack, and takes each rank a minute for functions that run in microseconds without it.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    stand_in_for_gpu_kernel_library()


def stand_in_for_gpu_kernel_library() -> None:
    """``sgl_kernel`` is imported everywhere, and its CUDA library cannot be loaded without libcuda.so.1.

    The last place its loader looks is a module named ``common_ops``. An empty one lets the import pass and
    registers no kernel: ``torch.ops.sgl_kernel.<name>`` stays an AttributeError that names the kernel. A CPU
    build of ``sgl_kernel`` is found before this one.
    """
    stand_in = ModuleType("common_ops", "No kernels: this host has no accelerator.")
    stand_in.__file__ = __file__
    sys.modules.setdefault("common_ops", stand_in)


def ranks_on_this_host(server_args: EngineObject) -> int:
    """How many ranks of the server run on this host and share its cores and memory."""
    replicas = 1 if server_args.enable_dp_attention else server_args.dp_size
    ranks: int = server_args.tp_size * server_args.pp_size * replicas // server_args.nnodes
    return max(1, ranks)


def cpu_kernels_are_installed() -> bool:
    """Whether ``sgl_kernel`` is a CPU build (the engine's own CPU image), not the CUDA build of its releases."""
    import torch

    return hasattr(torch.ops.sgl_kernel, "init_cpu_threads_env")


# --- Server arguments ------------------------------------------------------------------------------------


def choose_server_defaults(server_args: EngineModule) -> None:
    """The engine's defaults for ``--device cpu`` are those of a Xeon with AMX and one rank a NUMA node."""
    engine = server_args.ServerArgs._handle_cpu_backends

    @functools.wraps(engine)
    def handle_cpu_backends(self: EngineObject) -> None:
        if self.device == "cpu":
            fill_in_server_defaults(self)
        engine(self)

    server_args.ServerArgs._handle_cpu_backends = handle_cpu_backends


def fill_in_server_defaults(args: EngineObject) -> None:
    """Chooses what the person left open in ``args``, a ``ServerArgs`` whose device is ``cpu``, in place."""
    from sglang.srt.utils import cpu_has_amx_support

    if args.attention_backend is None and not cpu_has_amx_support():
        args.attention_backend = "torch_native"
    dp_ranks = args.dp_size if args.enable_dp_attention else 1
    if args.max_running_requests is None:
        args.max_running_requests = DEFAULT_RUNNING_REQUESTS * dp_ranks
    if args.mem_fraction_static is None:
        args.mem_fraction_static = DEFAULT_MEM_FRACTION_STATIC
        if args.max_total_tokens is None:
            args.max_total_tokens = DEFAULT_KV_CACHE_TOKENS
    args.disable_overlap_schedule = True  # it overlaps with CUDA streams
    args.disable_custom_all_reduce = True  # a CUDA kernel
    args.sleep_on_idle = True  # an idle scheduler polls without pause: a core a rank, that others need here


# --- Processes, threads, memory --------------------------------------------------------------------------


def fork_ranks(engine: EngineModule) -> None:
    """The engine spawns every rank as a fresh interpreter, since a process that uses CUDA cannot be forked.

    Each then imports the engine for itself: 0.8 GB and 7 s of a core, sixteen times. The server's launcher uses
    no CUDA here and starts no thread before its ranks, so it imports what they need and forks them: they share
    all of that. A program that embeds the engine may have threads, and its ranks are spawned as ever.
    """
    set_environment = engine._set_envs_and_config

    @functools.wraps(set_environment)
    def set_environment_and_fork(server_args: EngineObject) -> None:
        set_environment(server_args)
        if server_args.device != "cpu":
            return
        refuse_pipeline_parallelism(server_args)
        if _is_server_launcher():
            import sglang.srt.managers.data_parallel_controller
            import sglang.srt.managers.scheduler
            import sglang.srt.models.registry  # noqa: F401  imports every model, in seconds

            engine.mp.set_start_method("fork", force=True)

    engine._set_envs_and_config = set_environment_and_fork


def _is_server_launcher() -> bool:
    """Whether this process is ``python -m sglang.<launcher>`` or ``sglang serve``."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return (spec is not None and spec.name.startswith("sglang.")) or os.path.basename(sys.argv[0]) == "sglang"


def refuse_pipeline_parallelism(server_args: EngineObject) -> None:
    """The engine's pipeline scheduler orders its stages with CUDA events and streams, and would fail half-way.

    Raises:
        ValueError: ``server_args`` asks for more than one stage.
    """
    if server_args.pp_size > 1:
        raise ValueError(
            f"--pp-size {server_args.pp_size}: the engine's pipeline scheduler needs CUDA streams, and this host has "
            f"no GPU. Use --tp-size alone, which takes any number of ranks here."
        )


def share_cores_and_loopback(model_runner: EngineModule) -> None:
    """The engine wants a NUMA node of its own for each rank, and on ARM assumes its CPU kernels.

    Here the ranks share the cores: as many threads a rank as there are cores for it, at least one, and no
    pinning, since more ranks than cores take turns. gloo uses the loopback interface when all ranks are on
    this host; its own choice, the interface that the host's name resolves to, may be none at all.
    """
    runner = model_runner.ModelRunner
    engine_binding, engine_init = runner.init_threads_binding, runner.init_torch_distributed
    if not cpu_kernels_are_installed():
        model_runner._is_cpu_arm64 = False

    @functools.wraps(engine_binding)
    def init_threads_binding(self: EngineObject) -> None:
        import torch

        ranks = ranks_on_this_host(self.server_args)
        numa_nodes = len(model_runner.get_cpu_ids_by_node())
        chosen = "SGLANG_CPU_OMP_THREADS_BIND" in os.environ
        if chosen or (cpu_kernels_are_installed() and ranks <= numa_nodes):
            engine_binding(self)
            return
        cores = sorted(os.sched_getaffinity(0))
        threads = max(1, len(cores) // ranks)
        first = self.tp_rank * threads % len(cores)
        self.local_omp_cpuid = ",".join(map(str, cores[first : first + threads]))
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads)
        if self.tp_rank == 0 and not self.is_draft_worker:
            logger.info(
                f"No accelerator on this host: {ranks} rank(s) on {len(cores)} core(s), {torch.get_num_threads()} "
                f"thread(s) each; attention backend {self.server_args.attention_backend}, process groups over gloo."
            )

    @functools.wraps(engine_init)
    def init_torch_distributed(self: EngineObject) -> Any:
        if self.server_args.nnodes == 1 and (loopback := interface_of("127.0.0.1")):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        return engine_init(self)

    runner.init_threads_binding = init_threads_binding
    runner.init_torch_distributed = init_torch_distributed


def let_the_controller_wait(data_parallel_controller: EngineModule) -> None:
    """The engine's DP controller asks for requests without pause: a whole core, of which there are few here."""

    def event_loop(self: EngineObject) -> None:
        while True:
            self.soft_watchdog.feed()
            if self.recv_from_tokenizer.poll(timeout=1000):  # milliseconds; returns as soon as there is a request
                self._request_dispatcher(self.recv_from_tokenizer.recv_pyobj())

    data_parallel_controller.DataParallelController.event_loop = event_loop


def share_memory(kv_cache_mixin: EngineModule) -> None:
    """The engine gives each rank's KV cache all the memory that is free on its NUMA node.

    That is right for one rank a node. Ranks that share a host share what is left after all of them have
    loaded their weights.
    """
    mixin = kv_cache_mixin.ModelRunnerKVCacheMixin
    engine = mixin.profile_max_num_token

    @functools.wraps(engine)
    def profile_max_num_token(self: EngineObject, pre_model_load_memory: float) -> Any:
        return engine(self, pre_model_load_memory) // ranks_on_this_host(self.server_args)

    mixin.profile_max_num_token = profile_max_num_token


def count_cores_without_lscpu(common: EngineModule) -> None:
    """The engine runs ``lscpu`` to learn the NUMA nodes, and a slim container has no such program.

    Without it all cores that this process may use are taken for one node.
    """
    engine = common.parse_lscpu_topology

    @functools.wraps(engine)
    def parse_lscpu_topology() -> Any:
        import shutil

        if shutil.which("lscpu"):
            return engine()
        return [(core, core, 0, 0) for core in sorted(os.sched_getaffinity(0))]

    common.parse_lscpu_topology = parse_lscpu_topology


# --- Collectives -----------------------------------------------------------------------------------------


def run_custom_ops_on_cpu(common: EngineModule) -> None:
    """The engine registers its custom ops for one device type, and CPU is none of those it knows.

    Among them are the collectives ``inplace_all_reduce``, ``reg_all_gather_into_tensor`` and
    ``reg_reduce_scatter_tensor``, whose bodies call torch.distributed and work over gloo as they are.
    """
    engine = common.direct_register_custom_op

    @functools.wraps(engine)
    def direct_register_custom_op(
        op_name: str,
        op_func: Callable[..., Any],
        mutates_args: list[str],
        fake_impl: Callable[..., Any] | None = None,
        target_lib: Any = None,
    ) -> None:
        engine(op_name, op_func, mutates_args, fake_impl, target_lib)
        import torch

        library = target_lib or common.sglang_lib
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{library.ns}::{op_name}", "CPU"):
            library.impl(op_name, op_func, "CPU")

    common.direct_register_custom_op = direct_register_custom_op


def gather_into_any_shape(parallel_state: EngineModule) -> None:
    """NCCL gathers into any output of as many values, such as [ranks, rows, columns] for the head of DP attention.

    gloo wants the ranks' inputs below each other, which is the same memory.
    """
    coordinator = parallel_state.GroupCoordinator
    engine = coordinator.all_gather_into_tensor

    @functools.wraps(engine)
    def all_gather_into_tensor(self: EngineObject, output: torch.Tensor, input: torch.Tensor) -> None:
        engine(self, output.view(self.world_size * input.shape[0], *input.shape[1:]), input)

    coordinator.all_gather_into_tensor = all_gather_into_tensor


def leave_nccl_alone(pynccl: EngineModule) -> None:
    """The engine opens a CUDA device for every group of two or more, whatever device the group is for.

    It does not when the NCCL library cannot be loaded, which on a host with torch's CUDA build it can.
    """

    def no_nccl(library_path: str | None = None) -> None:
        raise OSError("NCCL is for CUDA devices, and this host has none")

    pynccl.NCCLLibrary = no_nccl


def copy_rows_by_slicing(dp_attention: EngineModule) -> None:
    """The engine moves a DP rank's rows into and out of the gathered buffer with a Triton kernel."""
    dp_attention.memcpy_triton = copy_rows


def copy_rows(
    dst: torch.Tensor, src: torch.Tensor, dim: int, offset: torch.Tensor, sz: torch.Tensor, offset_src: bool
) -> None:
    """Copies ``sz`` rows between tensors of shape [rows, ...], starting at row ``offset`` of one of them.

    ``offset`` (in ``src`` if ``offset_src``, else in ``dst``) and ``sz`` are integer tensors of one element.
    As in the kernel this stands for, ``sz`` may exceed the smaller tensor's rows, which are then all copied.
    """
    assert dim == 0, f"rows are copied along dimension 0, not {dim}"
    first, rows = int(offset), min(int(sz), dst.shape[0], src.shape[0])
    if offset_src:
        dst[:rows].copy_(src[first : first + rows])
    else:
        dst[first : first + rows].copy_(src[:rows])


# --- The model -------------------------------------------------------------------------------------------


def keep_head_counts(update_config: EngineModule) -> None:
    """On a CPU the engine pads heads and widths until the TP size divides them, for the tiles of AMX.

    Padding the KV heads from 8 to 16 gives another model than replicating them does. Whatever a GPU could
    shard stays as it is; only what it would refuse is left to the padding.
    """
    engine = update_config.adjust_config_with_unaligned_cpu_tp

    @functools.wraps(engine)
    def adjust_config_with_unaligned_cpu_tp(
        model_config: EngineObject, load_config: EngineObject, tp_size: int
    ) -> EngineObject:
        from sglang.srt.layers.dp_attention import get_attention_tp_size

        heads, kv_heads = model_config.num_attention_heads, model_config.get_total_num_kv_heads()
        if can_shard_heads(get_attention_tp_size(), heads, kv_heads):
            return model_config
        return engine(model_config, load_config, tp_size)

    update_config.adjust_config_with_unaligned_cpu_tp = adjust_config_with_unaligned_cpu_tp


def can_shard_heads(attn_tp_size: int, num_heads: int, num_kv_heads: int) -> bool:
    """Whether ``attn_tp_size`` ranks divide the heads, and divide or replicate the KV heads."""
    shares = num_kv_heads % attn_tp_size == 0 or attn_tp_size % num_kv_heads == 0
    return num_heads % attn_tp_size == 0 and shares


def keep_float32(model_config: EngineModule) -> None:
    """The engine serves a float32 checkpoint in float16, for tensor cores that this host does not have.

    Only where no ``--dtype`` was given; float16 has too small a range for weights that nobody scaled for it.
    """
    engine = model_config._get_and_verify_dtype

    @functools.wraps(engine)
    def get_and_verify_dtype(config: EngineObject, dtype: str | torch.dtype) -> torch.dtype:
        import torch

        stored = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
        if dtype == "auto" and stored in (torch.float32, "float32"):
            return engine(config, torch.float32)
        return engine(config, dtype)

    model_config._get_and_verify_dtype = get_and_verify_dtype


def leave_out_other_ranks_experts(fused_moe_native: EngineModule) -> None:
    """The engine's experts in plain torch index out of bounds at expert id -1 and fail without tokens.

    -1 marks a token's expert that is on another EP rank, and a padded token. Those pairs of token and expert
    add nothing; the others go through the engine's function one expert a row.
    """
    engine = fused_moe_native.moe_forward_native

    @functools.wraps(engine)
    def moe_forward_native(
        layer: EngineObject, x: torch.Tensor, topk_output: EngineObject, moe_runner_config: EngineObject
    ) -> torch.Tensor:
        import torch

        weights, ids = topk_output.topk_weights, topk_output.topk_ids
        here = ids >= 0
        if here.all() and len(x):
            return engine(layer, x, topk_output, moe_runner_config)
        token, slot = here.nonzero(as_tuple=True)
        output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        if len(token):
            pairs = topk_output._replace(
                topk_weights=weights[token, slot].unsqueeze(1), topk_ids=ids[token, slot].unsqueeze(1)
            )
            output.index_add_(0, token, engine(layer, x[token], pairs, moe_runner_config).float())
        return output.to(x.dtype)

    fused_moe_native.moe_forward_native = moe_forward_native


def fill_padded_sequences(torch_native_backend: EngineModule) -> None:
    """DP attention pads the batch, and asks the attention backend for the length of a sequence that pads.

    The engine's torch_native backend has no answer. One token: the softmax over none would be NaN.
    """
    torch_native_backend.TorchNativeAttnBackend.get_cuda_graph_seq_len_fill_value = lambda self: 1


def pin_no_memory(forward_batch_info: EngineModule) -> None:
    """DP attention copies its token counts through pinned memory, which only an accelerator's driver can pin."""
    forward_batch_info.torch = _UnpinnedTorch(forward_batch_info.torch)


class _UnpinnedTorch:
    """``torch`` for one module, whose ``tensor`` does not pin."""

    def __init__(self, torch: EngineModule) -> None:
        self._torch = torch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)

    def tensor(self, data: object, *, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return self._torch.tensor(data, **options)


def mask_tokens_on_cpu(xgrammar_backend: EngineModule) -> None:
    """The engine applies the mask of a grammar (JSON schema, regex) with a Triton kernel, or refuses.

    The grammar library brings the same operation for a CPU.
    """
    grammar = xgrammar_backend.XGrammarGrammar
    engine = grammar.apply_vocab_mask

    @functools.wraps(engine)
    def apply_vocab_mask(self: EngineObject, logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
        import xgrammar

        if logits.device.type == "cpu":
            xgrammar.apply_token_bitmask_inplace(logits, vocab_mask)
        else:
            engine(self, logits, vocab_mask)

    grammar.apply_vocab_mask = apply_vocab_mask


def name_the_triton_kernel(common: EngineModule) -> None:
    """Without a driver Triton says "0 active drivers": neither which kernel nor what to do about it."""
    from triton.runtime.jit import JITFunction

    @functools.wraps(JITFunction.run)
    def run(self: Any, *args: object, **kwargs: object) -> None:
        raise RuntimeError(
            f"The Triton kernel {self.fn.__module__}.{self.fn.__name__} was reached, and this host has no GPU. "
            f"There is no way around it in plain torch: leave out the option that leads here, or use a GPU."
        )

    JITFunction.run = run


ADJUSTMENTS = [
    ("sglang.srt.server_args", choose_server_defaults),
    ("sglang.srt.entrypoints.engine", fork_ranks),
    ("sglang.srt.managers.data_parallel_controller", let_the_controller_wait),
    ("sglang.srt.model_executor.model_runner", share_cores_and_loopback),
    ("sglang.srt.model_executor.model_runner_kv_cache_mixin", share_memory),
    ("sglang.srt.utils.common", count_cores_without_lscpu),
    ("sglang.srt.utils.common", run_custom_ops_on_cpu),
    ("sglang.srt.distributed.parallel_state", gather_into_any_shape),
    ("sglang.srt.distributed.device_communicators.pynccl", leave_nccl_alone),
    ("sglang.srt.layers.dp_attention", copy_rows_by_slicing),
    ("sglang.srt.configs.update_config", keep_head_counts),
    ("sglang.srt.configs.model_config", keep_float32),
    ("sglang.srt.layers.moe.fused_moe_native", leave_out_other_ranks_experts),
    ("sglang.srt.layers.attention.torch_native_backend", fill_padded_sequences),
    ("sglang.srt.model_executor.forward_batch_info", pin_no_memory),
    ("sglang.srt.constrained.xgrammar_backend", mask_tokens_on_cpu),
    ("sglang.srt.utils.common", name_the_triton_kernel),
]
