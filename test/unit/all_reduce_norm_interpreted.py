"""All-reduce + residual add + RMSNorm in Triton's interpreter, on a CPU: all ranks in one process, against float64.

``test_all_reduce_norm.py`` runs this file in a process of its own, since Triton reads TRITON_INTERPRET when it is
imported. The interpreter has no PTX, so a rank does not wait: it takes what is in its inbox. Every rank is launched
twice with the same epoch, to send and to receive.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers import minimax_all_reduce_norm as module
from sglang.srt.layers.minimax_all_reduce_norm import AllReduceNorm, Plan, RowExchange, inbox_bytes

EPS = 1e-6
# Triton's interpreter cuts float32 off to bfloat16 where a GPU rounds: a whole unit in the last place, not half of one.
UNIT = 2.0**-7


@pytest.fixture(autouse=True)
def no_ptx(monkeypatch):
    monkeypatch.setattr(module, "poll_assembly", lambda ranks, messages: "")


def ranks_of(num_ranks: int, hidden_size: int, max_tokens: int) -> list[AllReduceNorm]:
    size = inbox_bytes(num_ranks, hidden_size, max_tokens)
    inboxes = [torch.zeros(size, dtype=torch.uint8) for _ in range(num_ranks)]
    addresses = [inbox.data_ptr() for inbox in inboxes]
    exchanges = [RowExchange(inbox, addresses, rank, hidden_size, max_tokens, 4) for rank, inbox in enumerate(inboxes)]
    return [AllReduceNorm(None, exchange, peer_timeout_seconds=1) for exchange in exchanges]


def call_all(ranks: list[AllReduceNorm], plan: Plan, data) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(normed, residual) of every rank; the first round's results, of ranks that did not wait, are thrown away."""
    for rank, x in zip(ranks, data.parts, strict=True):
        before = rank.exchange.epochs.clone()
        rank.launch(plan, x, data.residual.clone(), data.weight, EPS, 0)
        rank.exchange.epochs.copy_(before)
    answers = []
    for rank, x in zip(ranks, data.parts, strict=True):
        residual = data.residual.clone()
        answers.append((rank.launch(plan, x, residual, data.weight, EPS, 0), residual))
    return answers


def draw(num_ranks: int, hidden_size: int, tokens: int, seed: int):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).bfloat16()

    return SimpleNamespace(
        parts=[3 * normal(tokens, hidden_size) for _ in range(num_ranks)],
        residual=normal(tokens, hidden_size),
        weight=normal(hidden_size),
    )


def check(answers, data) -> None:
    total = torch.stack([part.double() for part in data.parts]).sum(0) + data.residual.double()
    normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS) * data.weight.double()
    for got_normed, got_residual in answers:
        assert torch.equal(got_normed, answers[0][0]) and torch.equal(got_residual, answers[0][1]), "ranks differ"
        for got, want in ((got_residual, total), (got_normed, normed)):
            assert ((got.double() - want).abs() <= UNIT * want.abs() + 1e-6).all()


@pytest.mark.parametrize(
    ("num_ranks", "hidden_size", "warps"),
    [
        pytest.param(2, 384, 2, id="one chunk"),
        pytest.param(4, 384, 1, id="two"),
        pytest.param(2, 768, 1, id="four"),
        pytest.param(8, 200, 1, id="words that three do not divide"),
        pytest.param(2, 3072, 16, id="the model's"),
    ],
)
def test_rows_are_those_of_float64_and_the_same_on_every_rank(num_ranks, hidden_size, warps):
    ranks, plan = ranks_of(num_ranks, hidden_size, 3), Plan(warps, 1)
    for turn, tokens in enumerate((2, 1, 2)):  # rows are used differently often
        data = draw(num_ranks, hidden_size, tokens, seed=turn)
        check(call_all(ranks, plan, data), data)
    for rank in ranks:
        assert rank.exchange.epochs.tolist() == [3, 2, 0], "each use of a row is an epoch"


def test_epochs_may_wrap():
    ranks = ranks_of(2, 96, 2)
    for rank in ranks:
        rank.exchange.epochs.fill_(2**31 - 2)
    for turn in range(4):
        data = draw(2, 96, 1, seed=turn)
        check(call_all(ranks, Plan(1, 1), data), data)
    assert ranks[0].exchange.epochs.tolist() == [-(2**31) + 2, 2**31 - 2]
    for rank in ranks:
        rank.exchange.epochs.fill_(-2)
    for turn in range(4):
        data = draw(2, 96, 1, seed=turn)
        check(call_all(ranks, Plan(1, 1), data), data)


def test_a_launch_writes_nothing_but_its_rows_messages():
    """Of the inboxes the launched rows, of one parity, from the peers only; of x nothing."""
    ranks = ranks_of(4, 384, 3)
    data = draw(4, 384, 2, seed=1)
    given = [x.clone() for x in data.parts]
    call_all(ranks, Plan(2, 1), data)
    assert all(torch.equal(x, before) for x, before in zip(data.parts, given, strict=True))
    for rank in ranks:
        messages = rank.exchange.inbox.view(torch.int32).view(2, 3, 4, 64, 4)
        epochs = messages[..., 3]
        expected = torch.zeros_like(epochs)
        expected[1, :2, [r for r in range(4) if r != rank.exchange.rank]] = 1
        assert torch.equal(epochs, expected)
