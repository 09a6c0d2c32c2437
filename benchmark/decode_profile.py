#!/usr/bin/env python3
"""Sums a step's GPU time by kernel, for each trace that the engine's `bench_one_batch --profile` left in a folder.

    SGLANG_TORCH_PROFILER_DIR=FOLDER python -m sglang.bench_one_batch ... --profile --profile-stage decode
    python benchmark/decode_profile.py FOLDER --layers 16 [--rows 20] [--stage decode]

Of each kernel, in the order of the first: the microseconds that it adds to a layer, its launches a layer, and the
microseconds of a launch. All are of a whole step over the number of layers, so that what runs once a step (embedding,
language-model head, sampling) is there as well, with fewer launches a layer than one.

A launch that starts early waits for the one before it, and its own time has that wait in it. What it adds is only the
time after all launches that started before it have ended.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
from pathlib import Path

ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}


def kernels(trace: Path) -> list[dict]:
    """The launches of a trace, in the order in which they started."""
    with gzip.open(trace) as stream:
        events = json.load(stream)["traceEvents"]
    return sorted((event for event in events if event.get("cat") in ON_GPU), key=lambda event: event["ts"])


def table(trace: Path, layers: int, rows: int) -> list[str]:
    launches = kernels(trace)
    if not launches:
        return [f"{trace.name}: no kernel"]
    spent, added, count = collections.Counter[str](), collections.Counter[str](), collections.Counter[str]()
    latest_end = launches[0]["ts"]
    for launch in launches:
        end = launch["ts"] + launch["dur"]
        spent[launch["name"]] += launch["dur"]
        added[launch["name"]] += max(0.0, end - max(latest_end, launch["ts"]))
        count[launch["name"]] += 1
        latest_end = max(latest_end, end)
    busy = sum(added.values())
    idle = latest_end - launches[0]["ts"] - busy
    lines = [
        f"{trace.name}: {len(launches)} launches, kernels add {busy / layers:.1f} us a layer and take "
        f"{sum(spent.values()) / layers:.1f}, {idle / layers:.1f} between them"
    ]
    for name, microseconds in added.most_common(rows):
        each = spent[name] / count[name]
        lines.append(
            f"{microseconds / layers:8.2f} us a layer of {count[name] / layers:5.2f} x {each:6.2f}  {name[:90]}"
        )
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, required=True, help="of the model that ran")
    parser.add_argument("--rows", type=int, default=24, help="kernels of each trace (default: 24)")
    parser.add_argument("--stage", default="decode", help="decode or prefill (default: decode)")
    options = parser.parse_args()
    traces = sorted(options.folder.glob(f"*{options.stage}*.json.gz"))
    if not traces:
        parser.error(f"{options.folder} has no {options.stage} trace: run bench_one_batch with --profile")
    for trace in traces:
        print("\n".join(table(trace, options.layers, options.rows)))
