"""Prints what the engine's tool prints, and has what ``turns.py`` takes of it. The environment says how it goes:

MS          milliseconds of a decode step, with a spread of 10 %
FAILS_AT    the batch size at which two ranks die, as a process a rank reports it, and the third waits
COMPILES    milliseconds that the first prefill of each shape takes longer
SKIPS       the tokens of a batch, as `16 x 128`, that the cache does not hold
HANGS       nothing is printed after the warm-up
ENTERS      a file that gets a line when the tool loads, and one when it measures, with the cores that it may run on
"""

import argparse
import itertools
import os
import time
from types import SimpleNamespace

compiled = set()


class ServerArgs:
    @staticmethod
    def add_cli_args(parser):
        parser.add_argument("--tp", type=int)

    from_cli_args = staticmethod(lambda given: SimpleNamespace(log_level="error", tp_size=given.tp))


class BenchArgs:
    @staticmethod
    def add_cli_args(parser):
        parser.add_argument("--batch-size", type=int, nargs="+")
        parser.add_argument("--input-len", type=int, nargs="+")
        parser.add_argument("--output-len", type=int)
        for ignored in ("--model-path", "--load-format", "--log-decode-step", "--result-filename"):
            parser.add_argument(ignored)
        parser.add_argument("--attention-backend")
        parser.add_argument("--grammar-backend")

    from_cli_args = staticmethod(lambda given: given)


def enter(what: str) -> None:
    if "ENTERS" in os.environ:
        with open(os.environ["ENTERS"], "a") as stream:
            stream.write(f"{os.environ['MS']} {what} on {sorted(os.sched_getaffinity(0))}\n")


def latency_test_run_once(batch_size: int, input_len: int, options) -> None:
    enter("measures")
    seconds, compiles = (float(os.environ.get(name, usual)) / 1000 for name, usual in (("MS", "10"), ("COMPILES", "0")))
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


def latency_test(server_args, port_args, options, gpu_id, tp_rank) -> None:
    enter("loads")
    print("Warmup ...")
    latency_test_run_once(options.batch_size[0], options.input_len[0], options)
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
        latency_test_run_once(size, length, options)


def main(server_args, options) -> None:
    latency_test(server_args, None, options, 0, 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    BenchArgs.add_cli_args(parser)
    main(None, parser.parse_args())
