"""Heads between ranks: every receiving rank gets each of its heads once, whatever the degrees."""

from itertools import product

import pytest

from pagewire.kv_transfer.layout import LayoutError
from pagewire.kv_transfer.reshard import HeadSplit, HeadTransfer, plan_heads

DEGREES = (1, 2, 4, 8)
CASES = [
    (num_kv_heads, sender, receiver)
    for num_kv_heads, sender, receiver in product((1, 2, 4, 8, 16, 32), DEGREES, DEGREES)
]


def plan(num_kv_heads: int, sender: int, receiver: int) -> list[HeadTransfer]:
    return list(
        plan_heads(
            HeadSplit(num_kv_heads=num_kv_heads, degree=sender),
            HeadSplit(num_kv_heads=num_kv_heads, degree=receiver),
        )
    )


def held(num_kv_heads: int, degree: int, rank: int) -> list[int]:
    """The heads of a rank, counted one by one: each head has its place on a line of ranks."""
    if degree <= num_kv_heads:
        return [head for head in range(num_kv_heads) if head * degree // num_kv_heads == rank]
    return [rank * num_kv_heads // degree]


@pytest.mark.parametrize(("num_kv_heads", "sender", "receiver"), CASES)
def test_no_head_is_missing_and_none_comes_twice(
    num_kv_heads: int, sender: int, receiver: int
) -> None:
    arrived: dict[int, dict[int, int]] = {rank: {} for rank in range(receiver)}
    for transfer in plan(num_kv_heads, sender, receiver):
        sent = held(num_kv_heads, sender, transfer.sender)
        assert len(transfer.sender_heads) == len(transfer.receiver_heads) > 0
        for source, target in zip(transfer.sender_heads, transfer.receiver_heads, strict=True):
            assert target not in arrived[transfer.receiver]
            arrived[transfer.receiver][target] = sent[source]
    for rank, heads in arrived.items():
        assert [heads[index] for index in sorted(heads)] == held(num_kv_heads, receiver, rank)
        assert sorted(heads) == list(range(len(heads)))


@pytest.mark.parametrize(("num_kv_heads", "sender", "receiver"), CASES)
def test_a_pair_of_ranks_has_one_transfer(num_kv_heads: int, sender: int, receiver: int) -> None:
    pairs = [(item.sender, item.receiver) for item in plan(num_kv_heads, sender, receiver)]
    assert len(pairs) == len(set(pairs))


@pytest.mark.parametrize("degree", DEGREES)
def test_equal_degrees_send_rank_to_rank(degree: int) -> None:
    for num_kv_heads in (1, 2, 8):
        transfers = plan(num_kv_heads, degree, degree)
        assert [(item.sender, item.receiver) for item in transfers] == [
            (rank, rank) for rank in range(degree)
        ]


def test_a_head_that_many_hold_is_sent_to_one_by_one_of_them() -> None:
    assert [(item.sender, item.receiver_heads) for item in plan(2, 8, 1)] == [
        (0, range(1)),
        (4, range(1, 2)),
    ]


@pytest.mark.parametrize(
    ("num_kv_heads", "degree", "sentence"),
    [(3, 2, "divisor or a multiple of num_kv_heads"), (8, 0, "degree is 0")],
)
def test_heads_that_cannot_be_split(num_kv_heads: int, degree: int, sentence: str) -> None:
    with pytest.raises(LayoutError, match=sentence):
        HeadSplit(num_kv_heads=num_kv_heads, degree=degree)


def test_models_with_other_heads_have_no_plan() -> None:
    splits = [HeadSplit(num_kv_heads=count, degree=2) for count in (4, 8)]
    with pytest.raises(LayoutError, match="4 on the sender and 8 on the receiver"):
        list(plan_heads(*splits))
