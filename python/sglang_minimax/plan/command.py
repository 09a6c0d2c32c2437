"""``sglang-minimax plan``: the command line of the planner."""

from __future__ import annotations

import argparse
import json
import sys

from sglang_minimax.plan.hardware import GPUS, Gpu, gpu_named
from sglang_minimax.plan.layout import KV_CACHE_DTYPES, MOE_RUNNER_BACKENDS, Flags
from sglang_minimax.plan.report import make_report
from sglang_minimax.plan.shape import PUBLISHED, CannotPlan, ModelShape, read_model

MOST_GPUS = 512  # of a search, which is over in seconds
NEAREST_GPUS = 16  # so many numbers below one for which there is no layout are tried

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
    server.add_argument("--tp", "--tp-size", "--tensor-parallel-size", type=int)
    server.add_argument("--dp", "--dp-size", "--data-parallel-size", type=int)
    server.add_argument("--enable-dp-attention", action="store_true")
    server.add_argument("--ep", "--ep-size", "--expert-parallel-size", type=int)
    server.add_argument("--pp-size", "--pp", "--pipeline-parallel-size", type=int, dest="pp")
    server.add_argument("--attn-cp-size", "--attention-context-parallel-size", type=int)
    server.add_argument("--moe-dp-size", "--moe-data-parallel-size", type=int)
    server.add_argument("--nnodes", type=int)
    server.add_argument("--kv-cache-dtype", default="auto", choices=KV_CACHE_DTYPES)
    server.add_argument("--mem-fraction-static", type=float, default=None)
    server.add_argument("--context-length", type=int, default=None)
    server.add_argument("--quantization", default=None)
    server.add_argument("--moe-runner-backend", default="auto", choices=MOE_RUNNER_BACKENDS)
    server.add_argument("--moe-a2a-backend")
    server.add_argument("--attention-backend")
    search = parser.add_argument_group("search")
    search.add_argument("--search", action="store_true", help="rank the layouts of --gpus GPUs by a model of the step")
    search.add_argument("--gpus", type=int, help=f"GPUs to use, all of them, up to {MOST_GPUS} (default: 8)")
    search.add_argument("--goal", choices=("throughput", "latency"), help="(default: throughput)")
    search.add_argument("--limit", type=int, help="layouts on the screen (default: 10)")
    parser.add_argument("--json", action="store_true", help="for programs; sizes in bytes unless a name says otherwise")


def run(arguments: argparse.Namespace) -> int:
    """Prints the plan and returns the exit code."""
    given = {name: getattr(arguments, name) for name in Flags.__dataclass_fields__}
    flags = Flags(**{name: value for name, value in given.items() if value is not None})
    try:
        _check_mode(arguments)
        model, gpu = read_model(arguments.model, arguments.quantization), gpu_named(arguments.gpu)
        if arguments.search:
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


def _check_mode(arguments: argparse.Namespace) -> None:
    """Raises CannotPlan for a flag that has no meaning with --search, or none without it; fills in its defaults."""
    of_search = {"gpus": 8, "goal": "throughput", "limit": 10}
    of_layout = {"tp": "--tp", "dp": "--dp", "enable_dp_attention": "--enable-dp-attention", "ep": "--ep"}
    of_layout |= {"pp": "--pp-size", "nnodes": "--nnodes"}
    of_layout |= {"attn_cp_size": "--attn-cp-size", "moe_dp_size": "--moe-dp-size"}
    if not arguments.search:
        if given := [f"--{name}" for name in of_search if getattr(arguments, name) is not None]:
            raise CannotPlan(f"{', '.join(given)}: for --search only. Add it, or say the layout by --tp and the like")
        return
    if given := [flag for name, flag in of_layout.items() if getattr(arguments, name)]:
        raise CannotPlan(f"{', '.join(given)} with --search, which tries all layouts of --gpus GPUs: leave out either")
    if arguments.moe_a2a_backend not in (None, "none"):
        raise CannotPlan(
            "--moe-a2a-backend with --search, whose model of the step has no tokens that travel one by one: leave out "
            "either"
        )
    for name, default in of_search.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
    if not 1 <= arguments.gpus <= MOST_GPUS or arguments.limit < 1:
        raise CannotPlan(
            f"--gpus {arguments.gpus} must be between 1 and {MOST_GPUS}, --limit {arguments.limit} at least 1"
        )


def _search(arguments: argparse.Namespace, model: ModelShape, gpu: Gpu, flags: Flags) -> int:
    from sglang_minimax.plan import step

    found = step.search(model, gpu, arguments.gpus, arguments.goal, flags)
    if arguments.json:
        print(json.dumps(step.as_data(found), indent=2))
    elif not found:
        fewer = range(arguments.gpus - 1, max(arguments.gpus - 1 - NEAREST_GPUS, 0), -1)
        works = next((gpus for gpus in fewer if step.search(model, gpu, gpus, arguments.goal, flags)), None)
        way_out = "more GPUs, or GPUs with more memory" if works is None else f"{works} of them have one that does"
        print(f"no layout of {arguments.gpus} x {gpu.name} holds {model.name}: {way_out}")
    else:
        from sglang_minimax.plan import rendering

        title = (
            f"{model.name} on {arguments.gpus} x {gpu.name}, for {arguments.goal}: {len(found)} valid layouts, each "
            f"with requests of {step.context_of(model, flags):,} tokens (--context-length: another number)"
        )
        rendering.show_search(found, title, arguments.limit, rendering.make_console())
    return 0 if found else 1
