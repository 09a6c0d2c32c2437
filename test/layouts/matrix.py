"""The one function that runs a layout, a row of ``rows.py``, against transformers in float32.

    python test/layouts/matrix.py                     runs all rows and prints the table
    python test/layouts/matrix.py --only tp16 dp4     the rows whose names contain one of these
    python test/layouts/matrix.py --write             all rows, and writes docs/proof.md
    python test/layouts/matrix.py --servers           each layout through the real server, see servers.py; with --write
                                                      into a table of their own
    python test/layouts/matrix.py --device cuda       the rows in which nothing is simulated, on this host's GPUs; with
                                                      --write into a table of their own, with --at-once N sooner; with
                                                      --keep FILE a run that is cut off goes on in the next one
    python test/layouts/matrix.py --device cuda --servers --stock
                                                      the same through the real server, and the stock engine's beside it

Each row is run on one process a rank. The ranks are given transformers' tokens whatever they would have chosen, so a
tie between two tokens can neither hide an error nor fake one, and the log-probabilities of all tokens of the vocabulary
are compared at every step. A row also says what its run must have met, so that it is worth what its name says.

On GPUs the model computes in bfloat16, with heads of 128, since their kernels have neither float32 nor heads of 8, and
what is in FP8 with the GPUs' own products. What that alone does to the reference, bfloat16 or activations in FP8,
bounds 90% of the differences there; who sums is the GPUs' own choice, and how often is counted as on a CPU. CUDA graphs
are off, for in a graph nothing can be counted: servers have them, with --servers, and in test/gpu/test_reference.py.
Where a row has more ranks than there are GPUs, these take turns, and NCCL connects them by sockets, see nodes.py.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # run as a file, which finds its neighbours by the path of its own folder only
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pytest
from layouts import spies
from layouts.harness import LayoutResult, run_layout
from layouts.rounding import activations_in_fp8
from layouts.rows import (
    CPU,
    DISPATCHED,
    IN_FP8,
    MODEL_OR_SCATTER,
    MORE_SETS,
    PLACES,
    PROMPT_LENGTHS,
    SHAPES,
    SHARE,
    SHARED_PREFIX,
    STEPS,
    THIRD,
    TOLERANCE,
    Device,
    Row,
    everywhere,
)

from sglang_minimax.checkpoints import write_checkpoint, write_fp8_blocks
from sglang_minimax.comparison import Tolerance, from_rounding
from sglang_minimax.reference import Completion, Reference


@dataclass(frozen=True)
class Outcome:
    """What running a row gave.

    largest_difference: of any log-probability from transformers', natural log.
    within: what the tolerance's share of the differences is within, and ``allowed`` what it may be.
    compared: how many log-probabilities that is.
    seconds: from the first rank's start to the last one's end, the reference not counted.
    faults: in words, what was not as it should be; empty if all was.
    """

    largest_difference: float
    within: float
    allowed: float
    compared: int
    seconds: float
    faults: list[str]

    @classmethod
    def of_failure(cls, faults: list[str]) -> Outcome:
        """A run that did not come to its end."""
        nothing = float("nan")
        return cls(nothing, nothing, nothing, 0, nothing, faults)


class Oracles:
    """Checkpoints, prompts and transformers' answers to them, each made once and when first asked for.

    Args:
        folder: where checkpoints are written.
        device: where transformers and the ranks run.
    """

    def __init__(self, folder: Path, device: Device = CPU) -> None:
        self.folder, self.device = folder, device
        self.prompts = five_prompts(seed=0)
        self.more_prompts = [five_prompts(seed) for seed in range(1, 1 + MORE_SETS)]
        self._made: dict = {}
        self._made_more: dict[str, tuple[list[Completion], Tolerance]] = {}
        self._in_use = threading.Lock()  # rows that run at once have one reference
        self._rounded: dict[str, Reference] = {}
        self._tolerances: dict[str, dict[bool, Tolerance]] = {}

    def of(self, shape: str) -> tuple[Path, Reference, list[Completion]]:
        """(checkpoint to serve, reference, its greedy completion of each prompt with all log-probabilities)."""
        if shape not in self._made:
            folder = self.folder / shape.replace(" ", "_").replace(",", "")
            model = self.device.model_of(shape)
            checkpoint = plain = write_checkpoint(folder, model)
            if shape == IN_FP8:
                checkpoint, plain = write_fp8_blocks(plain, folder / "fp8", folder / "meant")
            reference = Reference(plain, device=self.device.name)
            completions = reference.greedy(self.prompts, STEPS, top_k=SHAPES[shape].vocab_size)
            self._made[shape] = checkpoint, reference, completions
        return self._made[shape]

    def prepare(self, shape: str) -> None:
        """Makes what there is to be made for ``shape``."""
        self.of(shape)
        self.tolerance(shape)

    def tolerance(self, shape: str, chosen_only: bool = False) -> Tolerance:
        """How far log-probabilities may lie from the reference's: of all tokens, or of the chosen ones."""
        if self.device is CPU:
            return Tolerance(TOLERANCE, 1.0, "float32, another order of summation")
        if shape not in self._tolerances:
            _, _, precise = self.of(shape)
            rounded, what = self._scored_with_rounding(shape, self.prompts, precise)
            differences = [
                np.abs(distributions(one) - distributions(other)) for one, other in zip(precise, rounded, strict=True)
            ]
            scale = float(np.quantile(np.concatenate([one.ravel() for one in differences]), SHARE))
            why = f"3 times what {what} does to the reference, {scale:.3g}"
            of_chosen = from_rounding(precise, rounded, what)
            self._tolerances[shape] = {False: Tolerance(3 * scale, SHARE, why), True: of_chosen}
        return self._tolerances[shape][chosen_only]

    def more(self, shape: str) -> tuple[list[Completion], Tolerance]:
        """(completions of ``more_prompts``, one after the other; tolerance for the chosen tokens of all prompts)."""
        with self._in_use:
            if shape not in self._made_more:
                _, reference, first = self.of(shape)
                prompts = [prompt for five in self.more_prompts for prompt in five]
                more = reference.greedy(prompts, STEPS, top_k=2)
                precise = [*first, *more]
                rounded, what = self._scored_with_rounding(shape, [*self.prompts, *prompts], precise)
                self._made_more[shape] = more, from_rounding(precise, rounded, what)
            return self._made_more[shape]

    def _scored_with_rounding(
        self, shape: str, prompts: list[list[int]], precise: list[Completion]
    ) -> tuple[list[Completion], str]:
        """The reference's scores of the tokens of ``precise`` with the ranks' precision, and that in words."""
        model, tokens = self.device.model_of(shape), [completion.tokens for completion in precise]
        if shape != IN_FP8:
            return self.rounded(shape).score(prompts, tokens, top_k=model.vocab_size), self.device.dtype
        with activations_in_fp8(model):
            return self.of(shape)[1].score(prompts, tokens, top_k=model.vocab_size), "activations in FP8"

    def rounded(self, shape: str) -> Reference:
        """The reference in the ranks' dtype."""
        if shape not in self._rounded:
            checkpoint, _, _ = self.of(shape)
            self._rounded[shape] = Reference(checkpoint, dtype=self.device.dtype, device=self.device.name)
        return self._rounded[shape]

    def hidden_states(
        self, shape: str, tokens: list[int], layers: tuple[int, ...], rounded: bool = False
    ) -> np.ndarray:
        """float32 [tokens, len(layers) * hidden_size]: what comes out of transformers' ``layers``, 0-based.

        Args:
            rounded: computed in the ranks' dtype instead of float32.
        """
        import torch

        reference = self.rounded(shape) if rounded else self.of(shape)[1]
        entering_last_norm = []
        norm = reference.model.model.norm
        with self._in_use, torch.inference_mode():
            handle = norm.register_forward_pre_hook(lambda _, args: entering_last_norm.append(args[0]))
            ids = torch.tensor([tokens], device=self.device.name)
            output = reference.model(input_ids=ids, output_hidden_states=True, use_cache=False)
            handle.remove()
        # The first of them are the embeddings, and the last are normed, which the last layer's output is not.
        states = [*output.hidden_states[1:-1], *entering_last_norm]
        return torch.cat([states[layer][0] for layer in layers], dim=-1).float().cpu().numpy()


def five_prompts(seed: int) -> list[list[int]]:
    """One of each of ``PROMPT_LENGTHS``, and one that begins as the third does."""
    generator = np.random.default_rng(seed)
    prompts = [generator.integers(0, 700, length).tolist() for length in PROMPT_LENGTHS]
    return [*prompts, prompts[THIRD][:SHARED_PREFIX] + generator.integers(0, 700, 5).tolist()]


def distributions(completion: Completion) -> np.ndarray:
    """[steps, vocabulary]: log-probabilities in the order of the tokens."""
    return np.array([[logprob for _, logprob in sorted(step)] for step in completion.top])


def run_row(row: Row, oracles: Oracles) -> Outcome:
    """Runs ``row`` and compares everything that it answers with transformers.

    Raises:
        LayoutFailed: a rank failed, died or hung.
    """
    checkpoint, _, completions = oracles.of(row.shape)
    probe = Probes(spies.watch_passes, spies.CaptureForEagle3(list(row.captures)) if row.captures else None)
    device, started = oracles.device, time.monotonic()
    on_gpus = {} if device is CPU else row.on_gpus
    with _simulated(row.simulation_on(device)):
        result = run_layout(
            checkpoint,
            tp=row.tp,
            dp=row.dp,
            ep=row.ep,
            pp=row.pp,
            prompts_by_dp_rank=_placed(row, oracles.prompts),
            arrivals=_placed(row, row.arrivals, default=0),
            lengths=_placed(row, row.lengths, default=STEPS),
            forced_tokens=_placed(row, [completion.tokens for completion in completions]),
            chunk=row.chunk,
            hidden_states=bool(row.captures),
            server_arguments={"disable_radix_cache": False} | row.arguments | device.arguments | on_gpus,
            probe=probe,
            device=device.name,
            dtype=device.dtype,
            timeout_s=device.timeout_seconds,
        )
    seconds = time.monotonic() - started
    differences = np.concatenate([one.ravel() for one in _differences(row, result, completions)])
    faults = [fault for rank in result.probed for fault in _reduction_faults(row, rank["passes"])]
    faults += _unexpected_reducers(row, result) if device is CPU else []
    faults += [f"no rank met {what}" for what in (*row.meets, "prefix") if what not in _met(row, result)]
    faults += _capture_faults(row, result, oracles)
    tolerance, largest = oracles.tolerance(row.shape), float(differences.max())
    within = float(np.quantile(differences, tolerance.share))
    if not within < tolerance.limit:
        faults.append(f"log-probabilities differ by up to {largest:.2e}, {tolerance.share:.0%} by {within:.2e}")
    return Outcome(largest, within, tolerance.limit, differences.size, seconds, faults)


class Probes:
    """Two probes as one: what the passes did and, where asked for, what was captured."""

    def __init__(self, watch, capture) -> None:
        self.watch, self.capture = watch, capture

    def __call__(self, runner):
        passes = self.watch(runner)
        captured = self.capture(runner) if self.capture else lambda: None
        return lambda: {"passes": passes(), "captured": captured()}


@contextlib.contextmanager
def _simulated(simulation: Callable | None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        if simulation:
            simulation(monkeypatch)
        yield


def _placed(row: Row, by_prompt, default=None) -> list[list]:
    """``by_prompt``, a list or a dictionary with holes, as the DP ranks hold it."""
    get = (lambda index: by_prompt.get(index, default)) if isinstance(by_prompt, dict) else by_prompt.__getitem__
    return [[get(index) for index in own] for own in row.placed]


def _differences(row: Row, result: LayoutResult, completions: list[Completion]) -> Iterator[np.ndarray]:
    for own, answers in zip(row.placed, result.logprobs, strict=True):
        for index, got in zip(own, answers, strict=True):
            expected = distributions(completions[index])
            length = row.lengths.get(index, STEPS)
            assert got.shape == (length, expected.shape[1]), f"prompt {index}: {got.shape}"
            yield np.abs(got - expected[:length])


def _reduction_faults(row: Row, passes: list[dict]) -> Iterator[str]:
    """In every pass each layer's experts must be summed once over the ranks, as often as they ran."""
    layers = set(passes[0]["reduced"]) if passes else set()
    for number, seen in enumerate(passes):
        if set(seen["reduced"]) != layers or not layers:
            yield f"pass {number} ran the experts of layers {sorted(seen['reduced'])}, not {sorted(layers)}"
        for layer, (ran, summed) in seen["reduced"].items():
            if summed != (ran if row.tp > 1 else 0):
                yield f"pass {number}, layer {layer}: experts ran {ran} times and were summed {summed} times"


def _unexpected_reducers(row: Row, result: LayoutResult) -> Iterator[str]:
    expected = row.reduced_by or (MODEL_OR_SCATTER if row.dp > 1 else everywhere("MODEL"))
    found: dict[int, set[str]] = {}
    for seen in (seen for rank in result.probed for seen in rank["passes"]):
        for layer, who in seen["who"].items():
            found.setdefault(layer, set()).add(who)
    if not found:  # all of it in stages, which only a dispatcher sums
        assert expected == DISPATCHED
    for layer, who in found.items():
        if who != expected[layer]:
            yield f"layer {layer} was summed by {sorted(who)}, not {sorted(expected[layer])}"


def _met(row: Row, result: LayoutResult) -> set[str]:
    """What a row's ``meets`` may ask for."""
    met = {"prefix"} if any(length for lengths in result.cached for length in lengths) else set()
    for together in zip(*(rank["passes"] for rank in result.probed), strict=True):
        for seen in together:
            met |= {seen["mode"], f"{seen['mode']}/{seen['padding']}"}
            met |= {"stages"} if seen["stages"] else set()
        if "init_expert_location" in row.arguments:
            met |= {"copies"} if _copies_computed(together) else set()
        modes = {seen["mode"] for seen in together}
        met.add("+".join(mode for mode in ("EXTEND", "DECODE", "IDLE") if mode in modes))
    return met


def _copies_computed(together: tuple[dict, ...]) -> bool:
    """Whether in one pass of all ranks an expert was computed at two of its ``PLACES``."""
    for layer, experts in enumerate(PLACES):
        places = set().union(*(seen["places"].get(layer, set()) for seen in together))
        if len({experts[place] for place in places}) < len(places):
            return True
    return False


def _capture_faults(row: Row, result: LayoutResult, oracles: Oracles) -> Iterator[str]:
    """Every rank must have the hidden states of all tokens that went in: prompt, but for a prefix from the cache, and
    all but the last answered."""
    if not row.captures:
        return
    # Of all sequences together, as the log-probabilities: the first token of one may be a near tie of the router, which
    # all of its others then see, and it is a tenth of the tokens at most.
    found: list[np.ndarray] = []
    rounding: list[np.ndarray] = []
    attention_ranks = row.tp // row.dp
    for rank, probed in enumerate(result.probed):
        own = rank // attention_ranks
        sequences = [
            (oracles.prompts[index] + tokens[:-1], cached)
            for index, tokens, cached in zip(row.placed[own], result.tokens[own], result.cached[own], strict=True)
        ]
        captured = {tuple(tokens): states for tokens, states in probed["captured"]}
        if set(captured) != {tuple(sequence[cached:]) for sequence, cached in sequences}:
            yield f"rank {rank} captured {len(captured)} sequences, not the {len(sequences)} that went in"
            continue
        for sequence, cached in sequences:
            expected = oracles.hidden_states(row.shape, sequence, row.captures)[cached:]
            found.append(np.abs(captured[tuple(sequence[cached:])] - expected).ravel())
            if oracles.device is not CPU:
                rounded = oracles.hidden_states(row.shape, sequence, row.captures, rounded=True)[cached:]
                rounding.append(np.abs(rounded - expected).ravel())
    share, limit = 1.0, TOLERANCE
    if rounding:
        share, limit = SHARE, 3 * float(np.quantile(np.concatenate(rounding), SHARE))
    within = float(np.quantile(np.concatenate(found), share)) if found else float("nan")
    if not within < limit:
        yield f"{share:.0%} of captured hidden states differ by up to {within:.2e}, not {limit:.2e}"


if __name__ == "__main__":
    from layouts.proof import main

    sys.exit(main())
