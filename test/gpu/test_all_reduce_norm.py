"""All-reduce + residual add + RMSNorm in one launch on real GPUs: one process a GPU, rows sent over NVLink.

Every check compares with float64, or bit by bit with another rank or another run that must give the same.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if __name__ == "__main__":  # run by the tests below as a file, which finds no neighbours by itself
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu.processes import needs_gpus, run_processes, run_ranks, same_bits
from gpu.virtual_ranks import VARIANTS, Findings, VirtualRanks, first_difference, telling

from sglang_minimax import overlay

overlay.install()

HIDDEN_SIZE, EPS = 3072, 1e-6


# ---------------------------------------------------------------- what every process does


def start_rank(rank: int, world: int, port: int):
    """The engine's TP group over ``world`` GPUs of this host."""
    from sglang.srt import server_args
    from sglang.srt.distributed import parallel_state

    class NoServer:
        def __getattr__(self, name):
            return None

    arguments = NoServer()
    arguments.attn_cp_size, arguments.moe_a2a_backend = 1, "none"
    server_args.set_global_server_args_for_scheduler(arguments)
    torch.cuda.set_device(rank)
    parallel_state.init_distributed_environment(world, rank, f"tcp://127.0.0.1:{port}", rank, "nccl")
    parallel_state.initialize_model_parallel(world)
    return parallel_state.get_tp_group()


def draw(num_ranks: int, tokens: int, seed: int, hidden_size: int = HIDDEN_SIZE) -> SimpleNamespace:
    """The same on every rank: everybody's parts, residual and weight."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, device="cuda", generator=generator).bfloat16()

    return SimpleNamespace(
        parts=[2 * normal(tokens, hidden_size) for _ in range(num_ranks)],
        residual=normal(tokens, hidden_size),
        weight=1 + 0.2 * normal(hidden_size),
    )


def compare(data, output, roundings: int = 1) -> None:
    """With float64: ``roundings`` of the sum to bfloat16, and the result's own."""
    normed, residual = output
    total = torch.stack([part.double() for part in data.parts]).sum(0) + data.residual.double()
    want = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS) * data.weight.double()
    unit = torch.finfo(torch.bfloat16).eps / 2
    largest = max([part.abs().double().max().item() for part in data.parts], default=1.0) * len(data.parts)
    slack = 1.01 * unit if roundings == 1 else 3 * unit
    for name, got, expected in (("residual", residual, total), ("normed", normed, want)):
        floor = 4e-6 if roundings == 1 else unit * largest  # float32 sums; or a sum that was rounded at its own size
        far = ~((got.double() - expected).abs() <= slack * expected.abs() + floor)
        assert not far.any(), f"{name} of {len(got)} tokens: {first_difference(far, got, expected)}"


def call(operator, data, rank: int, layer_id: int = 0):
    return operator(data.parts[rank].clone(), data.residual.clone(), data.weight, EPS, layer_id)


def same_on_all_ranks(group, tensors) -> None:
    for name, tensor in zip(("normed", "residual"), tensors, strict=True):
        everyone = [torch.empty_like(tensor) for _ in range(group.world_size)]
        torch.distributed.all_gather(everyone, tensor.contiguous(), group=group.device_group)
        for rank, other in enumerate(everyone):
            assert same_bits(other, tensor), (
                f"{name} of rank {rank}: {first_difference(other != tensor, other, tensor)}"
            )


def check_parts(group, operator, rank: int, tokens: int, of_experts: bool) -> None:
    """Rows in float32 parts give the bits of their sum, in eager calls and in a graph; other ranks' parts are NaN."""
    from sglang.srt.layers.minimax_parts import Parts

    data = draw(group.world_size, tokens, seed=tokens)
    generator = torch.Generator("cuda").manual_seed(10 * tokens + rank)
    values = torch.randn(tokens, 8, HIDDEN_SIZE, device="cuda", generator=generator)
    ids = torch.arange(8, dtype=torch.int32, device="cuda").expand(tokens, 8).contiguous()
    if of_experts:
        values[:, 2::3] = torch.nan
        ids[:, 2::3] += 100
        parts = Parts(values.transpose(0, 1), ids + 40, first_expert=40, experts=8)
    else:
        parts = Parts(values[:, :6].transpose(0, 1).contiguous())
    whole = operator(parts.summed(), data.residual.clone(), data.weight, EPS, 0)
    assert all(map(same_bits, whole, operator(parts, data.residual.clone(), data.weight, EPS, 0)))
    residual, graph = data.residual.clone(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    torch.distributed.barrier()
    with torch.cuda.graph(graph):
        normed, _ = operator(parts, residual, data.weight, EPS, 0)
    for _ in range(20):
        residual.copy_(data.residual)
        graph.replay()
        assert all(map(same_bits, whole, (normed, residual)))


def one_launch(rank: int):
    """(the model's choice for a norm, which is tried out first, the norm)."""
    from sglang.srt.layers import minimax_layer_communicator
    from sglang.srt.layers.layernorm import RMSNorm

    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda", rank):
        norm = RMSNorm(HIDDEN_SIZE, eps=EPS)
    operator = minimax_layer_communicator.one_launch_for(norm)
    torch.set_default_dtype(torch.float32)
    return operator, norm


def check_rank(rank: int, world: int, port: int) -> None:
    from sglang.srt.layers.minimax_all_reduce_norm import minimax_all_reduce_norm

    group = start_rank(rank, world, port)
    operator, norm = one_launch(rank)
    assert operator is not None, "NVLink peers of one host, and the model takes the engine's way"
    limit = operator.max_tokens
    with torch.inference_mode():
        assert operator(*2 * [torch.empty(0, HIDDEN_SIZE).cuda().bfloat16()], norm.weight, EPS, 0)[0].shape[0] == 0
        for tokens in (1, 2, 3, 16, 64, 33, limit, limit - 1, 1):
            data = draw(world, tokens, seed=tokens)
            first = call(operator, data, rank)
            compare(data, first)
            same_on_all_ranks(group, first)
            assert all(map(same_bits, first, call(operator, data, rank))), "two runs, two results"
            residual = data.residual.clone()
            normed = minimax_all_reduce_norm(operator._handle, data.parts[rank].clone(), residual, data.weight, EPS, 0)
            assert all(map(same_bits, first, (normed, residual))), "the registered operator gives another result"
        for tokens, of_experts in ((1, False), (16, True), (64, False), (limit, True)):
            check_parts(group, operator, rank, tokens, of_experts)
        data = draw(world, limit + 1, seed=9)  # as a compiled graph would call it
        compare(data, call(operator, data, rank), roundings=2)
        check_graphs(group, operator, rank, [1, 3, 64, limit], replays=60)
    torch.cuda.synchronize()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def check_graphs(group, operator, rank: int, counts: list[int], replays: int) -> None:
    """Graphs of several sizes and two layers, replayed in one random order, eager calls in between, fresh inputs."""
    world, captured = group.world_size, {}
    for tokens in counts:
        data = draw(world, tokens, seed=tokens)
        x = [data.parts[rank].clone() for _ in range(2)]
        residual = [data.residual.clone() for _ in range(2)]

        def run(x=x, residual=residual, data=data):
            return [operator(x[layer], residual[layer], data.weight, EPS, layer) for layer in range(2)]

        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
        captured[tokens] = graph, x, residual, outputs, data
    order = random.Random(7)
    for turn in range(replays):
        tokens = order.choice(counts)
        graph, x, residual, outputs, data = captured[tokens]
        fresh = draw(world, tokens, seed=100 + turn)
        data.parts, data.residual = fresh.parts, fresh.residual
        for place in range(2):
            x[place].copy_(data.parts[rank])
            residual[place].copy_(data.residual)
        graph.replay()
        for launch, output in enumerate(outputs):
            with telling(f"rank {rank}, replay {turn}, launch {launch}"):
                compare(data, output)
        if turn % 5 == 0:
            expected = call(operator, data, rank)
            assert all(all(map(same_bits, expected, output)) for output in outputs), (
                f"replay {turn}: not an eager call's"
            )


def virtual_ranks(num_ranks: int, num_gpus: int, replays: int) -> None:
    """``num_ranks`` ranks on ``num_gpus`` GPUs: eager calls of every plan, then graphs that count what is wrong."""
    started, ranks = time.monotonic(), VirtualRanks(num_ranks, num_gpus)
    operators = [ranks.build_all_reduce_norm(rank, HIDDEN_SIZE) for rank in range(num_ranks)]
    limit, units = operators[0].max_tokens, ranks.num_multiprocessors
    counts = sorted({1, 2, 3, min(units, limit), min(units + 1, limit), limit})
    order, graphs = random.Random(num_ranks), {}
    for tokens in counts:
        data = [everyones(ranks, rank, tokens) for rank in range(num_ranks)]
        for rank, operator in enumerate(operators):
            ranks.rehearse(rank, lambda operator=operator, rank=rank, data=data: call(operator, data[rank][0], rank))
        wanted = [call_virtual(ranks, operators, data, variant, order) for variant in range(VARIANTS)]
        for rank, operator in enumerate(operators):
            of_rank = [outputs[rank] for outputs in wanted]
            graphs[tokens, rank] = capture_virtual(ranks, rank, operator, data[rank], of_rank)
        print(f"{tokens} tokens: eager calls right, captured, {time.monotonic() - started:.1f} s", flush=True)
    ranks.replay(graphs, replays, seed=num_ranks)
    print(f"{num_ranks} ranks on {num_gpus} GPUs: right, {time.monotonic() - started:.1f} s", flush=True)


def everyones(ranks, rank: int, tokens: int) -> list[SimpleNamespace]:
    with ranks.on(rank):
        return [draw(ranks.num_ranks, tokens, seed=1000 * variant + tokens) for variant in range(VARIANTS)]


def call_virtual(ranks, operators, data, variant: int, order: random.Random) -> list:
    """The outputs of all ranks, launched in any order, compared with float64 and with each other."""
    outputs, inputs = [], []
    for rank, of_rank in enumerate(data):
        with ranks.on(rank):
            mine = of_rank[variant]
            inputs.append((mine.parts[rank].clone(), mine.residual.clone()))
            kept = torch.empty_like(mine.residual)  # what a call allocates, before anybody waits
            del kept
    ranks.synchronize()
    launched = order.sample(range(ranks.num_ranks), ranks.num_ranks)
    with telling(f"an eager call of {len(inputs[0][0])} tokens, variant {variant}, ranks in order {launched}"):
        of_rank = {}
        for rank in launched:
            with ranks.on(rank):
                of_rank[rank] = operators[rank](*inputs[rank], data[rank][variant].weight, EPS, 0)
        ranks.synchronize()
        outputs = [of_rank[rank] for rank in range(ranks.num_ranks)]
        for rank, output in enumerate(outputs):
            with telling(f"rank {rank}"), ranks.on(rank):
                compare(data[rank][variant], output)
                for mine, first in zip(output, outputs[0], strict=True):
                    mine, first = mine.cpu(), first.cpu()
                    assert same_bits(mine, first), f"ranks differ: {first_difference(mine != first, mine, first)}"
    return outputs


def capture_virtual(ranks, rank: int, operator, data, wanted) -> tuple:
    """(graph of two launches, its findings, what it reads: a graph does not keep what was there before its capture)."""
    with ranks.on(rank):
        parts = torch.stack([of.parts[rank] for of in data])
        residuals, weights = torch.stack([of.residual for of in data]), torch.stack([of.weight for of in data])
        expected = [torch.stack(of) for of in zip(*wanted, strict=True)]
        findings = Findings(("normed", "residual"))

    def run():
        for launch in range(2):
            variant = findings.variant(launch)
            x, residual, weight = (of.index_select(0, variant)[0] for of in (parts, residuals, weights))
            output = operator(x, residual, weight, EPS, launch)
            for place, (got, want) in enumerate(zip(output, expected, strict=True)):
                findings.compare(launch, place, got, want.index_select(0, variant)[0])
        findings.next_turn()

    return ranks.capture(rank, run), findings, (parts, residuals, weights, expected)


def trial_of_a_wrong_rank(rank: int, world: int, port: int) -> None:
    """The last rank expects other values than it gets."""
    from sglang.srt.layers import minimax_all_reduce_norm as module

    if rank == world - 1:
        right = module.add_and_norm
        module.add_and_norm = lambda *arguments: right(*arguments) + 1
    end_of_trial(rank, world, port)


def trial_without_a_rank(rank: int, world: int, port: int) -> None:
    """The last rank fails before its first launch, so the others' launches trap, and their GPUs are lost to them."""
    from sglang.srt.layers import minimax_all_reduce_norm as module

    def fail(*arguments):
        raise RuntimeError("no kernel")

    module.GRAPH_TIMEOUT_SECONDS = 3.0
    if rank == world - 1:
        module.AllReduceNorm._check_rows = fail
    end_of_trial(rank, world, port)


def end_of_trial(rank: int, world: int, port: int) -> None:
    start_rank(rank, world, port)
    started = time.monotonic()
    try:
        one_launch(rank)
    except RuntimeError as error:
        print(f"ended after {time.monotonic() - started:.1f} s: {error}", flush=True)
        os._exit(3)
    os._exit(0)


def never_call(rank: int, world: int, port: int) -> None:
    """Rank 0 waits for rank 1, which is there when the buffer is built and never calls."""
    from sglang.srt.layers.minimax_all_reduce_norm import AllReduceNorm, row_exchange_of

    group = start_rank(rank, world, port)
    exchange = row_exchange_of(group, torch.device("cuda", rank), HIDDEN_SIZE)
    operator = AllReduceNorm(group, exchange, peer_timeout_seconds=1.5)
    if rank == 1:
        time.sleep(12)
        os._exit(0)
    data = draw(world, 4, seed=1)
    started = time.monotonic()
    try:
        call(operator, data, rank, layer_id=17)
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"trapped after {time.monotonic() - started:.1f} s: {str(error).splitlines()[0]}", flush=True)
        os._exit(3)
    os._exit(0)


# ---------------------------------------------------------------- the tests


@pytest.mark.parametrize("world", [pytest.param(n, marks=needs_gpus(n)) for n in (2, 4, 8)])
def test_all_token_counts_and_graphs(world):
    for rank, done in enumerate(run_ranks(__file__, "check_rank", world, seconds=200)):
        assert done.returncode == 0, f"rank {rank}:\n{done.stdout[-4000:]}"


@pytest.mark.parametrize(
    "num_ranks, num_gpus",
    [pytest.param(ranks, gpus, marks=needs_gpus(gpus)) for ranks, gpus in ((4, 1), (4, 2), (8, 2))],
)
def test_four_and_eight_ranks_on_fewer_gpus(num_ranks, num_gpus):
    calls = [["virtual_ranks", num_ranks, num_gpus, 300]]
    (done,) = run_processes(__file__, calls, seconds=120, CUDA_DEVICE_MAX_CONNECTIONS="32")
    assert done.returncode == 0 and "right" in done.stdout, done.stdout[-4000:]


@needs_gpus(2)
def test_a_dead_peer_traps_and_says_who_waited_for_whom():
    waiting, _ = run_ranks(__file__, "never_call", 2, seconds=120)
    assert waiting.returncode == 3, waiting.stdout[-4000:]
    assert "All-reduce + norm: no row of a peer" in waiting.stdout, waiting.stdout[-4000:]
    for operand in ("(operand 0) 17", "(operand 1) 0", "(operand 2) 1"):
        assert operand in waiting.stdout, waiting.stdout[-4000:]


@needs_gpus(2)
@pytest.mark.parametrize(
    ("trial", "said"), [("trial_of_a_wrong_rank", "rank 1: the norm of 1 rows"), ("trial_without_a_rank", "no kernel")]
)
def test_a_trial_that_one_rank_fails_ends_all_of_them(trial, said):
    for rank, done in enumerate(run_ranks(__file__, trial, 2, seconds=120)):
        assert done.returncode == 3 and said in done.stdout, f"rank {rank}:\n{done.stdout[-4000:]}"
        assert "--disable-custom-all-reduce" in done.stdout, f"rank {rank}:\n{done.stdout[-4000:]}"


if __name__ == "__main__":
    function, *numbers = sys.argv[1:]
    functions = [check_rank, never_call, trial_of_a_wrong_rank, trial_without_a_rank, virtual_ranks]
    {each.__name__: each for each in functions}[function](*map(int, numbers))
