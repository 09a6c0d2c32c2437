"""QK norm + RoPE + store on real GPUs: one process a GPU, sums swapped over NVLink.

Every check compares with float64, or bit by bit with another run that must give the same.
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
from gpu.virtual_ranks import VARIANTS, Findings, VirtualRanks

from sglang_minimax import overlay

overlay.install()

HEAD_DIM, ROTARY_DIM, EPS, MAX_POSITION = 128, 64, 1e-6, 4096
# ---------------------------------------------------------------- what every process does


def start_rank(rank: int, world: int, port: int):
    """The engine's attention-TP group over ``world`` GPUs of this host."""
    from sglang.srt import server_args
    from sglang.srt.distributed import parallel_state

    class NoServer:
        def __getattr__(self, name):
            return None

    server_args.set_global_server_args_for_scheduler(NoServer())
    torch.cuda.set_device(rank)
    parallel_state.init_distributed_environment(world, rank, f"tcp://127.0.0.1:{port}", rank, "nccl")
    parallel_state.initialize_model_parallel(world)
    return parallel_state.get_attn_tp_group()


def build(group, heads, kv_heads, layer_id=0, **options):
    from sglang.srt.layers.minimax_qk_norm_rope import QKNormRope

    device = torch.device("cuda", torch.cuda.current_device())
    return QKNormRope(heads, kv_heads, HEAD_DIM, ROTARY_DIM, EPS, group, layer_id, device, **options)


def draw(operator, heads, kv_heads, tokens, seed, dtype=torch.bfloat16, weight_dtype=torch.float32):
    """The same whole rows on every rank, and this rank's part of them, rows at a stride with poison between.

    With a counterpart the ranks are those of the first of two nodes, and its q and k follow in the row.
    """
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, device="cuda", generator=generator)

    from sglang.srt.layers.minimax_sharding import counterpart_of, shard_attention

    num_ranks = attention_ranks(operator)
    shards = shard_attention(heads, kv_heads, num_ranks)
    mine = [shards.q.heads_of(operator.rank), *2 * [shards.kv.heads_of(operator.rank)]]
    whole = [(normal(tokens, count * HEAD_DIM) * 2).to(dtype) for count in (heads, kv_heads, kv_heads)]
    weights = [(1 + 0.2 * normal(count * HEAD_DIM)).to(weight_dtype) for count in (heads, kv_heads)]
    part = [slice(of.start * HEAD_DIM, of.stop * HEAD_DIM) for of in mine]
    row = torch.cat([x[:, of] for x, of in zip(whole, part, strict=True)], dim=-1)
    v = slice(row.shape[1] - (part[2].stop - part[2].start), row.shape[1])
    if operator.has_counterpart:
        other = counterpart_of(operator.rank, num_ranks)
        for x, of in zip(whole[:2], (shards.q.heads_of(other), shards.kv.heads_of(other)), strict=True):
            row = torch.cat([row, x[:, of.start * HEAD_DIM : of.stop * HEAD_DIM]], dim=-1)
    wide = torch.full((tokens, row.shape[1] + 64), float("nan"), dtype=dtype, device="cuda")
    slots = torch.randperm(tokens + 9, device="cuda", generator=generator)[:tokens]
    cache = torch.full((2, tokens + 9, len(mine[1]), HEAD_DIM), 7.0, dtype=dtype, device="cuda")
    return SimpleNamespace(
        whole=whole, whole_weights=weights, part=part, v=v, row=row, wide=wide, qkv=wide[:, : row.shape[1]],
        weights=[w[of].contiguous() for w, of in zip(weights, part[:2], strict=True)], cache=cache,
        slots=slots, positions=torch.randint(0, MAX_POSITION, (tokens,), device="cuda", generator=generator),
        cos_sin=normal(MAX_POSITION, ROTARY_DIM),
    )  # fmt: skip


def attention_ranks(operator) -> int:
    return operator.num_ranks * (2 if operator.has_counterpart else 1)


def call(operator, data, store=True):
    data.qkv.copy_(data.row)
    cache = (data.cache[0], data.cache[1], data.slots) if store else ()
    return operator(data.qkv, *data.weights, data.positions, data.cos_sin, *cache)


def in_float64(x, weight, part, data):
    """This rank's part of the whole row, normed over all of it and rotated."""
    x = x.double()
    normed = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.double())[:, part]
    normed = normed.unflatten(-1, (-1, HEAD_DIM))
    cos, sin = data.cos_sin[data.positions].double()[:, None].chunk(2, dim=-1)
    a, b, rest = normed.split([ROTARY_DIM // 2, ROTARY_DIM // 2, HEAD_DIM - ROTARY_DIM], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).flatten(1)


def check(operator, data, store=True):
    """Returns q and k of a call after comparing everything that it wrote."""
    return compare(data, call(operator, data, store), store)


def compare(data, output, store=True):
    """Compares what a call wrote with float64, and what it must leave alone with what it was."""
    q, k, v = output
    assert q.is_contiguous() and torch.equal(data.qkv[:, : q.shape[1]], data.row[:, : q.shape[1]])
    unit = torch.finfo(data.row.dtype).eps / 2
    for got, x, weight, part in zip((q, k), data.whole, data.whole_weights, data.part, strict=False):
        want = in_float64(x, weight, part, data)
        worst = ((got.double() - want).abs() / (want.abs() + 2e-3)).max().item() if got.numel() else 0.0
        assert worst <= unit * 1.01, f"{tuple(got.shape)}: relative error {worst / unit:.3f} units of rounding"
    assert torch.equal(v, data.row[:, data.v])
    if store:
        assert torch.equal(data.cache[0][data.slots].flatten(1), k)
        assert torch.equal(data.cache[1][data.slots].flatten(1), v)
    untouched = torch.ones(data.cache.shape[1], dtype=torch.bool, device="cuda")
    if store:
        untouched[data.slots] = False
    assert (data.cache[:, untouched] == 7).all()
    assert data.wide[:, data.row.shape[1] :].isnan().all()
    return q, k


def same_on_replicas(group, operator, k, kv_heads):
    """Ranks that hold the same KV head must hold the same bits."""
    replicas = attention_ranks(operator) * operator.num_kv_heads // kv_heads
    everyone = [torch.empty_like(k, memory_format=torch.contiguous_format) for _ in range(operator.num_ranks)]
    torch.distributed.all_gather(everyone, k.contiguous(), group=group.device_group)
    for rank, other in enumerate(everyone):
        if rank // replicas == operator.rank // replicas:
            assert same_bits(other, k)


def check_token_counts(group, operator, heads, kv_heads, counts):
    for tokens in counts:
        data = draw(operator, heads, kv_heads, tokens, seed=tokens)
        q, k = check(operator, data)
        first = q.clone(), k.clone()
        if tokens:
            same_on_replicas(group, operator, k, kv_heads)
        assert all(map(same_bits, first, call(operator, data))), "two runs, two results"
        if operator.adds_parts and 0 < tokens <= 128 and data.row.dtype == torch.bfloat16:
            check_parts(operator, data, first)


def check_parts(operator, data, first) -> None:
    """Rows in float32 parts give the bits of their sum, and are stored as these are."""
    from sglang.srt.layers.minimax_parts import Parts

    factors = torch.tensor([1.0, 1.0, -1.0, 2.0, -2.0, 0.0], device="cuda")  # what is added is taken away again
    parts = Parts(factors[:, None, None] * data.row.float())
    assert torch.equal(parts.summed(), data.row)
    data.cache.fill_(7.0)
    q, k, v = operator(parts, *data.weights, data.positions, data.cos_sin, data.cache[0], data.cache[1], data.slots)
    assert all(map(same_bits, first, (q, k))) and torch.equal(v, data.row[:, data.v])
    assert torch.equal(data.cache[0][data.slots].flatten(1), k)
    assert torch.equal(data.cache[1][data.slots].flatten(1), v)


def check_graphs(group, heads, kv_heads, counts, replays):
    """Graphs of several sizes and layers, replayed in one random order, eager calls in between, fresh inputs."""
    layers = [build(group, heads, kv_heads, layer_id) for layer_id in range(3)]
    captured = {}
    for tokens in counts:
        data = draw(layers[0], heads, kv_heads, tokens, seed=tokens)
        copies = [data.qkv.clone() for _ in layers]

        def run(copies=copies, data=data):
            cache = data.cache[0], data.cache[1], data.slots
            return [
                layer(qkv, *data.weights, data.positions, data.cos_sin, *cache)
                for layer, qkv in zip(layers, copies, strict=True)
            ]

        for qkv in copies:
            qkv.copy_(data.row)
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
        captured[tokens] = graph, copies, outputs, data
    order = random.Random(7)
    for turn in range(replays):
        graph, copies, outputs, data = captured[order.choice(counts)]
        generator = torch.Generator("cuda").manual_seed(turn)
        data.whole = [torch.randn(x.shape, device="cuda", generator=generator).to(x.dtype) for x in data.whole]
        data.row = torch.cat([x[:, part] for x, part in zip(data.whole, data.part, strict=True)], dim=-1)
        for qkv in copies:
            qkv.copy_(data.row)
        graph.replay()
        expected = check(layers[0], data)
        for output in outputs:
            assert all(map(same_bits, expected, output))


def check_rank(rank: int, world: int, port: int) -> None:
    group = start_rank(rank, world, port)
    operator = build(group, 48, 8)
    expected = "_run_alone" if world == 1 else "_run_exchange"
    assert operator._run.__name__ == expected, f"{operator._run.__name__} was chosen on a host of NVLink peers"
    check_token_counts(group, operator, 48, 8, [0, 1, 2, 7, 64, 131, 264, 528, 529, 1056, 1057, 4096, 17000])
    check_graphs(group, 48, 8, [1, 3, 64, 600, 1500], replays=40)
    for dtype, weight_dtype in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        for store in (True, False):
            check(operator, draw(operator, 48, 8, 33, 5, dtype, weight_dtype), store)
    if world > 1:
        for heads, kv_heads in ((48, 1), (2 * world, world // 2), (3 * world, world)):
            few = build(group, heads, kv_heads)
            check_token_counts(group, few, heads, kv_heads, [1, 50, 2500])
        both_nodes = SimpleNamespace(world_size=2 * world, rank_in_group=rank)
        for heads, kv_heads in ((48, 8), (4 * world, world)):
            of_node = build(both_nodes, heads, kv_heads, node=group)
            assert of_node._run.__name__ == "_run_exchange"
            check_token_counts(group, of_node, heads, kv_heads, [0, 1, 7, 264, 1056, 4096])
        import sglang.srt.layers.minimax_qk_norm_rope as module

        module.peers_are_reachable = lambda group, device: False
        collective = build(group, 48, 8)
        assert collective._run.__name__ == "_run_collective"
        check_token_counts(group, collective, 48, 8, [0, 1, 65, 4096])
        check_token_counts(group, build(both_nodes, 48, 8, node=group), 48, 8, [0, 1, 65, 4096])
    torch.cuda.synchronize()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def fused_and_separate(rank: int, world: int, port: int) -> None:
    """A layer's inputs of attention by the kernel the model has chosen, and by its separate launches."""
    from sglang.srt.layers import minimax_attention_inputs as inputs
    from sglang.srt.layers.rotary_embedding import get_rope
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.models.minimax_m2 import MiniMaxM2RMSNormTP

    group = start_rank(rank, world, port)
    from sglang.srt import server_args

    arguments = server_args.get_global_server_args()
    arguments.get_attention_backends, arguments.attn_cp_size = lambda: ("fa3", "triton"), 1
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda", rank):
        norms = [MiniMaxM2RMSNormTP(heads * HEAD_DIM, heads, EPS) for heads in (48, 8)]
        rope = get_rope(HEAD_DIM, ROTARY_DIM, MAX_POSITION, 5_000_000, dtype=torch.bfloat16)
    torch.set_default_dtype(torch.float32)
    for norm in norms:
        whole = torch.randn(norm.hidden_size, generator=torch.Generator().manual_seed(norm.hidden_size))
        norm.weight_loader(norm.weight, (1 + 0.2 * whole).bfloat16().cuda())
    torch.set_default_dtype(torch.bfloat16)
    fused = inputs.choose_inputs(*norms, rope, HEAD_DIM, 1)
    assert fused is not None and fused.stores and fused.operator._run.__name__ in ("_run_alone", "_run_exchange")
    operator = fused.operator
    pools = [
        MHATokenToKVPool(4096, 1, torch.bfloat16, operator.num_kv_heads, HEAD_DIM, 2, "cuda", False) for _ in range(2)
    ]
    torch.set_default_dtype(torch.float32)
    with torch.inference_mode():
        for tokens in (1, 16, 200, 2000):
            data = draw(operator, 48, 8, tokens, seed=tokens)
            data.qkv.copy_(data.row)
            batch = SimpleNamespace(token_to_kv_pool=pools[0], out_cache_loc=data.slots + 1)
            q, k, v, stored = fused(data.qkv, data.positions, batch)
            raw_q, raw_k, raw_v = data.row.split(operator.sizes, dim=-1)
            want_q, want_k = MiniMaxM2RMSNormTP.forward_qk(*norms, raw_q, raw_k)
            want_q, want_k = rope(data.positions, want_q, want_k)
            heads = operator.num_kv_heads, HEAD_DIM
            pools[1].set_kv_buffer(SimpleNamespace(layer_id=1), batch.out_cache_loc, want_k.view(-1, *heads),
                                   raw_v.unflatten(-1, heads))  # fmt: skip
            assert stored and torch.equal(v, raw_v) and torch.equal(pools[0].v_buffer[1], pools[1].v_buffer[1])
            keys = pools[0].k_buffer[1], pools[1].k_buffer[1]
            for got, want in ((q, want_q), (k, want_k), keys):  # separately, the normed values are rounded once more
                assert ((got - want).abs() <= 2**-6 * (want.abs() + 2)).all()
            assert torch.equal(keys[0][batch.out_cache_loc].flatten(1), k)
    torch.distributed.barrier(group=group.device_group)
    torch.distributed.destroy_process_group()


# (q heads, KV heads): of its own KV heads, or each on 2, 4 or all ranks.
VIRTUAL_LAYOUTS = {4: [(48, 8), (48, 2), (48, 1)], 8: [(48, 8), (48, 4), (48, 2), (48, 1)]}


def virtual_ranks(num_ranks: int, num_gpus: int, replays: int) -> None:
    """``num_ranks`` ranks on ``num_gpus`` GPUs: eager calls of every plan and of several launches, then graphs."""
    for heads, kv_heads in VIRTUAL_LAYOUTS[num_ranks]:
        ranks = VirtualRanks(num_ranks, num_gpus)
        shape = (heads, kv_heads, HEAD_DIM, ROTARY_DIM, EPS)
        layers = [[ranks.build(rank, *shape, layer_id) for layer_id in range(2)] for rank in range(num_ranks)]
        plans, units = layers[0][0].plans, ranks.num_multiprocessors
        fits = [plan.ctas_per_sm * units * plan.rows for plan in plans]
        limit = plans[-1].ctas_per_sm * units * 16  # rows of one launch
        for tokens in sorted({1, 2, 3, *fits, *(fit + 1 for fit in fits), 2 * max(fits) + 5, limit}):
            call_virtual(ranks, layers, tokens, heads, kv_heads, rehearsed=False)
        for tokens in (limit + 1, 2 * limit + fits[0]):  # several launches, each rehearsed above
            call_virtual(ranks, layers, tokens, heads, kv_heads, rehearsed=True)
        replay_virtual(ranks, layers, [1, 3, fits[0], fits[1], max(fits) + 9], heads, kv_heads, replays)
        print(f"{num_ranks} ranks on {num_gpus} GPUs, {heads} heads, {kv_heads} KV heads: right", flush=True)


def call_virtual(ranks, layers, tokens: int, heads: int, kv_heads: int, rehearsed: bool) -> None:
    data = []
    for rank, (layer, _) in enumerate(layers):
        with ranks.on(rank):
            data.append(draw(layer, heads, kv_heads, tokens, seed=tokens))
        if not rehearsed:
            ranks.rehearse(rank, lambda layer=layer, mine=data[rank]: call(layer, mine))
    # Several launches a call: a second call's narrow CTAs, there early, could keep a peer's wide one of the first out.
    outputs = call_all(ranks, layers, data, turns=1 if rehearsed else 3)
    for rank, mine in enumerate(data):
        with ranks.on(rank):
            compare(mine, outputs[rank])
    same_on_virtual_replicas(outputs, kv_heads)
    ranks.synchronize()


def call_all(ranks, layers, data, turns: int = 1) -> list:
    """The outputs of the first layers, launched in another order of ranks each turn."""
    for rank, mine in enumerate(data):
        with ranks.on(rank):  # what a call copies and allocates, before anybody waits; the allocator keeps it
            mine.qkv.copy_(mine.row)
            shape = len(mine.row), layers[rank][0].sizes[0]
            kept = [torch.empty(shape, dtype=mine.row.dtype, device="cuda") for _ in range(2)]
            del kept
    ranks.synchronize()
    outputs: list = [None] * ranks.num_ranks
    for turn in range(turns):
        for rank in random.Random(turn).sample(range(ranks.num_ranks), ranks.num_ranks):
            with ranks.on(rank):
                outputs[rank] = call(layers[rank][0], data[rank])
    ranks.synchronize()
    return outputs


def same_on_virtual_replicas(outputs, kv_heads: int) -> None:
    replicas = max(1, len(outputs) // kv_heads)
    keys = [k.cpu() for _, k, _ in outputs]
    for rank, k in enumerate(keys):
        assert same_bits(k.contiguous(), keys[rank // replicas * replicas].contiguous()), f"rank {rank}"


def replay_virtual(ranks, layers, counts, heads: int, kv_heads: int, replays: int) -> None:
    """Graphs of several sizes and two layers, each with other inputs in every replay, which count what is wrong."""
    graphs = {}
    for tokens in counts:
        data = []
        for rank, (layer, _) in enumerate(layers):
            with ranks.on(rank):
                data.append(draw(layer, heads, kv_heads, tokens, seed=tokens))
        variants = []
        for variant in range(VARIANTS):
            for rank, mine in enumerate(data):
                with ranks.on(rank):
                    generator = torch.Generator("cuda").manual_seed(variant)
                    scale = 4.0**variant  # sums of another variant are then far off
                    mine.whole = [
                        torch.randn(x.shape, device="cuda", generator=generator).to(x.dtype) * scale for x in mine.whole
                    ]
                    mine.row = torch.cat([x[:, of] for x, of in zip(mine.whole, mine.part, strict=True)], dim=-1)
            outputs = call_all(ranks, layers, data)
            for rank, mine in enumerate(data):
                with ranks.on(rank):
                    compare(mine, outputs[rank])
            same_on_virtual_replicas(outputs, kv_heads)
            variants.append([(mine.row, *(x.clone() for x in of[:2])) for mine, of in zip(data, outputs, strict=True)])
        for rank, mine in enumerate(data):
            graphs[tokens, rank] = capture_virtual(ranks, rank, layers[rank], mine, [of[rank] for of in variants])
    ranks.replay(graphs, replays, seed=heads * kv_heads)


def capture_virtual(ranks, rank: int, layers, data, variants) -> tuple:
    """(graph of a launch of each layer, which compares with ``variants``' q and k, its findings, what it reads and
    writes: a graph does not keep what was there before its capture)."""
    with ranks.on(rank):
        rows, queries, keys = (torch.stack(of) for of in zip(*variants, strict=True))
        findings = Findings(("q", "k"))
        inputs = [torch.empty_like(data.row) for _ in layers]

    def run():
        chosen = [findings.variant(place) for place in range(len(layers))]
        for qkv, variant in zip(inputs, chosen, strict=True):
            qkv.copy_(rows.index_select(0, variant)[0])
        cache = data.cache[0], data.cache[1], data.slots
        outputs = [
            layer(qkv, *data.weights, data.positions, data.cos_sin, *cache)
            for layer, qkv in zip(layers, inputs, strict=True)
        ]
        for launch, ((q, k, _), variant) in enumerate(zip(outputs, chosen, strict=True)):
            for output, (got, want) in enumerate(((q, queries), (k, keys))):
                findings.compare(launch, output, got, want.index_select(0, variant)[0])
        findings.next_turn()

    return ranks.capture(rank, run), findings, (data, inputs, rows, queries, keys)


def never_call(rank: int, world: int, port: int) -> None:
    """Rank 0 waits for rank 1, which is there when the buffer is built and never calls."""
    group = start_rank(rank, world, port)
    operator = build(group, 48, 8, layer_id=17, peer_timeout_seconds=1.5)
    if rank == 1:
        time.sleep(12)
        os._exit(0)
    data = draw(operator, 48, 8, 4, seed=1)
    started = time.monotonic()
    try:
        call(operator, data)
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"trapped after {time.monotonic() - started:.1f} s: {str(error).splitlines()[0]}", flush=True)
        os._exit(3)
    os._exit(0)


# ---------------------------------------------------------------- the tests


@pytest.mark.parametrize("world", [pytest.param(n, marks=needs_gpus(n)) for n in (1, 2, 4, 8)])
def test_all_token_counts_layouts_and_graphs(world):
    for rank, done in enumerate(run_ranks(__file__, "check_rank", world, seconds=300)):
        assert done.returncode == 0, f"rank {rank}:\n{done.stdout[-4000:]}"


@pytest.mark.parametrize("world", [pytest.param(n, marks=needs_gpus(n)) for n in (1, 2, 4, 8)])
def test_the_models_choice_gives_what_its_separate_launches_and_the_engines_store_give(world):
    for rank, done in enumerate(run_ranks(__file__, "fused_and_separate", world, seconds=200)):
        assert done.returncode == 0, f"rank {rank}:\n{done.stdout[-4000:]}"


@pytest.mark.parametrize(
    "num_ranks, num_gpus",
    [pytest.param(ranks, gpus, marks=needs_gpus(gpus)) for ranks, gpus in ((4, 1), (4, 2), (8, 2))],
)
def test_four_and_eight_ranks_on_fewer_gpus(num_ranks, num_gpus):
    calls = [["virtual_ranks", num_ranks, num_gpus, 300]]
    (done,) = run_processes(__file__, calls, seconds=400, CUDA_DEVICE_MAX_CONNECTIONS="32")
    assert done.returncode == 0, done.stdout[-4000:]
    assert done.stdout.count("right") == len(VIRTUAL_LAYOUTS[num_ranks]), done.stdout[-4000:]


@needs_gpus(2)
def test_a_dead_peer_traps_and_says_who_waited_for_whom():
    waiting, _ = run_ranks(__file__, "never_call", 2, seconds=120)
    assert waiting.returncode == 3, waiting.stdout[-4000:]
    assert "QK norm: no partial sums" in waiting.stdout, waiting.stdout[-4000:]
    for operand in ("(operand 0) 17", "(operand 1) 0", "(operand 2) 1"):
        assert operand in waiting.stdout, waiting.stdout[-4000:]


if __name__ == "__main__":
    function, *numbers = sys.argv[1:]
    functions = [check_rank, fused_and_separate, never_call, virtual_ranks]
    {each.__name__: each for each in functions}[function](*map(int, numbers))
