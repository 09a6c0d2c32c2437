"""MiniMax-M2.5 in its wide layouts: GSM8K and a performance profile on 8 GPUs of a host, and on 16 of two.

    python3 test_minimax_m25.py                                     8 GPUs
    MINIMAX_M2_HEAD=10.0.0.1:20000 MINIMAX_M2_NODE_RANK=0 python3 test_minimax_m25.py TestTwoNodes
    MINIMAX_M2_HEAD=10.0.0.1:20000 MINIMAX_M2_NODE_RANK=1 python3 test_minimax_m25.py TestTwoNodes

Environment:
    MINIMAX_M2_MODEL      another checkpoint. A small one from ``python -m sglang_minimax.checkpoints`` runs the same
                          variants on CPU ranks of a host without a GPU. Its weights are random, so its answers are
                          compared with transformers', number by number, in place of GSM8K.
    MINIMAX_M2_HEAD       address of the first of two nodes, as both reach it: the ranks meet at this port, the two
                          runs of this file at the next.
    MINIMAX_M2_NODE_RANK  0 on that node, 1 on the other.

The engine's helpers are imported where they are used: a host that lacks something should say so at once.
"""

import contextlib
import datetime
import os
import unittest
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=3600, suite="nightly-8-gpu-common", nightly=True)

MODEL = os.environ.get("MINIMAX_M2_MODEL", "MiniMaxAI/MiniMax-M2.5")

# A conservative floor, not a measured baseline: this file has not been run on 8 GPUs yet. SGLang's own nightly job
# for this model asks for the same share of right answers, with the same helper at its defaults (5 shots, chat API).
# Replace it by the lowest of a few measured scores, less two standard errors (0.02 at 1,300 questions and 0.9).
GSM8K_FLOOR = 0.80

ONE_NODE = {
    "TP8+EP8": ["--tp", "8", "--ep", "8"],
    "TP8+DP8+EP8": ["--tp", "8", "--ep", "8", "--dp", "8", "--enable-dp-attention"],
}
# Without --ep: blocks of 128 do not divide the experts' width over 16 ranks, and the smallest EP that works is chosen.
TWO_NODES = {"TP16": ["--tp", "16", "--nnodes", "2"]}

NUM_GPUS = 8  # a node
PROFILE_FOLDER = "performance_profiles_minimax_m25"
LARGEST_ON_CPU_GB = 1.0  # each of 8 ranks on a few cores reads all of it
# The benchmark's default prompts are downloaded; these are not, and are as short as the CPU ranks need them.
MADE_UP_PROMPTS = [
    *("--dataset-name", "generated-shared-prefix", "--gsp-num-groups", "1"),
    *("--gsp-system-prompt-len", "8", "--gsp-question-len", "8", "--gsp-output-len", "4"),
]
LONGEST_RUN = datetime.timedelta(hours=3)


def runs_on_cpu() -> bool:
    """Whether ``MODEL`` is small and on this host, and this host has no accelerator."""
    import torch

    weights = list(Path(MODEL).glob("*.safetensors"))
    size_gb = sum(file.stat().st_size for file in weights) / 1e9
    if torch.cuda.is_available() or not weights or size_gb > LARGEST_ON_CPU_GB:
        return False  # without an import of the package, which a GPU host of the engine's own need not have
    from sglang_minimax.cpu_host import has_no_accelerator

    return has_no_accelerator()


def what_is_lacking() -> str | None:
    """Why this host cannot run the variants, as a sentence, or None."""
    import torch

    num_gpus = torch.cuda.device_count()
    if num_gpus >= NUM_GPUS or runs_on_cpu():
        return None
    return (
        f"{NUM_GPUS} GPUs are needed for {MODEL}, and this host has {num_gpus}. Without any GPU, MINIMAX_M2_MODEL may "
        f"name a checkpoint of up to {LARGEST_ON_CPU_GB:g} GB from `python -m sglang_minimax.checkpoints FOLDER`"
    )


def launch_settings(variant: str, flags: list[str]):
    """The engine's ``ModelLaunchSettings`` for a variant. It adds flags of its own."""
    from sglang.test.test_utils import ModelLaunchSettings

    return ModelLaunchSettings(MODEL, tp_size=int(flags[flags.index("--tp") + 1]), extra_args=flags, variant=variant)


def gsm8k_arguments(url: str) -> SimpleNamespace:
    """What the engine's ``run_eval`` reads without a default, with the threads of its nightly runs."""
    return SimpleNamespace(base_url=url, model=MODEL, eval_name="gsm8k", num_examples=None, num_threads=1024)


class TestOneNode(unittest.TestCase):
    def setUp(self):
        if "MINIMAX_M2_HEAD" in os.environ:
            self.skipTest("MINIMAX_M2_HEAD is set, so this is a run over two nodes: only TP16 runs")
        if lacking := what_is_lacking():
            self.skipTest(lacking)

    def test_on_gpus(self):
        if runs_on_cpu():
            self.skipTest("this host has no GPU: test_on_cpu_ranks runs")
        from sglang.test.accuracy_test_runner import AccuracyTestParams
        from sglang.test.performance_test_runner import PerformanceTestParams
        from sglang.test.run_combined_tests import run_combined_tests

        run_combined_tests(
            models=[launch_settings(variant, flags) for variant, flags in ONE_NODE.items()],
            test_name="MiniMax-M2.5",
            accuracy_params=AccuracyTestParams(dataset="gsm8k", baseline_accuracy=GSM8K_FLOOR),
            performance_params=PerformanceTestParams(profile_dir=PROFILE_FOLDER),
        )

    def test_on_cpu_ranks(self):
        if not runs_on_cpu():
            self.skipTest("this host has GPUs: test_on_gpus runs")
        for variant, flags in ONE_NODE.items():
            with self.subTest(variant), running_server(launch_settings(variant, flags)) as url:
                compare_with_transformers(url, variant)
                if variant == "TP8+EP8":  # it takes as long as a start, and shows here no more than that it runs
                    write_profile(url, launch_settings(variant, flags), [2], 16, 4, benchmark_flags=MADE_UP_PROMPTS)


class TestTwoNodes(unittest.TestCase):
    def setUp(self):
        if "MINIMAX_M2_HEAD" not in os.environ:
            self.skipTest(
                f"TP16 is for two nodes of {NUM_GPUS} GPUs: set MINIMAX_M2_HEAD to the first one's address and port, "
                f"MINIMAX_M2_NODE_RANK to 0 there and to 1 on the other, and start this file on both"
            )
        if lacking := what_is_lacking():
            self.skipTest(lacking)

    def test_tp16(self):
        node_rank, head = int(os.environ["MINIMAX_M2_NODE_RANK"]), os.environ["MINIMAX_M2_HEAD"]
        [(variant, flags)] = TWO_NODES.items()
        settings = launch_settings(variant, [*flags, "--node-rank", str(node_rank), "--dist-init-addr", head])
        with two_nodes_meet(head, node_rank) as other, running_server(settings) as url:
            if node_rank == 0:
                self.measure(url, settings)
            else:
                other.wait_for_verdict()

    def measure(self, url: str, settings) -> None:
        """Both measurements on one server: restarting it would need the other node each time."""
        if runs_on_cpu():
            compare_with_transformers(url, settings.variant)
            return
        from sglang.test.run_eval import run_eval

        score = run_eval(gsm8k_arguments(url))["score"]
        print(f"{settings.variant}: GSM8K {score:.3f}, floor {GSM8K_FLOOR}")
        write_profile(url, settings, [1, 8, 16, 64], 4096, 512)
        self.assertGreaterEqual(score, GSM8K_FLOOR)


class OtherNode:
    """What the two runs of this file tell each other: how it went. The first node holds the store."""

    def __init__(self, store) -> None:
        self.store = store

    def tell(self, verdict: str) -> None:
        self.store.set("verdict", verdict)
        with contextlib.suppress(Exception):  # the other node is gone: this node's own verdict stands
            self.store.wait(["heard"], datetime.timedelta(seconds=60))

    def wait_for_verdict(self) -> None:
        self.store.wait(["verdict"], LONGEST_RUN)
        verdict = self.store.get("verdict").decode()
        self.store.set("heard", "yes")
        assert verdict == "passed", f"the first node says: {verdict}"


@contextlib.contextmanager
def two_nodes_meet(head: str, node_rank: int):
    """An :class:`OtherNode`; on leaving, the first node tells the other how its block ended."""
    from torch.distributed import TCPStore

    host, port = head.rsplit(":", 1)
    store = TCPStore(host, int(port) + 1, is_master=node_rank == 0, wait_for_workers=False)
    other = OtherNode(store)
    try:
        yield other
    except BaseException as error:
        if node_rank == 0:
            other.tell(f"failed: {error!r}")
        raise
    if node_rank == 0:
        other.tell("passed")


@contextlib.contextmanager
def running_server(settings):
    """The URL of a server with these settings; it is ended afterwards."""
    from sglang.srt.utils import kill_process_tree
    from sglang.test.test_utils import DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH, DEFAULT_URL_FOR_TEST, popen_launch_server

    url, flags = DEFAULT_URL_FOR_TEST, settings.extra_args
    if runs_on_cpu():
        from sglang_minimax.ports import free_port, port_flags

        port = free_port()
        url, flags = f"http://127.0.0.1:{port}", [*flags, *port_flags(port)]
    timeout = settings.launch_timeout or DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH
    process = popen_launch_server(settings.model_path, url, timeout, other_args=flags)
    try:
        yield url
    finally:
        kill_process_tree(process.pid)


def write_profile(
    url: str, settings, batch_sizes: list[int], input_len: int, output_len: int, benchmark_flags: Sequence[str] = ()
) -> None:
    """The nightly runner's benchmark with its profile, on a server that is there already. Lengths are in tokens."""
    from sglang.test.nightly_utils import NightlyBenchmarkRunner

    runner = NightlyBenchmarkRunner(PROFILE_FOLDER, f"MiniMax-M2.5 {settings.variant}", url)
    runner.setup_profile_directory()
    profile, results_file = runner.generate_profile_filename(Path(MODEL).name, settings.variant)
    sizes = (batch_sizes, (input_len,), (output_len,))
    command = runner.build_benchmark_command(
        MODEL, *sizes, profile, results_file, extra_args=list(benchmark_flags), server_args=settings.extra_args
    )
    _, ran = runner.run_benchmark_command(command, settings.variant)
    results, loaded = runner.load_benchmark_results(results_file, settings.variant)
    assert ran and loaded and len(results) == len(batch_sizes), f"no benchmark of {settings.variant}"
    runner.add_report(results, settings.variant)
    runner.write_final_report()


def compare_with_transformers(url: str, variant: str) -> None:
    """Greedy answers to a batch and to each prompt alone: transformers' tokens, and their log-probabilities."""
    import requests
    import torch

    from sglang_minimax.comparison import FLOAT32_TOLERANCE
    from sglang_minimax.reference import Reference

    torch.set_num_threads(1)  # the ranks have the cores, and a second thread would wait for one at every step
    steps = 8
    prompts = [[11, 12, 13], list(range(100, 140)), [7], [5, 50, 500, 55]]
    expected = Reference(MODEL).greedy(prompts, steps)
    largest = 0.0
    for chosen in [range(len(prompts)), *([index] for index in range(len(prompts)))]:
        body = {
            "input_ids": [prompts[index] for index in chosen],
            "sampling_params": {"temperature": 0, "max_new_tokens": steps, "ignore_eos": True},
            "return_logprob": True,
        }
        reply = requests.post(f"{url}/generate", json=body, timeout=120)
        reply.raise_for_status()
        for index, answer in zip(chosen, reply.json(), strict=True):
            logprobs, tokens, *_ = zip(*answer["meta_info"]["output_token_logprobs"], strict=True)
            reference = expected[index]
            assert list(tokens) == reference.tokens, f"{variant}: {tokens} where {reference.tokens} belong"
            differences = [abs(a - b) for a, b in zip(logprobs, reference.logprobs, strict=True)]
            largest = max(largest, *differences)
    assert largest <= FLOAT32_TOLERANCE, f"{variant}: log-probabilities differ by {largest:.2e}"
    print(f"{variant}: answers as transformers, largest difference {largest:.1e} nats")


if __name__ == "__main__":
    unittest.main()
