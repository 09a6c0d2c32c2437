"""All-reduce + residual add + RMSNorm: the kernel interpreted, compiled without a GPU, its operator and its rules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sglang_minimax import overlay

overlay.install()

HIDDEN_SIZE, EPS = 96, 1e-6


def test_kernel_agrees_with_float64_when_interpreted():
    """In a process of its own, since Triton decides at import whether kernels are interpreted."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "all_reduce_norm_interpreted.py"]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
        timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    ("capability", "ranks", "warps", "parts"),
    [
        (80, 2, 16, 0),
        (90, 2, 16, 0),
        (90, 4, 16, 0),
        (90, 8, 16, 0),
        (90, 4, 8, 0),
        (90, 4, 16, 6),
        (90, 8, 16, 8),
        (100, 8, 16, 0),
        (120, 4, 16, 0),
    ],
)
def test_kernel_compiles_without_a_gpu(capability, ranks, warps, parts):
    """Through ptxas, so that the PTX of the exchange is read by the one who must accept it."""
    triton = pytest.importorskip("triton")
    from sglang.srt.layers import minimax_all_reduce_norm as module
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, messages = module._all_reduce_norm_kernel, module.messages_per_row(3072)
    constants = {
        "HIDDEN_SIZE": 3072, "MESSAGES": messages, "BLOCK": 32 * warps, "RANKS": ranks, "PDL": capability >= 90,
        "POLL": module.poll_assembly(ranks, messages), "OPERANDS": module.poll_operands(ranks),
        "PARTS": parts, "HAS_IDS": parts == 8,
    }  # fmt: skip

    def type_of(name):
        if name in constants:
            return "constexpr"
        special = {"inboxes_ptr": "*i64", "epochs_ptr": "*i32", "ids_ptr": "*i32", "eps": "fp32"}
        special |= {"x_ptr": "*fp32"} if parts else {}
        return special.get(name, "*bf16" if name.endswith("_ptr") else "i32")

    source = ASTSource(kernel, {name: type_of(name) for name in kernel.arg_names}, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    ptx, chunks = compiled.asm["ptx"], messages // (32 * warps)
    assert ptx.count("st.relaxed.sys.global.b128") == chunks * (ranks - 1), "each message is sent once to each peer"
    assert ptx.count("ld.relaxed.sys.global.b128") == chunks * ranks, "and polled for in one place"
    assert len(compiled.asm["cubin"]) > 0


def test_plans_hold_all_rows_that_are_planned_for():
    from sglang.srt.layers import minimax_all_reduce_norm as module
    from sglang.srt.layers.minimax_all_reduce_norm_paths import MAX_TOKENS
    from sglang.srt.layers.minimax_nvlink import REGISTERS_PER_SM
    from sglang.srt.layers.minimax_qk_norm_paths import EXCHANGE_RANKS

    assert set(MAX_TOKENS) == set(EXCHANGE_RANKS)
    fits = [plan.ctas_per_sm for plan in module.PLANS]
    assert fits == sorted(fits), "the first plan that holds all rows is taken"
    for plan in module.PLANS:
        threads = 32 * plan.num_warps * plan.ctas_per_sm
        assert threads <= 1536, "more than the smallest multiprocessor holds"
        assert threads * plan.registers_per_thread <= REGISTERS_PER_SM, "waiting CTAs must all be resident"
        assert plan.registers_per_thread >= 64
    for ranks in MAX_TOKENS:
        for multiprocessors in (1, 33, 132):
            rows = module.rows_that_fit(multiprocessors, ranks)
            assert 0 < rows <= MAX_TOKENS[ranks]
            assert all(any(plan.takes(count, multiprocessors) for plan in module.PLANS) for count in range(1, rows + 1))


class AddedByHand:
    """Stands in for a group: its all-reduce adds what the other ranks are said to have, in place as gloo does."""

    def __init__(self, others: torch.Tensor) -> None:
        self.others = others

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(self.others)


def in_float64(x, residual, weight):
    total = x.double() + residual.double()
    return total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS) * weight.double(), total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_torch_path_agrees_with_float64(tokens, dtype):
    from sglang.srt.layers.minimax_all_reduce_norm import AllReduceNorm

    torch.manual_seed(tokens)
    x, others, residual = (torch.randn(tokens, HIDDEN_SIZE).to(dtype) for _ in range(3))
    weight = torch.randn(HIDDEN_SIZE).to(dtype)
    whole = (x.float() + others.float()).to(dtype)  # an all-reduce in this dtype
    want_normed, want_sum = in_float64(whole, residual, weight)
    operator = AllReduceNorm(AddedByHand(others), None, max_tokens=3)
    normed, kept = operator(x, residual, weight, EPS, layer_id=0)
    assert kept is residual and normed.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    for got, want in ((normed, want_normed), (residual, want_sum)):
        assert ((got.double() - want).abs() <= tolerance * (want.abs() + 1e-3)).all()


def test_the_operator_traces_whole_and_names_what_it_writes(monkeypatch):
    """As the engine compiles the forward: no graph break, one graph for all numbers of tokens, the residual's new
    value seen behind it."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")  # a host without a GPU sets it to 1
    from sglang.srt.layers.minimax_all_reduce_norm import AllReduceNorm
    from torch._dynamo.backends.debugging import aot_eager

    weight = torch.randn(HIDDEN_SIZE)
    operator = AllReduceNorm(AddedByHand(torch.ones(HIDDEN_SIZE)), None, max_tokens=4)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return aot_eager(graph, example_inputs)

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def compiled(x, residual):
        normed, kept = operator(x * 1.0, residual, weight, 1e-6, 3)
        return normed + 0, kept * 2

    for tokens in (3, 5, 9):
        x, residual = torch.randn(tokens, HIDDEN_SIZE), torch.randn(tokens, HIDDEN_SIZE)
        want_normed, want_sum = in_float64(x + 1, residual, weight)
        normed, twice = compiled(x, residual)
        torch.testing.assert_close(normed.double(), want_normed, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(twice.double(), 2 * want_sum, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(residual.double(), want_sum, rtol=1e-6, atol=1e-6)
    assert len(graphs) == 1


def exchange_in_one_process(ranks: int, max_tokens: int = 4):
    from sglang.srt.layers.minimax_all_reduce_norm import RowExchange, inbox_bytes

    inbox = torch.zeros(inbox_bytes(ranks, HIDDEN_SIZE, max_tokens), dtype=torch.uint8)
    return RowExchange(inbox, [inbox.data_ptr()] * ranks, 0, HIDDEN_SIZE, max_tokens, 2)


def test_launches_take_the_first_plan_that_holds_all_rows(monkeypatch):
    from sglang.srt.layers import minimax_all_reduce_norm as module

    launches = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: launches.append((grid, arguments, constants))

    monkeypatch.setattr(module, "_all_reduce_norm_kernel", Kernel())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    operator = module.AllReduceNorm(None, exchange_in_one_process(4))
    weight = torch.ones(HIDDEN_SIZE, dtype=torch.bfloat16)
    monkeypatch.setattr(module, "PLANS", (module.Plan(8, 1, 1), module.Plan(16, 1), module.Plan(16, 2)))
    for tokens in (1, 2, 3, 4):
        x, residual = (torch.zeros(tokens, HIDDEN_SIZE, dtype=torch.bfloat16) for _ in range(2))
        normed, kept = operator(x, residual, weight, EPS, 7)
        grid, arguments, constants = launches.pop()
        plan = module.PLANS[(0, 1, 2, 2)[tokens - 1]]  # on two multiprocessors
        assert grid == (tokens,) and constants["num_warps"] == plan.num_warps
        assert constants["maxnreg"] == plan.registers_per_thread and constants["RANKS"] == 4
        assert any(argument is operator.exchange.epochs for argument in arguments)
        assert kept is residual and normed.data_ptr() != x.data_ptr()
        assert arguments[-2] == 7 and arguments[-1] < 300_000, "a graph's replay does not wait for a compiling peer"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.zeros(3, 7)}, "x has shape"),
        ({"x": torch.zeros(3, HIDDEN_SIZE)}, "of torch.bfloat16"),
        ({"residual": torch.zeros(2, HIDDEN_SIZE, dtype=torch.bfloat16)}, "residual has shape"),
        ({"residual": torch.zeros(HIDDEN_SIZE, 3, dtype=torch.bfloat16).T}, "strides"),
        ({"weight": torch.zeros(5, dtype=torch.bfloat16)}, "weight has shape"),
    ],
)
def test_errors_name_the_value_and_the_rule(change, said):
    from sglang.srt.layers.minimax_all_reduce_norm import AllReduceNorm

    operator = AllReduceNorm(None, exchange_in_one_process(2))
    given = {name: torch.zeros(3, HIDDEN_SIZE, dtype=torch.bfloat16) for name in ("x", "residual")}
    given["weight"] = torch.zeros(HIDDEN_SIZE, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=said):
        operator(**{**given, **change}, eps=EPS, layer_id=0)


def test_an_exchange_refuses_an_inbox_of_another_size():
    from sglang.srt.layers.minimax_all_reduce_norm import RowExchange, inbox_bytes

    size = inbox_bytes(2, HIDDEN_SIZE, 4)
    assert size == 2 * 4 * 2 * 16 * 16
    inbox = torch.zeros(size - 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"4 rows of 96 values of 2 ranks need {size} of uint8"):
        RowExchange(inbox, [inbox.data_ptr(), 0], 0, HIDDEN_SIZE, 4, 2)


# ---------------------------------------------------------------- who takes it

MINE = {"num_ranks": 4, "hidden_size": 3072, "dp_attention": False}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"num_ranks": 1}, "nothing to reduce"),
        ({"num_ranks": 16}, "these are 16"),
        ({"cuda": False}, "NVIDIA"),
        ({"flashinfer": True}, "--enable-flashinfer-allreduce-fusion was given"),
        ({"bfloat16": False}, "bfloat16"),
        ({"hidden_size": 3076}, "3076 is not a multiple of 8"),
        ({"dp_attention": True}, "under DP attention"),
        ({"attn_cp_size": 2}, "context parallelism"),
        ({"moe_dp_size": 2}, "data-parallel groups"),
        ({"moe_a2a_backend": "deepep"}, "--moe-a2a-backend deepep"),
        ({"two_batch_overlap": True}, "two-batch overlap"),
        ({"deterministic": True}, "not deterministic"),
        ({"pdmux": True}, "--enable-pdmux"),
        ({"memory_saver": True}, "--enable-memory-saver"),
    ],
)
def test_rules(change, said):
    from sglang.srt.layers.minimax_all_reduce_norm_paths import reason_against_one_launch

    reason = reason_against_one_launch(**{**MINE, **change})
    assert reason is None if said is None else said in reason


def a_server_that_takes_one_launch(monkeypatch, **arguments) -> tuple[SimpleNamespace, SimpleNamespace]:
    """Its arguments, which the communicator's module reads, and the norm of a layer on one of two GPUs in reach."""
    from sglang.srt.layers import minimax_layer_communicator as module

    args = SimpleNamespace(
        attn_cp_size=1, moe_a2a_backend="none", enable_two_batch_overlap=False, enable_deterministic_inference=False,
        enable_pdmux=False, enable_memory_saver=False, enable_flashinfer_allreduce_fusion=False,
    )  # fmt: skip
    vars(args).update(arguments)
    monkeypatch.setattr(module, "_operators", {})
    monkeypatch.setattr(module, "get_global_server_args", lambda: args)
    monkeypatch.setattr(module, "get_tp_group", lambda: SimpleNamespace(unique_name="tp:0", world_size=2))
    monkeypatch.setattr(module, "get_moe_data_parallel_world_size", lambda: 1)
    monkeypatch.setattr(module, "is_dp_attention_enabled", lambda: False)
    monkeypatch.setattr(module, "is_cuda", lambda: True)
    monkeypatch.setattr(module, "peers_are_reachable", lambda group, device: True)
    monkeypatch.setattr(module, "build", lambda group, norm: SimpleNamespace(max_tokens=256))
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.bfloat16)
    weight = SimpleNamespace(dtype=torch.bfloat16, device="cuda:0", is_cuda=True)
    return args, SimpleNamespace(hidden_size=3072, weight=weight)


@pytest.mark.parametrize(
    ("asked", "by_default", "reachable", "taken", "flashinfer"),
    [
        (False, False, True, True, False),  # nobody asked for FlashInfer, as with its --enforce-disable flag
        (False, True, True, True, False),  # on for want of ours, which there is
        (True, False, True, False, True),  # a person asked
        (False, True, False, False, True),  # no NVLink: FlashInfer stays on
        (False, False, False, False, False),
    ],
)
def test_the_one_launch_goes_before_flashinfers_unless_a_person_asked(
    monkeypatch, asked, by_default, reachable, taken, flashinfer
):
    from sglang.srt.layers import minimax_layer_communicator as module
    from sglang.srt.layers.minimax_all_reduce_norm_paths import FLASHINFER_BY_DEFAULT

    args, norm = a_server_that_takes_one_launch(monkeypatch, enable_flashinfer_allreduce_fusion=asked or by_default)
    if by_default:
        setattr(args, FLASHINFER_BY_DEFAULT, True)
    monkeypatch.setattr(module, "peers_are_reachable", lambda group, device: reachable)
    first = module.one_launch_for(norm)
    assert (first is not None) == taken and module.one_launch_for(norm) is first
    assert args.enable_flashinfer_allreduce_fusion == flashinfer


@pytest.mark.parametrize(
    ("argument", "value", "said"),
    [
        ("attn_cp_size", 2, "context parallelism"),
        ("moe_a2a_backend", "deepep", "--moe-a2a-backend deepep"),
        ("enable_two_batch_overlap", True, "two-batch overlap"),
        ("enable_deterministic_inference", True, "not deterministic"),
        ("enable_pdmux", True, "--enable-pdmux"),
        ("enable_memory_saver", True, "--enable-memory-saver"),
        ("enable_flashinfer_allreduce_fusion", True, "--enable-flashinfer-allreduce-fusion was given"),
        ("forward_hooks", [{}], "--forward-hooks"),
    ],
)
def test_each_rule_reads_the_servers_own_argument(monkeypatch, argument, value, said):
    from sglang.srt.layers import minimax_layer_communicator as module

    _, norm = a_server_that_takes_one_launch(monkeypatch)
    assert module.reason_against(norm) is None
    _, norm = a_server_that_takes_one_launch(monkeypatch, **{argument: value})
    assert said in module.reason_against(norm) and module.one_launch_for(norm) is None


@pytest.mark.parametrize(
    ("where", "name", "value", "said"),
    [
        ("module", "is_dp_attention_enabled", True, "under DP attention"),
        ("module", "get_moe_data_parallel_world_size", 2, "data-parallel groups"),
        ("module", "is_cuda", False, "NVIDIA"),  # on ROCm a tensor's is_cuda is true as well
        ("torch", "get_default_dtype", torch.float32, "bfloat16"),  # of activations, beside weights in bfloat16
    ],
)
def test_each_rule_asks_the_engine_what_it_runs(monkeypatch, where, name, value, said):
    from sglang.srt.layers import minimax_layer_communicator as module

    _, norm = a_server_that_takes_one_launch(monkeypatch)
    monkeypatch.setattr({"module": module, "torch": torch}[where], name, lambda: value)
    assert said in module.reason_against(norm)


@pytest.mark.parametrize(
    ("wrong_by", "said"),
    [(lambda total: total, None), (lambda total: total * 1.05, "the sum of 1 rows is"), (torch.zeros_like, "off in")],
)
def test_an_operator_is_tried_out_before_it_serves(wrong_by, said):
    """A group of one rank: its own part is the sum."""
    from sglang.srt.layers.minimax_all_reduce_norm import AllReduceNorm

    group = SimpleNamespace(world_size=1, rank_in_group=0, all_reduce=wrong_by)
    found = AllReduceNorm(group, None, max_tokens=9).check(torch.empty(HIDDEN_SIZE, dtype=torch.bfloat16))
    assert found is None if said is None else said in found


def test_a_rank_that_finds_a_fault_launches_as_often_as_the_others():
    """They wait for its rows."""
    from sglang.srt.layers.minimax_all_reduce_norm import AllReduceNorm

    def launches(all_reduce) -> int:
        calls = []
        group = SimpleNamespace(world_size=1, rank_in_group=0)
        group.all_reduce = lambda x: calls.append(x) or all_reduce(x)
        AllReduceNorm(group, None, max_tokens=9).check(torch.empty(HIDDEN_SIZE, dtype=torch.bfloat16))
        return len(calls)

    assert launches(torch.zeros_like) == launches(lambda x: x) == 12


def test_the_trial_does_not_wait_as_long_as_a_server_that_compiles(monkeypatch):
    from sglang.srt.layers import minimax_all_reduce_norm as module

    limits_ms = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: limits_ms.append(arguments[-1])

    monkeypatch.setattr(module, "_all_reduce_norm_kernel", Kernel())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    operator = module.AllReduceNorm(SimpleNamespace(world_size=2, rank_in_group=0), exchange_in_one_process(2))
    weight = torch.ones(HIDDEN_SIZE, dtype=torch.bfloat16)
    operator.check(weight)
    assert len(limits_ms) == 8 and max(limits_ms) < 300_000
    operator(*(torch.zeros(1, HIDDEN_SIZE, dtype=torch.bfloat16) for _ in range(2)), weight, EPS, 0)
    assert limits_ms[-1] > 300_000


def test_a_trial_that_fails_is_told_to_the_peers(monkeypatch):
    """They wait to hear from this rank, whatever has become of its GPU."""
    from sglang.srt.layers import minimax_layer_communicator as module

    class Failing:
        def __init__(self, group, exchange) -> None: ...

        def check(self, weight):
            raise RuntimeError("unspecified launch failure\nand much advice")

    told = []

    def gather(mine):
        told.append(mine)
        return [mine, None]

    monkeypatch.setattr(module, "AllReduceNorm", Failing)
    monkeypatch.setattr(module, "row_exchange_of", lambda group, device, hidden_size: None)
    norm = SimpleNamespace(weight=torch.ones(HIDDEN_SIZE), hidden_size=HIDDEN_SIZE)
    with pytest.raises(RuntimeError, match=r"rank 0: RuntimeError: unspecified launch failure\).*--disable") as raised:
        module.build(SimpleNamespace(all_gather_object=gather), norm)
    assert told == ["RuntimeError: unspecified launch failure"] and "launch failure" in str(raised.value.__cause__)


def test_a_wrong_operator_ends_every_rank_with_the_way_out():
    from sglang.srt.layers import minimax_layer_communicator as module

    group = SimpleNamespace(all_gather_object=lambda mine: [mine, "the sum of 7 rows is 3 off"])
    with pytest.raises(RuntimeError, match=r"rank 1: the sum of 7 rows is 3 off.*--disable-custom-all-reduce"):
        module.raise_if_wrong(group, None)
    module.raise_if_wrong(SimpleNamespace(all_gather_object=lambda mine: [mine, None]), None)


class Recorded:
    """Stands in for the operator."""

    max_tokens = 4

    def __init__(self) -> None:
        self.calls: list = []

    def __call__(self, x, residual, weight, eps, layer_id):
        self.calls.append((x.shape[0], residual, weight, eps, layer_id))
        return x, residual


def communicator(operator, is_last_layer=False):
    from sglang.srt.layers.minimax_layer_communicator import MiniMaxM2LayerCommunicator

    made = MiniMaxM2LayerCommunicator.__new__(MiniMaxM2LayerCommunicator)
    made.layer_id, made.all_reduce_norm, made.is_last_layer = 5, operator, is_last_layer
    made.input_layernorm = SimpleNamespace(weight="input", variance_epsilon=1e-5)
    made.post_attention_layernorm = SimpleNamespace(weight="post", variance_epsilon=1e-6)
    return made


@pytest.mark.parametrize(("tokens", "ours"), [(0, False), (1, True), (4, True), (5, False)])
def test_the_number_of_tokens_decides(monkeypatch, tokens, ours):
    from sglang.srt.layers import minimax_layer_communicator as module
    from sglang.srt.layers.communicator import LayerCommunicator

    monkeypatch.setattr(LayerCommunicator, "prepare_mlp", lambda self, *arguments: "the engine's")
    monkeypatch.setattr(module, "get_moe_data_parallel_world_size", lambda: 1)
    operator = Recorded()
    made = communicator(operator)
    x, residual = torch.zeros(tokens, 8), torch.zeros(tokens, 8)
    got = made.prepare_mlp(x, residual, None)
    assert operator.calls == ([(tokens, residual, "post", 1e-6, 5)] if ours else [])
    assert got == "the engine's" if not ours else got[1] is residual
    batch = SimpleNamespace(input_ids=x)
    assert made.should_fuse_mlp_allreduce_with_next_layer(batch) is ours
    assert communicator(operator, is_last_layer=True).should_fuse_mlp_allreduce_with_next_layer(batch) is False


def test_only_a_deferred_sum_is_taken_over(monkeypatch):
    from sglang.srt.layers.communicator import LayerCommunicator

    monkeypatch.setattr(LayerCommunicator, "prepare_attn", lambda self, *arguments: "the engine's")
    operator = Recorded()
    made = communicator(operator)
    x, residual, addition = torch.ones(2, 8), torch.ones(2, 8), torch.ones(2, 8)
    assert made.prepare_attn(x, residual, None) == "the engine's" and not operator.calls
    x._sglang_needs_allreduce_fusion = True
    assert communicator(None).prepare_attn(x, residual, None) == "the engine's"
    assert made.prepare_attn(x, residual, None)[1] is residual
    _, kept = made.prepare_attn(x, residual, None, post_residual_addition=addition)
    assert (kept == 2).all() and [call[2:] for call in operator.calls] == [("input", 1e-5, 5)] * 2


@pytest.mark.parametrize(
    ("folder", "hooks", "watched"), [(None, None, False), (None, [], False), ("dumps", None, True), (None, [{}], True)]
)
def test_parts_are_left_where_nobody_reads_what_modules_return(monkeypatch, folder, hooks, watched):
    """--debug-tensor-dump-output-folder and --forward-hooks do, and take it for tensors."""
    from sglang.srt.layers import minimax_layer_communicator as module
    from sglang.srt.layers.communicator import LayerCommunicator

    args = SimpleNamespace(debug_tensor_dump_output_folder=folder, forward_hooks=hooks)
    monkeypatch.setattr(module, "get_global_server_args", lambda: args)
    monkeypatch.setattr(LayerCommunicator, "__init__", lambda self: None)
    made = module.MiniMaxM2LayerCommunicator(5, Recorded())
    assert [made.adds_parts(tokens) for tokens in (0, 1, 4, 5)] == [False, not watched, not watched, False]
