"""Probes that record, in each rank, what a layout's forward passes did. What they return comes back to the test."""

from __future__ import annotations

import collections
import functools

import torch


def watch_passes(runner):
    """A probe: one record a forward pass.

    "mode", "padding": the batch's forward mode, and how the DP ranks' tokens were padded (None without DP attention).
    "reduced": for each layer of this stage, (times that experts ran, sums over ranks of what they gave).
    "who": for each layer whose experts ran in one piece, whom the model expected to do that sum.
    "stages": layers that ran as stages of two-batch overlap, counted once for each half of the batch.
    "places": for each layer, the places of experts on this rank that had tokens, numbered through all ranks.
    """
    watch = _Watch()
    watch.install()
    return lambda: watch.passes


class _Watch:
    """Counts collectives that sum hidden states, between the experts' output and the next attention's.

    What sums is a method of the engine's groups, whatever kernel that takes, one of the launches that sum and norm, or
    a function of torch.distributed: each is counted, but for one within another. Attention's own sums, of squares and
    in ``prepare_mlp``, are not counted, nor is what happens before the first experts or behind the last layer.
    """

    def __init__(self) -> None:
        self.passes: list[dict] = []
        self.current: dict | None = None
        self.layer: int | None = None
        self.summing = False

    def install(self) -> None:
        from sglang.srt.distributed.parallel_state import GroupCoordinator
        from sglang.srt.layers import flashinfer_comm_fusion
        from sglang.srt.layers.minimax_all_reduce_norm import AllReduceNorm
        from sglang.srt.layers.minimax_layer_communicator import MiniMaxM2LayerCommunicator
        from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
        from sglang.srt.models import minimax_m2, minimax_m2_moe

        for name in ("all_reduce", "reduce_scatter_tensor", "reduce_scatter", "reduce"):
            _wrap(torch.distributed, name, self._on_sum)
        for name in ("all_reduce", "reduce_scatter_tensor", "reduce_scatter", "reduce_scatterv"):
            _wrap(GroupCoordinator, name, self._on_sum_of_group)
        _wrap(AllReduceNorm, "__call__", self._on_sum)
        _wrap(flashinfer_comm_fusion, "flashinfer_allreduce_residual_rmsnorm", self._on_sum)
        _wrap(FusedMoE, "run_moe_core", self._on_experts)
        for owner, name in (
            (MiniMaxM2LayerCommunicator, "prepare_mlp"),
            (minimax_m2.MiniMaxM2Attention, "forward_prepare"),
            (minimax_m2.MiniMaxM2Attention, "forward_core"),
        ):
            _wrap(owner, name, self._on_attention)
        _wrap(minimax_m2_moe.MiniMaxM2MoE, "forward", self._on_routed)
        _wrap(minimax_m2_moe.MiniMaxM2MoE, "op_experts", self._on_stage)
        _wrap(minimax_m2.MiniMaxM2Model, "forward", self._on_pass)

    def _on_pass(self, model_forward, model, input_ids, positions, forward_batch, *rest):
        padding = forward_batch.dp_padding_mode
        mode = getattr(forward_batch, "_original_forward_mode", forward_batch.forward_mode)
        self.current = {
            "mode": mode.name,
            "padding": padding.name if padding is not None else None,
            "reduced": collections.defaultdict(lambda: [0, 0]),
            "who": {},
            "stages": 0,
            "places": collections.defaultdict(set),
        }
        output = model_forward(model, input_ids, positions, forward_batch, *rest)
        reduced = {layer: tuple(counts) for layer, counts in self.current["reduced"].items()}
        self.passes.append({**self.current, "reduced": reduced, "places": dict(self.current["places"])})
        self.current = self.layer = None
        return output

    def _on_experts(self, run_moe_core, experts, dispatch_output):
        first = experts.moe_ep_rank * experts.num_local_experts
        own = dispatch_output.topk_output.topk_ids.unique().tolist()
        self._ran(experts, {first + place for place in own if place >= 0})
        return run_moe_core(experts, dispatch_output)

    def _on_run_experts(self, run_experts, experts, hidden_states, topk_output, *rest):
        """Our kernels take the places of all ranks' experts, and do not come through the engine's layer."""
        before = self.current["reduced"][experts.layer_id][0]
        output = run_experts(experts, hidden_states, topk_output, *rest)
        if self.current["reduced"][experts.layer_id][0] == before:
            first = experts.moe_ep_rank * experts.num_local_experts
            places = set(topk_output.topk_ids.unique().tolist())
            self._ran(experts, places & set(range(first, first + experts.num_local_experts)))
        return output

    def _ran(self, experts, places: set[int]) -> None:
        self.layer = experts.layer_id
        self.current["reduced"][self.layer][0] += 1
        self.current["places"][self.layer] |= places

    def _on_sum_of_group(self, method, group, *args, **kwargs):
        if group.world_size == 1:  # nothing to sum
            return method(group, *args, **kwargs)
        return self._on_sum(method, group, *args, **kwargs)

    def _on_sum(self, collective, *args, **kwargs):
        outermost, self.summing = not self.summing, True
        if outermost and self.layer is not None:
            self.current["reduced"][self.layer][1] += 1
        try:
            return collective(*args, **kwargs)
        finally:
            self.summing = not outermost

    def _on_attention(self, part, *args, **kwargs):
        layer, self.layer = self.layer, None
        output = part(*args, **kwargs)
        self.layer = layer
        return output

    def _on_routed(self, moe_forward, moe, hidden_states, forward_batch, reduction, *rest):
        self.current["who"][moe.layer_id] = reduction.name
        chosen = moe.run_experts
        moe.run_experts = functools.partial(self._on_run_experts, chosen)  # for now: a server's report reads it
        try:
            return moe_forward(moe, hidden_states, forward_batch, reduction, *rest)
        finally:
            moe.run_experts = chosen

    def _on_stage(self, op_experts, *args, **kwargs):
        self.current["stages"] += 1
        return op_experts(*args, **kwargs)


def watch_exchanges(runner):
    """A probe: [layer, tokens] of every call of the one kernel on this rank, in order, without empty ones."""
    from sglang.srt.layers.minimax_qk_norm_rope import QKNormRope

    calls: list[list[int]] = []

    def keep(run, operator, qkv, *arguments, **parts):
        if qkv.shape[0]:
            calls.append([operator.layer_id, qkv.shape[0]])
        return run(operator, qkv, *arguments, **parts)

    _wrap(QKNormRope, "run", keep)
    return lambda: calls


def watch_norm_sums(runner):
    """A probe: over which groups of ranks this rank's attention summed on its way to q and k, and how often.

    {ranks, as a tuple: calls}; a projection that is cast, a norm or RoPE that sums by itself would show too.
    """
    from sglang.srt.models.minimax_m2 import MiniMaxM2Attention

    sums: collections.Counter = collections.Counter()
    preparing = False

    def keep(all_reduce, tensor, *args, group=None, **kwargs):
        if preparing:
            sums[tuple(torch.distributed.get_process_group_ranks(group))] += 1
        return all_reduce(tensor, *args, group=group, **kwargs)

    def prepare(forward_prepare, *args, **kwargs):
        nonlocal preparing
        preparing = True
        try:
            return forward_prepare(*args, **kwargs)
        finally:
            preparing = False

    _wrap(torch.distributed, "all_reduce", keep)
    _wrap(MiniMaxM2Attention, "forward_prepare", prepare)
    return lambda: dict(sums)


def _wrap(owner, name: str, around) -> None:
    """Replaces ``owner.name``, in this process, by ``around(original, *arguments)``."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        return around(original, *args, **kwargs)

    setattr(owner, name, wrapped)


def hook_that_wants_tensors(config):
    """A forward hook as ``--forward-hooks`` makes them."""

    def hook(module, inputs, output):
        for one in output if isinstance(output, tuple) else (output,):
            assert one is None or isinstance(one, torch.Tensor), f"{type(module).__name__} gives {type(one).__name__}"

    return hook


class CaptureForEagle3:
    """A probe: asks for the outputs of ``layers`` as an EAGLE3 draft model does, and keeps what the engine hands on.

    Returns, for each request in the order of their places in the pool, the tokens that went in and float32
    [tokens, len(layers) * hidden_size].
    """

    def __init__(self, layers: list[int]) -> None:
        self.layers = layers

    def __call__(self, runner):
        runner.model.set_eagle3_layers_to_capture(self.layers)
        tokens: dict[int, list[int]] = collections.defaultdict(list)
        states: dict[int, list[torch.Tensor]] = collections.defaultdict(list)

        def keep(forward, forward_batch, *args, **kwargs):
            pool = forward_batch.req_pool_indices.tolist()
            lengths = [1] * len(pool) if forward_batch.forward_mode.is_decode() else forward_batch.extend_seq_lens_cpu
            input_ids = forward_batch.input_ids.tolist()
            output = forward(forward_batch, *args, **kwargs)
            if not pool:  # idle
                return output
            hidden_states = output.logits_output.hidden_states
            assert len(hidden_states) >= len(input_ids) == sum(lengths)  # the engine leaves some padding behind them
            start = 0
            for place, length in zip(pool, lengths, strict=True):
                tokens[place] += input_ids[start : start + length]
                states[place].append(hidden_states[start : start + length].float())
                start += length
            return output

        _wrap(runner, "forward", keep)
        return lambda: [(tokens[place], torch.cat(states[place]).cpu().numpy()) for place in sorted(tokens)]
