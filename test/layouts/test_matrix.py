"""Every row of the matrix on this host's CPU, and faults in the model that the matrix must find."""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from layouts import proof, simulations, spies
from layouts.harness import LayoutFailed, run_layout
from layouts.matrix import Oracles, Outcome, distributions, run_row
from layouts.rows import (
    CPU,
    GPUS,
    IN_FP8,
    NUM_LAYERS,
    OVERLAPPED,
    REDUNDANT,
    ROWS,
    SHAPES,
    SHARE,
    STEPS,
    TWO_NODES,
    small,
)
from layouts.servers import names_of_servers
from sglang.srt.layers import minimax_counterpart
from sglang.srt.models import minimax_m2, minimax_m2_moe

from sglang_minimax.checkpoints import write_checkpoint
from sglang_minimax.reference import Reference


@pytest.fixture(scope="module")
def oracles(tmp_path_factory) -> Oracles:
    return Oracles(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("name", ROWS)
def test_row(name, oracles):
    outcome = run_row(ROWS[name], oracles)
    assert not outcome.faults, "\n".join(outcome.faults)
    assert outcome.compared > 0


@pytest.mark.parametrize(
    "name",
    [
        *["tp1", "tp4_kv2", "tp16_kv8", "tp2_mixed", "tp4_prefix", "tp2_pp2", "tp4_dp2_one_idle", "tp4_dp4_staggered"],
        *["tp16_dp4_kv2", "tp4_dp2_overlap", "tp4_dp2_stages", "tp4_kv2_2_nodes", "tp8_dp2_4_nodes"],
    ],
)
def test_row_through_the_one_kernel_operator(name, oracles):
    row = ROWS[name]

    def simulation(monkeypatch):
        if row.simulation:
            row.simulation(monkeypatch)
        simulations.one_kernel(monkeypatch)

    outcome = run_row(dataclasses.replace(row, simulation=simulation), oracles)
    assert not outcome.faults, "\n".join(outcome.faults)
    assert outcome.compared > 0


@pytest.mark.parametrize("name", ["tp1", "tp2_ep2_redundant", "tp4_dp2_one_idle"])
def test_row_whose_router_also_chooses(name, oracles):
    """As where its second kernel does, by that operator's plain torch; the engine's choice would fail."""
    outcome = run_row(dataclasses.replace(ROWS[name], simulation=simulations.route_at_once), oracles)
    assert not outcome.faults, "\n".join(outcome.faults)
    assert outcome.compared > 0


@pytest.mark.parametrize("name", ["tp4_ep2_fp8", "tp4_dp2_fp8"])
def test_row_whose_experts_take_kernels_of_ours(name, oracles):
    """As on a GPU, where the engine's layer of experts is not called, and what sums them is counted all the same."""
    outcome = run_row(dataclasses.replace(ROWS[name], simulation=simulations.fp8_kernels), oracles)
    assert not outcome.faults, "\n".join(outcome.faults)
    assert outcome.compared > 0


@pytest.mark.parametrize("overlapped", [False, True])
def test_the_ranks_of_an_attention_group_exchange_the_same_rows_in_the_same_order(oracles, monkeypatch, overlapped):
    """Else one of them would wait for sums that nobody sends. In two-batch overlap, and else with a DP rank that idles
    first and ends early; the engine cannot overlap that."""
    simulations.one_kernel(monkeypatch)
    first, second, third, fourth, _ = oracles.prompts
    if overlapped:
        simulations.token_exchange(monkeypatch)
        run = dict(ep=4, chunk=64, prompts_by_dp_rank=[[first, second], [third, fourth]], server_arguments=OVERLAPPED)
    else:
        prompts = [[second, fourth], [first]]
        run = dict(prompts_by_dp_rank=prompts, arrivals=[[0, 3], [2]], lengths=[[4, 4], [2]])
    checkpoint, *_ = oracles.of("2 KV heads")
    ranks = run_layout(checkpoint, tp=4, dp=2, steps=STEPS, probe=spies.watch_exchanges, **run).probed
    assert ranks[0] == ranks[1] and ranks[2] == ranks[3]
    assert ranks[0] != ranks[2] and min(map(len, ranks)) > NUM_LAYERS


def test_copies_of_the_experts_that_are_divided_by_ep_are_summed_within_each_copy(oracles):
    """The row of this name divides them by width, and the sums over EP and over width are two groups'."""
    outcome = run_row(dataclasses.replace(ROWS["tp4_moe_dp2"], ep=2), oracles)
    assert not outcome.faults, "\n".join(outcome.faults)
    assert outcome.compared > 0


@pytest.mark.parametrize("one_kernel", [False, True])
@pytest.mark.parametrize(
    ("shape", "tp", "switch", "crosses"),
    [
        ("8 KV heads", 16, {}, False),
        ("2 KV heads", 4, {}, False),
        ("1 KV head", 4, {}, True),  # held on both nodes
        ("2 KV heads", 4, {0: "0"}, True),  # off on one rank is off on all: none waits for another
        ("8 KV heads", 2, {}, None),  # a rank a node: nothing to sum
    ],
)
def test_no_sum_of_qk_norm_crosses_nodes(oracles, monkeypatch, shape, tp, switch, crosses, one_kernel):
    if one_kernel:
        simulations.one_kernel(monkeypatch)
    made = minimax_counterpart._choices_of_any_rank.__wrapped__

    def choices():
        rank = torch.distributed.get_rank()
        monkeypatch.setenv(minimax_counterpart.SWITCH, switch.get(rank, "1"))
        return made()

    monkeypatch.setattr(minimax_counterpart, "_choices_of_any_rank", functools.cache(choices))
    checkpoint, *_ = oracles.of(shape)
    ranks = run_layout(
        checkpoint, tp=tp, prompts_by_dp_rank=[[[3, 1, 4]]], steps=2, probe=spies.watch_norm_sums,
        server_arguments=TWO_NODES,
    ).probed  # fmt: skip
    everyone, half = tuple(range(tp)), tp // 2
    for rank, sums in enumerate(ranks):
        node = everyone[:half] if rank < half else everyone[half:]
        expected = everyone if crosses else node
        assert sums == ({} if crosses is None else {expected: 2 * NUM_LAYERS}), (rank, sums)


def test_copies_of_experts_that_each_rank_would_choose_for_itself_are_refused(oracles):
    checkpoint, *_ = oracles.of("2 KV heads")
    arguments = {**REDUNDANT, "ep_dispatch_algorithm": "static"}
    with pytest.raises(LayoutFailed, match="--ep-num-redundant-experts 4 --ep-dispatch-algorithm static need an a2a"):
        run_layout(checkpoint, tp=2, ep=2, prompts_by_dp_rank=[[[1]]], steps=0, server_arguments=arguments)


# --- What the matrix must find ---------------------------------------------------------------------------


def leave_out_the_sum(monkeypatch):
    monkeypatch.setattr(minimax_m2_moe.MiniMaxM2MoE, "_all_reduce", lambda self, output: output)


def sum_twice(monkeypatch):
    once = minimax_m2_moe.MiniMaxM2MoE._all_reduce
    monkeypatch.setattr(minimax_m2_moe.MiniMaxM2MoE, "_all_reduce", lambda self, output: once(self, once(self, output)))


def norm_own_heads_alone(monkeypatch):
    monkeypatch.setattr(minimax_m2, "attention_tensor_model_parallel_all_reduce", lambda sums: sums)


def count_replicas_once(monkeypatch):
    monkeypatch.setattr(minimax_m2.MiniMaxM2RMSNormTP, "reduced_count", property(lambda self: self.hidden_size))


@pytest.mark.parametrize(
    ("fault", "name", "found"),
    [
        (leave_out_the_sum, "tp2_kv8", ["experts ran 1 times and were summed 0 times", "differ by up to"]),
        (sum_twice, "tp2_kv8", ["experts ran 1 times and were summed 2 times", "differ by up to"]),
        (norm_own_heads_alone, "tp2_kv8", ["differ by up to"]),
        (count_replicas_once, "tp4_kv2", ["differ by up to"]),
    ],
)
def test_a_fault_in_the_model_is_found(oracles, fault, name, found):
    faults = run_row(dataclasses.replace(ROWS[name], simulation=fault), oracles).faults
    for said in found:
        assert any(said in line for line in faults), faults
    assert len(found) > 1 or len(faults) == 1


def test_a_row_that_does_not_meet_what_it_says_is_a_fault(oracles):
    row = dataclasses.replace(ROWS["tp2_kv8"], meets=("IDLE",), reduced_by=(frozenset({"NEXT_NORM"}),) * 3)
    faults = run_row(row, oracles).faults
    assert "no rank met IDLE" in faults
    assert "layer 2 was summed by ['MODEL'], not ['NEXT_NORM']" in faults and len(faults) == 4


def test_bfloat16_stays_near_float32(tmp_path):
    """The same bfloat16 weights: transformers computes in float32, the ranks in bfloat16, on the same tokens."""
    steps = 16
    path = write_checkpoint(tmp_path, small(num_key_value_heads=2, dtype="bfloat16"))
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8]]
    expected = Reference(path).greedy(prompts, steps)
    tokens = [completion.tokens for completion in expected]
    result = run_layout(path, tp=4, dtype="bfloat16", prompts_by_dp_rank=[prompts], forced_tokens=[tokens], steps=steps)
    for completion, rows in zip(expected, result.logprobs[0], strict=True):
        got = rows[np.arange(steps), completion.tokens]
        assert np.abs(got - completion.logprobs).mean() < 0.1
        assert np.abs(got - completion.logprobs).max() < 0.5


def test_in_bfloat16_a_row_holds_and_a_fault_is_found(tmp_path):
    """As the rows are judged on GPUs, whose kernels do not compute in float32."""
    oracles = Oracles(tmp_path, dataclasses.replace(GPUS, name="cpu", arguments={}))
    assert not run_row(ROWS["tp4_kv2"], oracles).faults
    assert not run_row(ROWS["tp4_dp2_eagle3"], oracles).faults  # hidden states are judged likewise
    (fault,) = run_row(dataclasses.replace(ROWS["tp4_kv2"], simulation=count_replicas_once), oracles).faults
    assert "log-probabilities differ by up to" in fault


def test_a_forward_hook_gets_tensors_where_modules_would_leave_parts(oracles):
    """--forward-hooks, and --debug-tensor-dump-output-folder likewise, take what modules return for tensors."""
    modules = ["model.layers.?", "model.layers.*.self_attn", "model.layers.*.block_sparse_moe"]
    hook = {"target_modules": modules, "hook_factory": "layouts.spies:hook_that_wants_tensors"}
    row = dataclasses.replace(ROWS["tp4_ep2_one_launch"], arguments={"forward_hooks": [hook]})
    assert not run_row(row, oracles).faults


# --- The document ----------------------------------------------------------------------------------------


def test_the_table_is_written_between_its_marks_and_nowhere_else(tmp_path):
    document, marks = tmp_path / "proof.md", proof.MARKS["cpu", False]
    document.write_text(f"before\n{marks.begin}\nold\n{marks.end}\nbehind\n")
    outcomes = {"tp2_next_norm": Outcome(1.2e-6, 1.2e-6, 1e-4, 1234, 2.5, [])}
    proof.write(document, marks, proof.table(outcomes, proof.COMMAND, 60))
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("\nbehind\n") and "old" not in text
    assert "1,234 log-probabilities" in text and "1 rows in 60 s" in text
    assert "| tp2_next_norm | TP2 | 8 KV heads; the next norm | 2 | 1.2e-06 | 2.5 | CPU ranks, simulated: " in text
    document.write_text("no marks")
    with pytest.raises(ValueError, match="needs the lines"):
        proof.write(document, marks, "")


def test_the_table_of_gpus_says_what_was_allowed(monkeypatch):
    monkeypatch.setattr(proof, "hardware", lambda device: "two GPUs")
    monkeypatch.setattr(proof, "count_gpus", lambda: 2)
    outcomes = dict.fromkeys(["tp2_kv8", "tp8_kv8"], Outcome(0.75, 0.03125, 0.125, 1234, 2.5, []))
    lines = proof.table(outcomes, "the command", 60, GPUS).splitlines()
    numbers = "0.031 | 0.125 | 7.5e-01 | 2.5"
    assert f"| tp2_kv8 | TP2 | 8 KV heads; 4 KV heads a rank | 2 | {numbers} | a GPU a rank |" in lines
    assert f"| tp8_kv8 | TP8 | 8 KV heads; 1 KV head a rank | 8 | {numbers} | took turns on 2 GPUs |" in lines
    assert any(line.startswith("`the command` on two GPUs: ") and "90% of the differences" in line for line in lines)


def test_rows_at_once_come_as_they_end_and_one_that_fails_is_a_fault(monkeypatch):
    prepared = []

    class Prepared:
        def __init__(self, folder, device):
            pass

        def prepare(self, shape):
            prepared.append(shape)

    def run(row, oracles):
        if row is ROWS["tp2_kv8"]:
            raise LayoutFailed("rank 1 failed")
        time.sleep(0.2 if row is ROWS["tp1"] else 0)
        return Outcome(0.75, 0.03125, 0.125, 1234, 2.5, [])

    monkeypatch.setattr(proof, "Oracles", Prepared)
    runs = [proof.Run(name) for name in ("tp1", "tp2_kv8", "tp4_kv8")]
    outcomes = list(proof.outcomes_of(runs, GPUS, run, at_once=3))
    assert {found for found, _ in outcomes} == set(runs) and outcomes[-1][0] == proof.Run("tp1")
    assert {found.name: one.faults for found, one in outcomes if one.faults} == {"tp2_kv8": ["rank 1 failed"]}
    assert sorted(prepared) == ["2 KV heads", "8 KV heads"]


@pytest.mark.parametrize(("at_once", "ranks"), [(2, None), (4, 8), (8, 20), (8, 2)])
def test_rows_at_once_have_so_many_ranks_together(monkeypatch, at_once, ranks):
    monkeypatch.setattr(proof, "Oracles", lambda folder, device: SimpleNamespace(prepare=lambda shape: None))
    lock, running, together = threading.Lock(), [], []

    def run(row, oracles, stock=False):
        with lock:
            running.append(row.ranks)
            together.append(list(running))
        time.sleep(0.02)
        with lock:
            running.remove(row.ranks)
        return Outcome(0.75, 0.03125, 0.125, 1234, 2.5, ["wrong"] if stock else [])

    names = ["tp1", "tp16_kv8", "tp2_kv8", "tp8_kv8", "tp4_kv8", "tp4_kv2"]
    runs = [proof.Run(name, stock) for stock in (False, True) for name in names]
    outcomes = dict(proof.outcomes_of(runs, GPUS, run, at_once, ranks))
    assert {run: bool(outcome.faults) for run, outcome in outcomes.items()} == {run: run.stock for run in runs}
    assert together[0][0] == 16 and max(map(len, together)) <= at_once
    assert all(len(rows) == 1 or sum(rows) <= (ranks or 100) for rows in together)
    assert max(map(len, together)) > 1 or ranks == 2


def test_a_run_that_was_cut_off_goes_on_with_the_rows_that_did_not_hold(monkeypatch, tmp_path, capsys):
    ran = []

    def outcomes_of(runs, device, how, at_once, ranks):
        assert how is run_row
        ran.append([run.name for run in runs])
        faults = {"tp4_kv2": ["rank 1 failed"]} if len(ran) == 1 else {}
        yield from ((run, Outcome(0.75, 0.03125, 0.125, 1234, 2.5, faults.get(run.name, []))) for run in runs)

    monkeypatch.setattr(proof, "outcomes_of", outcomes_of)
    options = ["--only", "tp4_kv2", "tp4_kv1", "--keep", str(tmp_path / "kept")]
    assert [proof.main(options), proof.main(options), proof.main(options)] == [1, 0, 0]
    held = [name for name in ROWS if "tp4_kv1" in name or "tp4_kv2" in name]
    assert ran == [held, ["tp4_kv2"], []]
    said = capsys.readouterr().out.splitlines()
    assert [text for text in said if "rows hold" in text] == [
        f"{count} of {len(held)} rows hold; 0 s, the reference included"
        for count in (len(held) - 1, len(held), len(held))
    ]


def test_the_first_prompt_begins_with_a_near_tie_which_rounding_may_tip_over(tmp_path):
    """Why captured states are judged over all prompts together: in the model of the rows of EAGLE3 on GPUs, the last
    expert that the first token chooses in the first layer is no further from the next than rounding moves them."""
    oracles = Oracles(tmp_path, dataclasses.replace(GPUS, name="cpu"))  # their model; the reference runs here
    shape = ROWS["tp4_eagle3"].shape
    _, precise, _ = oracles.of(shape)

    def scores(reference) -> torch.Tensor:
        """By which the first layer chooses experts for the first token."""
        block, found = reference.model.model.layers[0].mlp, []
        handle = block.gate.register_forward_hook(lambda _, inputs, outputs: found.append(outputs[0]))
        with torch.inference_mode():
            reference.model(input_ids=torch.tensor([oracles.prompts[0][:1]]), use_cache=False)
        handle.remove()
        (bias,) = (value for name, value in block.state_dict().items() if name.endswith("correction_bias"))
        return found[0][0].float().sigmoid() + bias.float()

    exact, chosen = scores(precise), precise.model.config.num_experts_per_tok
    ordered = exact.sort(descending=True).values
    assert ordered[chosen - 1] - ordered[chosen] < (scores(oracles.rounded(shape)) - exact).abs().max()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--at-once", "2"], "--at-once 2 must be 1 on the CPU"),
        (["--servers", "--stock"], "--stock needs --servers --device cuda"),
        (["--device", "cuda", "--stock"], "--stock needs --servers --device cuda"),
        (["--write", "--only", "tp1"], "--write needs all rows"),
        (["--device", "cuda", "--only", "tp2_a2a"], "none of these rows can run on"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit):
        proof.main(arguments)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("servers", "names"), [(False, list(ROWS)), (True, names_of_servers(ROWS, CPU))])
def test_the_document_names_every_row(servers, names):
    """A row that was added or taken away asks for another run of the command."""
    text = proof.DOCUMENT.read_text()
    marks = proof.MARKS["cpu", servers]
    table = text[text.index(marks.begin) : text.index(marks.end)]
    written = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| tp")]
    assert written == names


def test_what_fp8_does_to_the_reference_bounds_rows_in_fp8_on_gpus(tmp_path):
    """More than bfloat16 does, and so little that a norm over each head alone would still be found."""
    oracles = Oracles(tmp_path, dataclasses.replace(GPUS, name="cpu"))  # their model; the reference runs here
    _, precise, completions = oracles.of(IN_FP8)
    allowed = oracles.tolerance(IN_FP8).limit
    tokens, top_k = [one.tokens for one in completions], SHAPES[IN_FP8].vocab_size

    def within(reference) -> float:
        pairs = zip(reference.score(oracles.prompts, tokens, top_k=top_k), completions, strict=True)
        differences = [np.abs(distributions(one) - distributions(other)).ravel() for one, other in pairs]
        return float(np.quantile(np.concatenate(differences), SHARE))

    def norm_each_head(norm, x):
        heads = x.unflatten(-1, (-1, 128))
        mean = heads.square().mean(-1, keepdim=True)
        return (heads * torch.rsqrt(mean + norm.variance_epsilon)).flatten(-2) * norm.weight

    dequantised = oracles.folder / "FP8_blocks" / "meant"
    assert 3 * within(Reference(dequantised, dtype="bfloat16")) < allowed
    for layer in precise.model.model.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            norm.forward = functools.partial(norm_each_head, norm)
    assert within(precise) > allowed
