"""What ranks pass on to each other in layouts that the matrix has not: stages that share attention, placed experts."""

from __future__ import annotations

import json

import pytest
from layouts import simulations
from layouts.matrix import Oracles, run_row
from layouts.rows import DISPATCHED, NUM_LAYERS, ON_TWO, Row

from sglang_minimax.comparison import FLOAT32_TOLERANCE

PLACED = [[(7 * place + layer) % 16 for place in range(16)] for layer in range(NUM_LAYERS)]

ROWS = {
    "stages under DP attention, whose ranks share it": Row(
        "two stages of shared attention", "2 KV heads", tp=4, dp=2, pp=2, placed=ON_TWO
    ),
    "placed experts, and a rank without tokens": Row(
        "experts in any order", "2 KV heads", tp=4, dp=4, ep=4, placed=((0, 1), (), (2,), (3,)),
        arguments={
            "init_expert_location": json.dumps({"physical_to_logical_map": PLACED}), "ep_dispatch_algorithm": "static",
        },
        simulation=simulations.fp4_all_gather, reduced_by=DISPATCHED,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def oracles(tmp_path_factory):
    return Oracles(tmp_path_factory.mktemp("oracles"))


@pytest.mark.parametrize("name", ROWS)
def test_answers_are_those_of_transformers(name, oracles):
    outcome = run_row(ROWS[name], oracles)
    assert not outcome.faults, outcome.faults
    assert 0 < outcome.largest_difference <= FLOAT32_TOLERANCE
