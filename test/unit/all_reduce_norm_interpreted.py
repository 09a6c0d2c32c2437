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
from sglang.srt.layers.minimax_parts import Parts

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


def in_parts(x: torch.Tensor, num_parts: int, generator: torch.Generator, of_experts: bool) -> Parts:
    """Float32 parts that add up to the small integers of ``x``, whatever the order of the sum.

    With ``of_experts`` they lie token by token, and every other belongs to another rank and is NaN.
    """
    tokens, hidden_size = x.shape
    parts = torch.randint(-8, 9, (num_parts, tokens, hidden_size), generator=generator).float()
    parts[0] += x.float() - parts.sum(0)
    if not of_experts:
        return Parts(parts)
    values = torch.full((tokens, 2 * num_parts, hidden_size), torch.nan)
    values[:, 1::2] = parts.transpose(0, 1)
    ids = torch.full((tokens, 2 * num_parts), 3, dtype=torch.int32)  # below this rank's first, or behind its last
    ids[:, ::4] = 20
    ids[:, 1::2] = 10 + torch.arange(num_parts, dtype=torch.int32)
    return Parts(values.transpose(0, 1), ids, first_expert=10, experts=10)


@pytest.mark.parametrize("of_experts", [False, True], ids=["of a product", "of experts"])
@pytest.mark.parametrize(("num_ranks", "hidden_size", "warps"), [(2, 384, 2), (4, 384, 1), (8, 200, 1), (2, 3072, 16)])
def test_parts_of_a_row_give_the_bits_of_their_sum(num_ranks, hidden_size, warps, of_experts):
    generator = torch.Generator().manual_seed(hidden_size)
    data = draw(num_ranks, hidden_size, 2, seed=3)
    data.parts = [torch.randint(-90, 91, (2, hidden_size), generator=generator).bfloat16() for _ in range(num_ranks)]
    whole = call_all(ranks_of(num_ranks, hidden_size, 3), Plan(warps, 1), data)
    check(whole, data)
    parts = [in_parts(x, num_parts, generator, of_experts) for num_parts, x in enumerate(data.parts, start=1)]
    assert all(torch.equal(one.summed(), x) for one, x in zip(parts, data.parts, strict=True))
    data.parts = parts
    for got, want in zip(call_all(ranks_of(num_ranks, hidden_size, 3), Plan(warps, 1), data), whole, strict=True):
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


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
