"""Buffers for frames: none lent twice, none lost, and never all of them to one peer."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.worker.send_buffers import SendBuffers

PEERS = (b"a", b"b", b"c")


@given(
    num_buffers=st.integers(1, 5),
    actions=st.lists(st.tuples(st.booleans(), st.integers(0, 20)), max_size=60),
)
def test_every_buffer_has_one_user_at_most(
    num_buffers: int, actions: list[tuple[bool, int]]
) -> None:
    async def play() -> None:
        buffers = SendBuffers(num_buffers)
        asked: list[tuple[bytes, asyncio.Future[int]]] = []
        for takes, choice in actions:
            if takes:
                peer = PEERS[choice % len(PEERS)]
                asked.append((peer, buffers.take(peer)))
            elif lent := [item for item in asked if item[1].done()]:
                item = lent[choice % len(lent)]
                asked.remove(item)
                buffers.give_back(item[0], item[1].result())
            held = [(peer, given.result()) for peer, given in asked if given.done()]
            assert len({buffer for _, buffer in held}) == len(held)
            assert len(held) + buffers.num_free == num_buffers
            for peer in PEERS:
                mine = [given for other, given in asked if other == peer]
                count = sum(given.done() for given in mine)
                assert count <= -(-num_buffers // 2)
                assert all(given.done() for given in mine[:count])  # in the order of asking
                may_have_more = buffers.num_free and count < -(-num_buffers // 2)
                assert not may_have_more or count == len(mine)

    asyncio.run(play())


def test_who_has_given_up_gets_none() -> None:
    async def play() -> None:
        buffers = SendBuffers(1)
        first = await buffers.take(b"a")
        given_up, patient = buffers.take(b"b"), buffers.take(b"b")
        given_up.cancel()
        buffers.give_back(b"a", first)
        assert await patient == first

    asyncio.run(play())


def test_there_must_be_one() -> None:
    with pytest.raises(ValueError, match="num_buffers is 0"):
        SendBuffers(0)
