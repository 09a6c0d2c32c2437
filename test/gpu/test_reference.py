"""The real server on real GPUs against transformers in float32, and stock beside it, which must fail.

    python -m pytest test/gpu/test_reference.py            four GPUs for all of it; fewer skip what they cannot run

The servers are small, so they start side by side on the same GPUs, a few at a time, and are asked for 16 greedy
tokens to several prompts in one batch, prefilled in chunks; for the same again, from the prefix cache; and for one
prompt alone, which leaves all DP ranks but one idle. They compute in bfloat16. How far that alone moves an answer is
measured on the reference: its float32 tokens scored by itself in bfloat16, and for FP8 with activations in FP8.

Four ranks and more also run as nodes of one rank each, several of them on one GPU: see layouts/nodes.py.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from gpu.eagle3 import write_draft
from gpu.host import NUM_GPUS, needs_gpus
from layouts.nodes import BESIDE_OTHERS, ON_GPUS, Nodes, answer_of, serve_on_nodes, shared_gpu_environment
from layouts.rounding import activations_in_fp8

from sglang_minimax import comparison
from sglang_minimax.checkpoints import SmallModel, write_checkpoint, write_fp8_blocks
from sglang_minimax.comparison import Answer, Comparison
from sglang_minimax.reference import Completion, Reference
from sglang_minimax.server_process import ServerError

MAX_NEW_TOKENS = 16
SERVERS_AT_ONCE = int(os.environ.get("SGLANG_MINIMAX_TEST_SERVERS", "4"))
START_SECONDS = 420
PROMPTS = [
    [300 + (7 * step + 13 * length) % 700 for step in range(length)] for length in (40, 1, 9, 64, 3, 17, 33, 128)
]

# head_dim 128 and bfloat16 as published.
MODEL = SmallModel(
    num_hidden_layers=4,
    hidden_size=512,
    num_attention_heads=16,
    num_key_value_heads=2,  # TP4 puts each on two ranks
    head_dim=128,
    num_local_experts=8,
    num_experts_per_tok=4,
    intermediate_size=512,
    dtype="bfloat16",
)
MODELS = {
    "2 KV heads": MODEL,
    "1 KV head": dataclasses.replace(MODEL, num_key_value_heads=1),  # TP2 puts it on both ranks
    "8 KV heads": dataclasses.replace(MODEL, num_key_value_heads=8),  # TP16 puts each on two ranks, as published
    # A vocabulary for three ranks, which the published one is too.
    "24 heads": dataclasses.replace(
        MODEL, num_attention_heads=24, num_key_value_heads=1, intermediate_size=384, vocab_size=1152
    ),
    "11 experts": dataclasses.replace(MODEL, num_local_experts=11),
    # 384 / 2 = 192 and 384 / 4 = 96 are no multiples of the FP8 block, like the published 1536 / 8 and 1536 / 16.
    # All experts are chosen: FP8 would tip many a near tie of the router over, and drown what is looked for.
    "FP8": dataclasses.replace(MODEL, intermediate_size=384, num_experts_per_tok=8),
}


@dataclass(frozen=True)
class Case:
    """A server: its name, GPUs that a node of it takes, its arguments, the model, whether stock or ours, and nodes.

    Each rank of a node has a GPU of its own. Nodes share the GPUs in turn, where there are more ranks than GPUs.
    """

    name: str
    gpus: int
    arguments: str
    model: str = "2 KV heads"
    stock: bool = False
    nodes: int = 1


NO_GRAPHS = " --disable-cuda-graph"
PIECEWISE = " --piecewise-cuda-graph-tokens 16 64 128"
ONE_CHUNK = " --chunked-prefill-size 512"  # all prompts at once: more tokens than the router's decode plans are for
TWICE = " --ep-num-redundant-experts 4"
FLASHINFER = " --attention-backend flashinfer"
FA3 = " --attention-backend fa3"  # the engine's own choice on Hopper
EAGLE3 = (
    " --speculative-algorithm EAGLE3 --speculative-draft-model-path {draft}"
    " --speculative-num-steps 3 --speculative-eagle-topk 1 --speculative-num-draft-tokens 4"
)
DP2 = "--tp 2 --dp 2 --enable-dp-attention"
DP4 = "--tp 4 --dp 4 --enable-dp-attention"
OURS = [
    Case("TP1", 1, "--tp 1"),
    Case("TP1 without graphs", 1, "--tp 1" + NO_GRAPHS),
    Case("TP2", 2, "--tp 2"),
    Case("TP2 without graphs", 2, "--tp 2" + NO_GRAPHS),
    Case("TP2 of one KV head", 2, "--tp 2", model="1 KV head"),
    Case("TP2 of one KV head without graphs", 2, "--tp 2" + NO_GRAPHS, model="1 KV head"),
    Case("TP2 EP2", 2, "--tp 2 --ep 2"),
    Case("TP2 of 11 experts", 2, "--tp 2", model="11 experts"),
    Case("TP1 FP8", 1, "--tp 1", model="FP8"),
    Case("TP2 FP8, EP chosen", 2, "--tp 2", model="FP8"),
    Case("TP1 FP8 in one chunk", 1, "--tp 1" + ONE_CHUNK, model="FP8"),
    Case("TP2 FP8 in one chunk, EP chosen", 2, "--tp 2" + ONE_CHUNK, model="FP8"),
    Case("TP1 piecewise graphs", 1, "--tp 1" + PIECEWISE),
    Case("TP2 piecewise graphs", 2, "--tp 2" + PIECEWISE),
    Case("TP1 FP8 piecewise graphs", 1, "--tp 1" + PIECEWISE, model="FP8"),
    Case("TP2 FP8 piecewise graphs, EP chosen", 2, "--tp 2" + PIECEWISE, model="FP8"),
    Case("TP1 FlashInfer attention", 1, "--tp 1" + FLASHINFER),
    Case("TP2 FlashInfer attention", 2, "--tp 2" + FLASHINFER),
    Case("TP1 FlashAttention-3", 1, "--tp 1" + FA3),
    Case("TP1 FP8 FlashAttention-3", 1, "--tp 1" + FA3, model="FP8"),
    Case("TP1 FlashAttention-3 piecewise graphs", 1, "--tp 1" + FA3 + PIECEWISE),
    Case("TP2 FlashAttention-3", 2, "--tp 2" + FA3),
    Case("TP2 DP2 FlashAttention-3", 2, DP2 + FA3),
    Case("TP1 with an EAGLE3 draft", 1, "--tp 1" + EAGLE3),
    Case("TP2 with an EAGLE3 draft", 2, "--tp 2" + EAGLE3),
    Case("TP2 EP2, 4 experts twice", 2, "--tp 2 --ep 2" + TWICE),
    Case("TP2 of mixed chunks", 2, "--tp 2 --enable-mixed-chunk"),
    Case("PP2", 2, "--pp-size 2"),
    Case("TP2 DP2", 2, DP2),
    Case("TP2 DP2 without graphs", 2, DP2 + NO_GRAPHS),
    Case("TP2 DP2 EP2", 2, DP2 + " --ep 2"),
    Case("TP4", 4, "--tp 4"),
    Case("TP4 without graphs", 4, "--tp 4" + NO_GRAPHS),
    Case("TP4 without fused all-reduce", 4, "--tp 4 --enforce-disable-flashinfer-allreduce-fusion"),
    Case("TP3 of 24 heads", 3, "--tp 3", model="24 heads"),
    Case("TP4 EP4", 4, "--tp 4 --ep 4"),
    Case("TP4 EP4, 4 experts twice", 4, "--tp 4 --ep 4" + TWICE),
    Case("TP4, the experts on 2 ranks and again on 2", 4, "--tp 4 --moe-dp-size 2"),
    Case("TP4 FP8, EP chosen", 4, "--tp 4", model="FP8"),
    Case("PP2 TP2", 4, "--pp-size 2 --tp 2"),
    Case("TP4 DP4", 4, DP4),
    Case("TP4 DP4 without graphs", 4, DP4 + NO_GRAPHS),
    Case("TP4 DP2", 4, "--tp 4 --dp 2 --enable-dp-attention"),
    Case("TP4 DP4 EP4", 4, DP4 + " --ep 4"),
    Case("TP4 DP4 EP4, 4 experts twice", 4, DP4 + " --ep 4" + TWICE),
    Case("TP4 DP4, the head on each rank", 4, DP4 + " --enable-dp-lm-head"),
    Case("TP4 DP2, the head on two ranks", 4, "--tp 4 --dp 2 --enable-dp-attention --enable-dp-lm-head"),
    Case("TP3 of 24 heads on three nodes", 1, "--tp 3", model="24 heads", nodes=3),
    Case("TP2 on two nodes", 1, "--tp 2", nodes=2),
    Case("TP2 on two nodes without graphs", 1, "--tp 2" + NO_GRAPHS, nodes=2),
    Case("TP2 of one KV head on two nodes", 1, "--tp 2", model="1 KV head", nodes=2),
    Case("TP2 FP8 on two nodes, EP chosen", 1, "--tp 2", model="FP8", nodes=2),
    Case("TP4 on two nodes", 2, "--tp 4", nodes=2),
    Case("TP4 on two nodes without graphs", 2, "--tp 4" + NO_GRAPHS, nodes=2),
    Case("TP4 on four nodes", 1, "--tp 4", nodes=4),
    Case("TP4 on four nodes without graphs", 1, "--tp 4" + NO_GRAPHS, nodes=4),
    Case("TP4 FP8 on four nodes, EP chosen", 1, "--tp 4", model="FP8", nodes=4),
    Case("TP4 DP4 on four nodes", 1, DP4, nodes=4),
    Case("TP4 DP4 on four nodes without graphs", 1, DP4 + NO_GRAPHS, nodes=4),
    Case("TP16 on sixteen nodes", 1, "--tp 16", model="8 KV heads", nodes=16),
    Case("TP4 with an EAGLE3 draft on four nodes", 1, "--tp 4" + EAGLE3, nodes=4),
    Case("TP2 DP2 with an EAGLE3 draft on two nodes", 1, DP2 + EAGLE3, nodes=2),
    Case("TP2 DP2 with an EAGLE3 draft", 2, DP2 + EAGLE3),
]
STOCK_RIGHT = [
    Case("stock TP2", 2, "--tp 2", stock=True),
    Case("stock TP1 FP8", 1, "--tp 1", model="FP8", stock=True),
    Case("stock TP2 piecewise graphs", 2, "--tp 2" + PIECEWISE, stock=True),
]
STOCK_WRONG = [
    Case("stock TP2 of one KV head", 2, "--tp 2", model="1 KV head", stock=True),
    Case("stock TP4", 4, "--tp 4", stock=True),
    Case("stock TP4 on four nodes", 1, "--tp 4", stock=True, nodes=4),
]
STOCK_CRASHES = [
    Case("stock TP2 DP2", 2, DP2, stock=True),
    Case("stock TP2 DP2 without graphs", 2, DP2 + NO_GRAPHS, stock=True),
    Case("stock TP4 DP4", 4, DP4, stock=True),
    Case("stock TP4 DP4 without graphs", 4, DP4 + NO_GRAPHS, stock=True),
    Case("stock TP4 DP4 on four nodes", 1, DP4, stock=True, nodes=4),
    Case("stock TP4 DP4 on four nodes without graphs", 1, DP4 + NO_GRAPHS, stock=True, nodes=4),
]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """For each model the checkpoint to serve, and the one for the reference, which does not know FP8."""
    folder = tmp_path_factory.mktemp("checkpoints")
    written = {name: write_checkpoint(folder / name.replace(" ", "_"), model) for name, model in MODELS.items()}
    pairs = {name: (path, path) for name, path in written.items()}
    return pairs | {"FP8": write_fp8_blocks(written["FP8"], folder / "fp8", folder / "dequantised")}


@pytest.fixture(scope="session")
def draft(tmp_path_factory) -> Path:
    return write_draft(tmp_path_factory.mktemp("draft"), MODEL)


@pytest.fixture(scope="session")
def cases(request) -> list[Case]:
    """Those of the selected tests that this host can run."""
    selected = [item.callspec.params["case"] for item in request.session.items if "outcomes" in item.fixturenames]
    return [case for case in selected if not any(mark.args[0] for mark in needs(case))]


@pytest.fixture(scope="session")
def oracles(cases, checkpoints) -> dict[str, tuple[list[Completion], comparison.Tolerance]]:
    names = {case.model for case in cases}
    return {name: oracle(MODELS[name], checkpoints[name][1], in_fp8=name == "FP8") for name in names}


def oracle(model: SmallModel, checkpoint: Path, in_fp8: bool) -> tuple[list[Completion], comparison.Tolerance]:
    precise = Reference(checkpoint, device="cuda").greedy(PROMPTS, MAX_NEW_TOKENS, top_k=2)
    continuations = [one.tokens for one in precise]
    if in_fp8:
        with activations_in_fp8(model):
            rounded = Reference(checkpoint, device="cuda").score(PROMPTS, continuations)
        return precise, comparison.from_rounding(precise, rounded, "float8 activations")
    rounded = Reference(checkpoint, dtype="bfloat16", device="cuda").score(PROMPTS, continuations)
    return precise, comparison.from_rounding(precise, rounded, "bfloat16")


@pytest.fixture(scope="session")
def outcomes(cases, checkpoints, draft, oracles, tmp_path_factory) -> dict[str, list[Comparison] | ServerError]:
    """What the server of each selected test answered, compared with the reference, or how it failed."""
    logs = Path(os.environ.get("SGLANG_MINIMAX_TEST_LOGS") or tmp_path_factory.mktemp("logs"))

    def outcome(case: Case) -> list[Comparison] | ServerError:
        try:
            answers = ask(case, checkpoints[case.model][0], draft, logs)
            expected = {str(one.prompt): one for one in oracles[case.model][0]}
            found = [comparison.compare(answer, expected[answer.prompt], [], "") for answer in answers]
        except ServerError as error:
            texts = [log.read_text(errors="replace") for log in logs_of(case, logs)]
            found = ServerError("\n".join([str(error), *texts]))
        summary = dataclasses.asdict(case) | describe(found) | {"tolerance": oracles[case.model][1].limit}
        logs_of(case, logs)[0].with_suffix(".json").write_text(json.dumps(summary, indent=1))
        return found

    with ThreadPoolExecutor(SERVERS_AT_ONCE) as pool:
        return dict(zip((case.name for case in cases), pool.map(outcome, cases), strict=True))


def ask(case: Case, checkpoint: Path, draft: Path, logs: Path) -> list[Answer]:
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(checkpoint)]
    command += ON_GPUS
    if PIECEWISE not in case.arguments:  # the engine's default, and it takes a while to start
        command += ["--disable-piecewise-cuda-graph"]
    command += ["--max-total-tokens", "16384", "--chunked-prefill-size", "128"]
    if case.nodes > 1:  # the engine's own all-reduce wants each rank of a host to have its GPU
        command += ["--disable-custom-all-reduce"]
    command += case.arguments.format(draft=draft).split()

    def environment_of(rank: int) -> dict[str, str]:
        own = {"SGLANG_MINIMAX_OVERLAY": str(int(not case.stock))} | BESIDE_OTHERS
        return own | (_of_node(case, rank) if case.nodes > 1 else {})

    with serve_on_nodes(command, case.nodes, logs_of(case, logs), environment_of) as server:
        server.wait_until_ready(START_SECONDS)
        return [answer for prompts in (PROMPTS, PROMPTS, PROMPTS[:1]) for answer in answers_of(server, prompts, case)]


def _of_node(case: Case, rank: int) -> dict[str, str]:
    return shared_gpu_environment(rank, NUM_GPUS, case.gpus)


def answers_of(server: Nodes, prompts: list[list[int]], case: Case) -> list[Answer]:
    """Raises ServerError where it does not answer, or a draft model was to be asked and was not."""
    replies = server.generate(prompts, MAX_NEW_TOKENS)
    if "EAGLE3" in case.arguments and not all(reply.get("spec_verify_ct") for reply in replies):
        raise ServerError(f"no draft was verified: {replies}")
    return [answer_of(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]


def logs_of(case: Case, logs: Path) -> list[Path]:
    """One a node."""
    name = re.sub(r"\W+", "_", case.name)
    return [logs / (f"{name}.node{node}.log" if node else f"{name}.log") for node in range(case.nodes)]


def describe(outcome: list[Comparison] | ServerError) -> dict:
    if isinstance(outcome, ServerError):
        return {"failed": str(outcome)[-600:]}
    differences = [difference for one in outcome for difference in one.differences]
    return {
        "first token right": sum(one.parted_at != 0 for one in outcome),
        "same tokens": sum(one.same_tokens for one in outcome),
        "of": len(outcome),
        "90% of differences within": comparison.quantile(differences, 0.9),
        "largest": max(differences),
        "compared": len(differences),
    }


def parameters(cases: list[Case]):
    return [pytest.param(case, id=re.sub(r"\W+", "-", case.name), marks=needs(case)) for case in cases]


def needs(case: Case) -> list[pytest.MarkDecorator]:
    without_fa3 = FA3 in case.arguments and not has_fa3()
    return [
        needs_gpus(case.gpus),
        pytest.mark.skipif(without_fa3, reason="this sgl_kernel has no flash_ops, the library of FlashAttention-3"),
    ]


def has_fa3() -> bool:
    """Without an import, which would start CUDA in this process."""
    kernels = importlib.util.find_spec("sgl_kernel")
    folders = (kernels.submodule_search_locations if kernels else None) or []
    return any(list(Path(folder).glob("flash_ops*")) for folder in folders)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", parameters(OURS))
def test_server_answers_as_the_reference(case, outcomes, oracles):
    outcome, tolerance = outcomes[case.name], oracles[case.model][1]
    assert not isinstance(outcome, ServerError), outcome
    assert tolerance.accepts(outcome), f"{describe(outcome)}, tolerance {tolerance}"


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", parameters(STOCK_RIGHT))
def test_stock_is_right_where_no_head_is_replicated(case, outcomes, oracles):
    """Else the next two tests would show nothing about heads and idle ranks."""
    outcome = outcomes[case.name]
    assert not isinstance(outcome, ServerError), outcome
    assert oracles[case.model][1].accepts(outcome), describe(outcome)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", parameters(STOCK_WRONG))
def test_stock_is_wrong_with_replicated_heads(case, outcomes, oracles):
    outcome = outcomes[case.name]
    assert not isinstance(outcome, ServerError), f"stock fails with an error now: {outcome}"
    assert not oracles[case.model][1].accepts(outcome), describe(outcome)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", parameters(STOCK_CRASHES))
def test_stock_crashes_with_data_parallel_attention(case, outcomes):
    """It divides the heads over all of TP, so rows do not fit the KV cache, and reshapes the rows of no tokens."""
    outcome = outcomes[case.name]
    assert isinstance(outcome, ServerError), describe(outcome)
    seen = ("cannot reshape tensor of 0 elements", "view size is not compatible", "is invalid for input of size")
    assert any(message in str(outcome) for message in seen), outcome
