"""QK norm + RoPE + store on one rank: against float64, for many layouts, in plain torch and in the kernel interpreted.

Ranks are played one after the other in this process: their partial sums are added by hand, as the all-reduce would.
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from sglang_minimax import overlay

overlay.install()

HEAD_DIM, ROTARY_DIM, EPS = 32, 16, 1e-6


def brute_force(q, k, q_weight, k_weight, positions, cos_sin):
    """The whole model's q and k rows, normed and rotated in float64, one value at a time in spirit."""

    def norm(x, weight):
        x = x.double()
        return x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + EPS) * weight.double()

    def rope(x):
        x = x.unflatten(-1, (-1, HEAD_DIM))
        out = x.clone()
        half = ROTARY_DIM // 2
        for token, position in enumerate(positions.tolist()):
            for i in range(half):
                cos, sin = cos_sin[position, i].double(), cos_sin[position, half + i].double()
                out[token, :, i] = x[token, :, i] * cos - x[token, :, i + half] * sin
                out[token, :, i + half] = x[token, :, i + half] * cos + x[token, :, i] * sin
        return out.flatten(1)

    return rope(norm(q, q_weight)), rope(norm(k, k_weight))


class AddedByHand:
    """Stands in for a group: ``all_reduce`` gives the sum that was computed over all ranks beforehand."""

    def __init__(self, ranks: int, rank: int) -> None:
        self.world_size, self.rank_in_group, self.total = ranks, rank, None

    def all_reduce(self, sums: torch.Tensor) -> torch.Tensor:
        return self.total


def in_parts(row: torch.Tensor, number: int) -> torch.Tensor:
    """[number, tokens, width] float32, whose sum is ``row`` in every order: what is added is taken away again."""
    factors = [1.0, 1.0, -1.0, 2.0, -2.0, 0.0][:number]
    factors[0] -= sum(factors) - 1
    return torch.stack([factor * row.float() for factor in factors])


def run_layout(heads, kv_heads, ranks, tokens, dtype, weight_dtype, interpreted, rows=1, ctas=None, nodes=1, parts=0):
    from sglang.srt.layers.minimax_parts import Parts
    from sglang.srt.layers.minimax_qk_norm import sums_of_squares
    from sglang.srt.layers.minimax_qk_norm_rope import LaunchPlan, QKNormRope
    from sglang.srt.layers.minimax_sharding import counterpart_of, shard_attention

    torch.manual_seed(heads * 1000 + kv_heads * 100 + ranks * 10 + tokens)
    whole = SimpleNamespace(
        q=torch.randn(tokens, heads * HEAD_DIM).to(dtype) * 3,
        k=torch.randn(tokens, kv_heads * HEAD_DIM).to(dtype),
        v=torch.randn(tokens, kv_heads * HEAD_DIM).to(dtype),
        q_weight=torch.randn(heads * HEAD_DIM).to(weight_dtype),
        k_weight=torch.randn(kv_heads * HEAD_DIM).to(weight_dtype),
    )
    positions = torch.randint(0, 100, (tokens,))
    cos_sin = torch.randn(100, ROTARY_DIM)
    slots = torch.randperm(tokens + 3)[:tokens]
    want_q, want_k = brute_force(whole.q, whole.k, whole.q_weight, whole.k_weight, positions, cos_sin)
    shards = shard_attention(heads, kv_heads, ranks)

    def part(x, heads_of_rank):
        return x[..., heads_of_rank.start * HEAD_DIM : heads_of_rank.stop * HEAD_DIM]

    def node_of(rank):
        return AddedByHand(ranks // 2, rank % (ranks // 2)) if nodes == 2 else None

    operators = [
        QKNormRope(heads, kv_heads, HEAD_DIM, ROTARY_DIM, EPS, AddedByHand(ranks, rank), 0, "cpu", node=node_of(rank))
        for rank in range(ranks)
    ]
    mine = [(shards.q.heads_of(rank), shards.kv.heads_of(rank)) for rank in range(ranks)]
    sums = sum(sums_of_squares(part(whole.q, q), part(whole.k, kv)) for q, kv in mine)
    for rank, (operator, (q_heads, kv_heads_of_rank)) in enumerate(zip(operators, mine, strict=True)):
        operator.group.total = sums
        row = torch.cat([part(whole.q, q_heads), part(whole.k, kv_heads_of_rank), part(whole.v, kv_heads_of_rank)], -1)
        if nodes == 2:
            others_q, others_k = mine[counterpart_of(rank, ranks)]
            row = torch.cat([row, part(whole.q, others_q), part(whole.k, others_k)], -1)
        wide = torch.full((tokens, row.shape[1] + 16), float("nan"), dtype=dtype)
        qkv = wide[:, : row.shape[1]].copy_(row)  # rows at a stride, with poison between them
        k_cache = torch.full((tokens + 3, len(kv_heads_of_rank), HEAD_DIM), 7.0, dtype=dtype)
        v_cache = k_cache.clone()
        weights = part(whole.q_weight, q_heads), part(whole.k_weight, kv_heads_of_rank)
        arguments = (*weights, positions, cos_sin, k_cache, v_cache, slots)
        values = None
        if parts:
            values = in_parts(row, parts)
            assert torch.equal(Parts(values, dtype=dtype).summed(), row)
        if interpreted and tokens:
            given = None if operator.num_ranks == 1 else sums
            q = torch.empty(tokens, operator.sizes[0], dtype=dtype)
            if parts:
                qkv[:, operator.sizes[0] :] = torch.nan  # k and v are written, and not read
            operator._launch(ctas or tokens, LaunchPlan(1, 1, rows), qkv, q, *arguments, sums=given, parts=values)
            raw_q, k, v, *_ = qkv.split(operator.row_sizes, dim=-1)
        else:
            q, k, v = operator(Parts(values, dtype=dtype) if parts else qkv, *arguments)
            raw_q = qkv[:, : operator.sizes[0]]
        assert q.is_contiguous() and torch.equal(raw_q, part(whole.q, q_heads)), "the raw q is left as it was"
        tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        if interpreted and dtype == torch.bfloat16:
            tolerance *= 2  # Triton's interpreter cuts float32 off to bfloat16 where a GPU rounds
        for got, want in ((q, part(want_q, q_heads)), (k, part(want_k, kv_heads_of_rank))):
            error = (got.double() - want).abs()
            assert (error <= tolerance * (want.abs() + 4)).all(), error.max()
        assert torch.equal(v, part(whole.v, kv_heads_of_rank))
        assert torch.equal(k_cache[slots].flatten(1), k) and torch.equal(v_cache[slots].flatten(1), v)
        untouched = torch.ones(tokens + 3, dtype=torch.bool).index_fill(0, slots, False)
        assert (k_cache[untouched] == 7).all() and (v_cache[untouched] == 7).all()
        assert wide[:, row.shape[1] :].isnan().all()


LAYOUTS = [(48, 8, 1), (12, 2, 1), (12, 2, 2), (12, 2, 4), (12, 2, 12), (16, 1, 4), (5, 5, 5), (6, 3, 3)]


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, kv_heads, ranks", LAYOUTS)
def test_torch_path_agrees_with_float64(heads, kv_heads, ranks, dtype, tokens):
    run_layout(heads, kv_heads, ranks, tokens, dtype, torch.float32, interpreted=False)


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("heads, kv_heads, ranks", [(12, 2, 2), (12, 2, 4), (48, 8, 16)])
def test_torch_path_over_two_nodes_agrees_with_float64(heads, kv_heads, ranks, tokens):
    run_layout(heads, kv_heads, ranks, tokens, torch.float32, torch.float32, interpreted=False, nodes=2)


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("heads, kv_heads, ranks", [(12, 2, 1), (12, 2, 4)])
def test_torch_path_takes_rows_in_parts(heads, kv_heads, ranks, tokens):
    run_layout(heads, kv_heads, ranks, tokens, torch.bfloat16, torch.float32, interpreted=False, parts=3)


def test_kernel_agrees_with_float64_when_interpreted():
    """In a process of its own, since Triton decides at import whether kernels are interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_the_operator_traces_and_names_what_it_writes(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")  # a host without a GPU sets it to 1
    from sglang.srt.layers.minimax_qk_norm_rope import QKNormRope

    operator = QKNormRope(4, 2, HEAD_DIM, ROTARY_DIM, EPS, None, 0, "cpu")
    weights = torch.ones(4 * HEAD_DIM), torch.ones(2 * HEAD_DIM)
    positions, cos_sin = torch.arange(3), torch.randn(8, ROTARY_DIM)
    qkv = torch.randn(3, 8 * HEAD_DIM)
    want = [part.clone() for part in operator(qkv.clone(), *weights, positions, cos_sin)]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(row):
        assert torch.compiler.is_compiling()
        q, k, v = operator((row * 1.0), *weights, positions, cos_sin)
        return q + 0, k + 0, v + 0

    for got, expected in zip(compiled(qkv), want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"qkv": torch.zeros(3, 7)}, "qkv has shape"),
        ({"q_weight": torch.ones(5)}, "q_weight has 5 values"),
        ({"positions": torch.arange(4)}, "positions has shape"),
        ({"cos_sin_cache": torch.zeros(8, 4)}, "cos_sin_cache has shape"),
        ({"k_cache": torch.zeros(9, 2, HEAD_DIM, dtype=torch.float16)}, "k_cache must be"),
        ({"out_cache_loc": None}, "out_cache_loc must have one slot"),
        ({"out_cache_loc": torch.arange(6)[::2]}, "one behind the other"),
        ({"positions": torch.arange(6)[::2]}, r"strides \(2,\), and must have one position"),
    ],
)
def test_errors_name_the_value_and_the_rule(change, said):
    from sglang.srt.layers.minimax_qk_norm_rope import QKNormRope

    operator = QKNormRope(4, 2, HEAD_DIM, ROTARY_DIM, EPS, None, 0, "cpu")
    arguments = {
        "qkv": torch.zeros(3, 8 * HEAD_DIM),
        "q_weight": torch.ones(4 * HEAD_DIM),
        "k_weight": torch.ones(2 * HEAD_DIM),
        "positions": torch.arange(3),
        "cos_sin_cache": torch.zeros(8, ROTARY_DIM),
        "k_cache": torch.zeros(9, 2, HEAD_DIM),
        "v_cache": torch.zeros(9, 2, HEAD_DIM),
        "out_cache_loc": torch.arange(3),
    }
    with pytest.raises(ValueError, match=said):
        operator(**{**arguments, **change})


@pytest.mark.parametrize("values_per_row", [256, 512, 1024, 2048, 4096])
def test_launch_plans_fit_the_multiprocessor_and_the_inbox(values_per_row):
    from sglang.srt.layers.minimax_nvlink import REGISTERS_PER_SM
    from sglang.srt.layers.minimax_qk_norm_paths import EXCHANGE_RANKS
    from sglang.srt.layers.minimax_qk_norm_rope import launch_plans
    from sglang.srt.layers.minimax_sum_exchange import ROWS_PER_CTA

    for plan in launch_plans(values_per_row):
        threads = 32 * plan.num_warps * plan.ctas_per_sm
        assert plan.ctas_per_sm <= 32 and threads <= 1536, "more than the smallest multiprocessor holds"
        assert 64 <= plan.registers_per_thread <= 255
        assert threads * plan.registers_per_thread <= REGISTERS_PER_SM, "waiting CTAs must all be resident"
        assert plan.rows * max(EXCHANGE_RANKS) <= 32, "one warp polls all messages"
        assert ROWS_PER_CTA % plan.rows == 0, "a turn must not run over the CTA's part of the inbox"


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.parametrize(
    "ranks, rows, once, counterpart, parts",
    [(1, 1, True, False, 0), (2, 1, True, False, 0), (4, 4, True, False, 0), (8, 2, False, False, 0),
     (1, 1, True, True, 0), (8, 1, True, True, 0), (8, 4, True, True, 0), (8, 2, False, True, 0),
     (1, 1, True, False, 6), (4, 1, True, False, 6)],
)  # fmt: skip
def test_kernel_compiles_without_a_gpu(capability, ranks, rows, once, counterpart, parts):
    """Through ptxas, so that the PTX of the exchange is read by the one who must accept it."""
    triton = pytest.importorskip("triton")
    from sglang.srt.layers import minimax_qk_norm_rope as module
    from sglang.srt.layers.minimax_sum_exchange import poll_assembly
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = module._qk_norm_rope_kernel
    constants = {
        "NUM_HEADS": 12, "NUM_KV_HEADS": 2, "HEADS_BLOCK": 16, "HEAD_DIM": 128, "STORE": True, "SUMS_GIVEN": False,
        "ROWS": rows, "ONCE": once, "RANKS": ranks, "PDL": capability >= 90, "PACKED": capability >= 90, "SLOTS": 16,
        "COUNTERPART": counterpart, "POLL": poll_assembly(rows, ranks) if ranks > 1 else "", "sums_ptr": None,
        "PARTS": parts,
    }  # fmt: skip
    if ranks == 1:
        constants |= {"inboxes_ptr": None, "epochs_ptr": None}
    int64 = {"positions_ptr", "out_cache_loc_ptr", "inboxes_ptr", "epochs_ptr"}
    float32 = {"cos_sin_ptr", "q_weight_ptr", "k_weight_ptr"} | ({"parts_ptr"} if parts else set())

    def type_of(name):
        if name in constants:
            return "constexpr"
        if name.endswith("_ptr"):
            return "*i64" if name in int64 else "*fp32" if name in float32 else "*bf16"
        return "fp32" if name == "eps" else "i32"

    source = ASTSource(kernel, {name: type_of(name) for name in kernel.arg_names}, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 2})
    polls = "ld.relaxed.sys.global.b128" in compiled.asm["ptx"]
    assert polls == (ranks > 1) and len(compiled.asm["cubin"]) > 0


def exchanges_in_one_process(ranks: int, multiprocessors: int, ctas_per_sm: int):
    """An exchange a rank, whose inboxes are tensors of this process."""
    from sglang.srt.layers.minimax_sum_exchange import SumExchange, inbox_bytes

    size = inbox_bytes(ranks, multiprocessors * ctas_per_sm)
    inboxes = [torch.zeros(size, dtype=torch.uint8) for _ in range(ranks)]
    addresses = [inbox.data_ptr() for inbox in inboxes]
    return [SumExchange(inbox, addresses, rank, multiprocessors, ctas_per_sm) for rank, inbox in enumerate(inboxes)]


@pytest.mark.parametrize(
    "ranks, heads, kv_heads, in_graph", [(2, 4, 2, False), (4, 8, 2, True), (8, 48, 8, False), (8, 48, 4, True)]
)
def test_an_exchange_that_is_given_is_the_one_that_is_launched(monkeypatch, ranks, heads, kv_heads, in_graph):
    """Every rank's launch gets everybody's addresses in rank order, its own rank, and grids of the same size.

    A peer that compiles for twenty minutes is waited for; one that does not come in a graph's replay is not.
    """
    from sglang.srt.layers import minimax_qk_norm_rope as module

    launches = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: launches.append((grid, arguments, constants))

    monkeypatch.setattr(module, "_qk_norm_rope_kernel", Kernel())
    monkeypatch.setattr(module, "has_programmatic_launch", lambda device: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: in_graph)
    given: list = []

    def exchange(rank):
        def of_width(ctas_per_sm):
            given[:] = given or exchanges_in_one_process(ranks, 3, ctas_per_sm)
            return given[rank]

        return of_width

    tokens = 300
    for rank in range(ranks):
        group = SimpleNamespace(world_size=ranks, rank_in_group=rank)
        operator = module.QKNormRope(
            heads, kv_heads, HEAD_DIM, ROTARY_DIM, EPS, group, 0, "cuda", exchange=exchange(rank)
        )
        qkv, q = torch.zeros(tokens, sum(operator.sizes)), torch.zeros(tokens, operator.sizes[0])
        weights = [torch.ones(size) for size in operator.sizes[:2]]
        operator.run(qkv, q, *weights, torch.zeros(tokens, dtype=torch.int64), torch.zeros(8, ROTARY_DIM), *3 * [None])
        assert operator.exchange is given[rank] and operator.exchange.max_ctas == given[0].max_ctas
        assert operator.exchange.inbox_addresses.tolist() == [each.inbox.data_ptr() for each in given]
    a_rank = len(launches) // ranks
    for number, (grid, arguments, constants) in enumerate(launches):
        rank = number // a_rank
        same_grid, _, same_constants = launches[number % a_rank]
        assert grid == same_grid and constants == same_constants and grid[0] <= given[rank].max_ctas
        assert constants["RANKS"] == ranks and any(argument is given[rank].epochs for argument in arguments)
        timeout_ms = arguments[-1]
        assert timeout_ms < 300_000 if in_graph else timeout_ms > 20 * 60_000
    sent = sum(arguments[0].shape[0] for _, arguments, _ in launches[:a_rank])
    assert sent == tokens, "chunks cover every token once"


def test_an_exchange_refuses_what_would_be_written_beside_its_inbox():
    from sglang.srt.layers.minimax_sum_exchange import SumExchange, inbox_bytes

    inbox = torch.zeros(inbox_bytes(2, 4) + 16, dtype=torch.uint8)
    exact = inbox[:-16]
    for bad, said in (
        ((inbox, [inbox.data_ptr(), 0], 0), f"need {inbox_bytes(2, 4)} of uint8"),
        ((exact.view(torch.int8), [inbox.data_ptr(), 0], 0), "values of torch.int8"),
        ((inbox[8:-8], [inbox.data_ptr() + 8, 0], 0), "aligned to 16"),
        ((exact, [inbox.data_ptr(), 0], 1), r"inbox_addresses\[1\] is not this rank's inbox"),
        ((exact, [inbox.data_ptr()], 0), "rank 0 of 1"),
        ((exact, [inbox.data_ptr()] * 9, 0), "rank 0 of 9"),
    ):
        with pytest.raises(ValueError, match=said):
            SumExchange(*bad, 2, 2)
    assert SumExchange(exact, [inbox.data_ptr(), 0], 0, 2, 2).max_ctas == 4


def test_a_warp_polls_no_more_messages_than_it_has_lanes():
    from sglang.srt.layers.minimax_sum_exchange import poll_assembly

    assert poll_assembly(4, 8).count("shfl.sync") == 64
    with pytest.raises(ValueError, match="32 messages at most"):
        poll_assembly(8, 8)


if __name__ == "__main__":
    for layout in [(12, 2, 1), (5, 5, 1), (12, 2, 4)]:
        for dtype, weight_dtype in ((torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)):
            run_layout(*layout, 3, dtype, weight_dtype, interpreted=True)
    for layout, number in (((12, 2, 1), 6), ((5, 5, 1), 4), ((12, 2, 4), 1)):
        run_layout(*layout, 3, torch.bfloat16, torch.float32, interpreted=True, parts=number)
    for rows, ctas in ((2, 2), (4, 1)):  # several rows a CTA, and rows that are not there
        run_layout(5, 5, 1, 3, torch.bfloat16, torch.float32, interpreted=True, rows=rows, ctas=ctas)
    for rows in (1, 2):  # a rank a node: its row holds all heads of both
        run_layout(12, 2, 2, 3, torch.bfloat16, torch.float32, interpreted=True, rows=rows, nodes=2)
    run_layout(12, 2, 4, 3, torch.bfloat16, torch.float32, interpreted=True, nodes=2)
    from sglang.srt.layers.minimax_qk_norm import scale_rows_triton, sums_of_squares_triton

    for own, others in (([96, 32], []), ([96, 32, 32], [96, 32])):
        parts = torch.randn(3, sum(own + others)).split(own + others, dim=-1)
        kept = [parts[0], parts[1], *(parts[3:] if others else ())]
        sums = sums_of_squares_triton(*kept)
        squares = [part.double().square().sum(-1) for part in kept]
        want = torch.stack([sum(squares[::2]), sum(squares[1::2])], -1)
        torch.testing.assert_close(sums[:3].double(), want, rtol=1e-6, atol=0)
        assert not sums[3:].any()
        weights, counts = [torch.rand(width) + 0.5 for width in own[:2]], (2 * own[0], 4 * own[1])
        normed = scale_rows_triton(parts[0], parts[1], *weights, sums, *counts, 0.25)  # an eps that shows
        for i, got in enumerate(normed):
            scaled = parts[i].double() * (want[:, i] / counts[i] + 0.25).rsqrt()[:, None] * weights[i].double()
            torch.testing.assert_close(got.double(), scaled, rtol=1e-5, atol=1e-6)
