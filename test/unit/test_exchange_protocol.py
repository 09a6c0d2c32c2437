"""The slots and epochs by which ranks exchange rows (``minimax_row_exchange.py``): every order of events, tried out.

A rank's launches are CTAs, one a row. A CTA raises the epoch of its row, sends a message to each peer, which arrives
whenever it likes before the launch is complete, and takes the peers' messages, each once it has this epoch. What holds
of the protocol must hold in every order; what is left out of it must be missed in some.
"""

from __future__ import annotations

import pytest


def outcomes(
    launches, num_ranks=2, parities=2, modulus=2**32, starts_early=False, forgets_a_peer=False, launches_of_rank_1=None
) -> set[str]:
    """How a run can end or break: "right", "took another launch's row", "stuck".

    Args:
        launches: rows of each launch.
        parities: places of a row in an inbox.
        modulus: of epochs.
        starts_early: a launch starts once all CTAs of the one before are there, not when they are through.
        forgets_a_peer: rank 0 does not wait for the last rank.
        launches_of_rank_1: if they are others than everybody's.
    """
    orders = [launches_of_rank_1 if rank == 1 and launches_of_rank_1 else launches for rank in range(num_ranks)]
    num_rows = max(map(max, orders))
    ctas = [[(launch, row) for launch, rows in enumerate(order) for row in range(rows)] for order in orders]
    before = [
        [[i for i, (of, _) in enumerate(own) if of == launch - 1] for launch, _ in own] for own in ctas
    ]  # CTAs of the launch before

    def place(to: int, sender: int, row: int, epoch: int) -> int:
        return ((to * parities + epoch % parities) * num_rows + row) * num_ranks + sender

    def peers(rank: int, forgotten: bool = False) -> frozenset[int]:
        last = num_ranks - 1 if forgotten and rank == 0 else None
        return frozenset(peer for peer in range(num_ranks) if peer not in (rank, last))

    def replaced(values: tuple, at: int, value) -> tuple:
        return (*values[:at], value, *values[at + 1 :])

    def successors(state):
        """States after one more event, or the name of what went wrong."""
        inboxes, ranks = state
        for rank, (epochs, progress) in enumerate(ranks):
            for index, (launch, row) in enumerate(ctas[rank]):
                cta, earlier = progress[index], [progress[i] for i in before[rank][index]]
                if cta == "through":
                    continue
                if cta == "to come":
                    if all(one != "to come" if starts_early else one == "through" for one in earlier):
                        cta = ((epochs[row] + 1) % modulus, peers(rank), peers(rank, forgets_a_peer))
                        yield inboxes, replaced(ranks, rank, (epochs, replaced(progress, index, cta)))
                    continue
                epoch, unsent, unread = cta
                after = []
                for peer in unsent:
                    sent = replaced(inboxes, place(peer, rank, row, epoch), (epoch, launch))
                    after.append((sent, (epoch, unsent - {peer}, unread)))
                for peer in unread:
                    its_epoch, its_launch = inboxes[place(rank, peer, row, epoch)]
                    if its_epoch == epoch and its_launch != launch:
                        yield "took another launch's row"
                    elif its_epoch == epoch:
                        after.append((inboxes, (epoch, unsent, unread - {peer})))
                for new_inboxes, (_, to_send, to_read) in after:
                    through = not to_send and not to_read
                    new_cta = "through" if through else (epoch, to_send, to_read)
                    new_epochs = replaced(epochs, row, epoch) if through else epochs
                    yield new_inboxes, replaced(ranks, rank, (new_epochs, replaced(progress, index, new_cta)))

    first = (
        ((0, -1),) * (num_ranks * parities * num_rows * num_ranks),
        tuple(((0,) * num_rows, ("to come",) * len(own)) for own in ctas),
    )
    seen, todo, found = {first}, [first], set()
    while todo:
        state = todo.pop()
        following = list(successors(state))
        if not following:
            all_through = all(cta == "through" for _, progress in state[1] for cta in progress)
            found.add("right" if all_through else "stuck")
        for new in following:
            if isinstance(new, str):
                found.add(new)
            elif new not in seen:
                seen.add(new)
                todo.append(new)
    return found


@pytest.mark.parametrize(
    ("launches", "num_ranks"),
    [((1, 1, 1, 1, 1, 1), 2), ((1, 2, 1, 2), 2), ((2, 2, 2), 2), ((1, 1, 1, 1), 3)],
)
def test_every_order_of_events_gives_every_rank_this_launchs_rows(launches, num_ranks):
    assert outcomes(launches, num_ranks) == {"right"}
    assert outcomes(launches, num_ranks, modulus=4) == {"right"}, "an epoch may wrap"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param({"parities": 1}, "stuck", id="one place: a row is overwritten before it is read"),
        pytest.param({"modulus": 2}, "took another launch's row", id="epochs that repeat after two launches"),
        pytest.param({"starts_early": True}, "took another launch's row", id="a launch that does not wait"),
        pytest.param({"launches_of_rank_1": (1, 2, 1)}, "stuck", id="other token counts on another rank"),
    ],
)
def test_what_the_protocol_leaves_out_is_missed(change, said):
    assert said in outcomes((1, 1, 1), **change)


def test_a_rank_that_does_not_wait_for_all_peers_overwrites_what_one_has_not_read():
    assert outcomes((1, 1, 1), 3, forgets_a_peer=True) != {"right"}
