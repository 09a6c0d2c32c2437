"""``sglang-minimax plan``: the command line of the planner."""

from __future__ import annotations

import argparse
import json
import sys

from sglang_minimax.plan.hardware import GPUS, Gpu, gpu_named
from sglang_minimax.plan.layout import KV_CACHE_DTYPES, Flags
from sglang_minimax.plan.report import make_report
from sglang_minimax.plan.shape import PUBLISHED, CannotPlan, ModelShape, read_model

SUMMARY = "whether a layout works, what each rank holds, bytes a GPU, and the commands; or the best layouts"

_EPILOG = """exit code: 0 a valid layout, 1 not valid or no layout found, 2 a question that cannot be answered

examples:
  sglang-minimax plan m2.5 --tp 16 --nnodes 2 --gpu h100
  sglang-minimax plan m2.5 --tp 8 --dp 8 --enable-dp-attention --gpu h200 --json
  sglang-minimax plan m2.5 --search --gpus 16 --gpu h200 --goal throughput
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The server's flags, under the server's names, and the planner's own."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument(
        "model", nargs="?", default="m2.5",
        help=f"a checkpoint's folder, a hub name whose config.json is in the local cache, or one of "
        f"{', '.join(PUBLISHED)} (default: m2.5)",
    )  # fmt: skip
    parser.add_argument("--gpu", default="h200", help=f"one of {', '.join(GPUS)} (default: h200)")
    server = parser.add_argument_group("flags of the server")
    server.add_argument("--tp", "--tp-size", "--tensor-parallel-size", type=int, default=1)
    server.add_argument("--dp", "--dp-size", "--data-parallel-size", type=int, default=1)
    server.add_argument("--enable-dp-attention", action="store_true")
    server.add_argument("--ep", "--ep-size", "--expert-parallel-size", type=int, default=None)
    server.add_argument("--pp", "--pp-size", "--pipeline-parallel-size", type=int, default=1)
    server.add_argument("--nnodes", type=int, default=1)
    server.add_argument("--kv-cache-dtype", default="auto", choices=KV_CACHE_DTYPES)
    server.add_argument("--mem-fraction-static", type=float, default=None)
    server.add_argument("--context-length", type=int, default=None)
    server.add_argument("--quantization", default=None)
    server.add_argument("--moe-runner-backend", default="auto")
    search = parser.add_argument_group("search")
    search.add_argument("--search", action="store_true", help="rank the layouts of --gpus GPUs by a model of the step")
    search.add_argument("--gpus", type=int, default=8, help="GPUs to use, all of them (default: 8)")
    search.add_argument("--goal", choices=("throughput", "latency"), default="throughput")
    search.add_argument("--limit", type=int, default=10, help="layouts on the screen (default: 10)")
    parser.add_argument("--json", action="store_true", help="for programs; sizes in bytes unless a name says otherwise")


def run(arguments: argparse.Namespace) -> int:
    """Prints the plan and returns the exit code."""
    flags = Flags(**{name: getattr(arguments, name) for name in Flags.__dataclass_fields__})
    try:
        model, gpu = read_model(arguments.model, arguments.quantization), gpu_named(arguments.gpu)
        if arguments.search:
            if arguments.gpus < 1 or arguments.limit < 1:
                raise CannotPlan(f"--gpus {arguments.gpus} and --limit {arguments.limit} must be at least 1")
            return _search(arguments, model, gpu, flags)
    except CannotPlan as error:
        print(f"sglang-minimax plan: {error}", file=sys.stderr)
        return 2
    report = make_report(model, flags, gpu)
    if arguments.json:
        print(json.dumps(report.as_data(), indent=2))
    else:
        from sglang_minimax.plan import rendering

        rendering.show_report(report, rendering.make_console())
    return 0 if report.broken_rule is None else 1


def _search(arguments: argparse.Namespace, model: ModelShape, gpu: Gpu, flags: Flags) -> int:
    from sglang_minimax.plan import step

    found = step.search(model, gpu, arguments.gpus, arguments.goal, flags)
    if arguments.json:
        print(json.dumps(step.as_data(found), indent=2))
    elif not found:
        print(f"no layout of {arguments.gpus} x {gpu.name} holds {model.name}: more GPUs, or GPUs with more memory")
    else:
        from sglang_minimax.plan import rendering

        title = f"{model.name} on {arguments.gpus} x {gpu.name}, for {arguments.goal}: {len(found)} valid layouts"
        rendering.show_search(found, title, arguments.limit, rendering.make_console())
    return 0 if found else 1
