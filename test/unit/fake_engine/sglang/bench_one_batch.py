"""Prints what the engine's tool prints. FAKE_BENCH chooses how it goes:

MS          milliseconds of a decode step, with a spread of 10 %
FAILS_AT    the batch size at which two ranks die, as a process a rank reports it, and the third waits
COMPILES    milliseconds that the first prefill of each shape takes longer
SKIPS       the tokens of a batch, as `16 x 128`, that the cache does not hold
HANGS       nothing is printed after the warm-up
"""

import argparse
import itertools
import os
import time

parser = argparse.ArgumentParser()
parser.add_argument("--batch-size", type=int, nargs="+")
parser.add_argument("--input-len", type=int, nargs="+")
parser.add_argument("--output-len", type=int)
options, _ = parser.parse_known_args()
seconds = float(os.environ.get("MS", "10")) / 1000
compiles = float(os.environ.get("COMPILES", "0")) / 1000
compiled = set()


def measure(batch_size: int, input_len: int) -> None:
    prefill = seconds * 3 * input_len / options.input_len[0]
    if (batch_size, input_len) not in compiled:
        prefill += compiles
        compiled.add((batch_size, input_len))
    print(f"Prefill. latency: {prefill:6.5f} s, throughput:    12.00 token/s")
    steps = [seconds * (1 + 0.1 * (step % 3 - 1)) for step in range(options.output_len - 1)]
    for step, latency in enumerate(steps):
        print(f"Decode {step}. Batch size: {batch_size}, latency: {latency:6.5f} s, throughput:    12.00 token/s")
    print(f"Decode.  median latency: {seconds:6.5f} s, median throughput:    12.00 token/s")
    print("Total. latency:  1.000 s, throughput:    12.00 token/s")


print("Warmup ...")
measure(options.batch_size[0], options.input_len[0])
if os.environ.get("HANGS"):
    time.sleep(600)
print("Benchmark ...")
for size, length in itertools.product(options.batch_size, options.input_len):
    if os.environ.get("FAILS_AT") == str(size):
        for rank, error in (
            (1, "RuntimeError: Push buffer is too small"),
            (2, "RuntimeError: Connection closed by peer"),
        ):
            print(f"Process Process-{rank}:\nTraceback (most recent call last):\n  File somewhere\n{error}")
        time.sleep(600)
    if os.environ.get("SKIPS") == f"{size} x {length}":
        print(f"skipping ({size}, {length}, {options.output_len}) due to max batch size limit")
        continue
    measure(size, length)
