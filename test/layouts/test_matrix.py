"""Every row of the matrix, on this host's CPU, one core a rank or less, over gloo."""

from __future__ import annotations

import pytest
from layouts.matrix import ROWS, Oracles, run_row


@pytest.fixture(scope="module")
def oracles(tmp_path_factory) -> Oracles:
    return Oracles(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("name", ROWS)
def test_row(name, oracles):
    outcome = run_row(ROWS[name], oracles)
    assert not outcome.faults, "\n".join(outcome.faults)
    assert outcome.compared > 0
