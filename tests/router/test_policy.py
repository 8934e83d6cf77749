"""The choice of a pair."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from routing import registration

from pagewire.proto import worker_pb2 as pb
from pagewire.proto.choices import PageDemand
from pagewire.router.members import Member
from pagewire.router.policy import choose_pair, choose_successor


def prefill(name: str, *, num_pages: int = 10, projected: int = 0) -> Member:
    info = registration(name, pb.ROLE_PREFILL, num_pages=num_pages)
    return Member(info=info, last_seen=0.0, num_projected_tokens=projected)


def decode(name: str, *, num_pages: int = 10, projected: int = 0) -> Member:
    info = registration(name, pb.ROLE_DECODE, num_pages=num_pages)
    return Member(info=info, last_seen=0.0, num_projected_pages=projected)


def demand(num_prompt_tokens: int, num_tokens: int, n: int = 1) -> PageDemand:
    """`num_tokens`: KV of one choice at most."""
    return PageDemand(
        num_prompt_tokens=num_prompt_tokens, max_tokens=num_tokens - num_prompt_tokens + 1, n=n
    )


def test_the_least_loaded_of_each_role() -> None:
    pair = choose_pair(
        [prefill("p0", projected=50), prefill("p1", projected=49)],
        [decode("d0", num_pages=100, projected=40), decode("d1", num_pages=10, projected=5)],
        demand=demand(16, 32),
    )
    assert pair is not None
    assert (pair.prefill.info.name, pair.decode.info.name) == ("p1", "d0")


def test_equals_are_chosen_by_name() -> None:
    pair = choose_pair(
        [prefill("p1"), prefill("p0")],
        [decode("d1"), decode("d0")],
        demand=demand(1, 1),
    )
    assert pair is not None
    assert (pair.prefill.info.name, pair.decode.info.name) == ("p0", "d0")


def test_a_cached_prefix_counts_against_the_queue() -> None:
    """A worker that has 4 of 5 pages is best until 64 more tokens wait for it than for another."""
    hashes = [bytes([index] * 16) for index in range(5)]

    def chosen(projected: int) -> tuple[str, str, int]:
        workers = [prefill("p0"), prefill("p1", projected=projected)], [decode("d0"), decode("d1")]
        for with_cache in (workers[0][1], workers[1][1]):
            with_cache.cached_pages.apply(pb.KvDelta(epoch=1, stored=hashes[:4]))
        pair = choose_pair(*workers, demand=demand(80, 90), page_hashes={16: hashes})
        assert pair is not None
        return pair.prefill.info.name, pair.decode.info.name, pair.num_uncached_tokens

    assert chosen(63) == ("p1", "d1", 16)
    assert chosen(65) == ("p0", "d1", 80)


def test_cached_pages_of_unequal_sizes_compare_in_tokens() -> None:
    """Three pages of 64 are more than eleven of 16."""
    hashes = {size: [bytes([size, index] * 8) for index in range(200 // size)] for size in (16, 64)}
    small, large = decode("d0", num_pages=20), decode("d1", num_pages=20)
    large.info.layout.page_size = 64
    small.cached_pages.apply(pb.KvDelta(epoch=1, stored=hashes[16][:11]))
    large.cached_pages.apply(pb.KvDelta(epoch=1, stored=hashes[64]))
    assert (small.num_cached_tokens(hashes), large.num_cached_tokens(hashes)) == (176, 192)
    assert small.num_cached_tokens({64: hashes[64]}) == 0
    pair = choose_pair(
        [prefill("p0", num_pages=20)],
        [decode("d0", num_pages=20), large, small],
        demand=demand(200, 300),
        page_hashes=hashes,
    )
    assert pair is not None
    assert pair.decode is large


@pytest.mark.parametrize(
    ("prefills", "decodes"),
    [
        ([], [decode("d0")]),
        ([prefill("p0")], []),
        ([prefill("p0", num_pages=1)], [decode("d0")]),
        ([prefill("p0")], [decode("d0", projected=8)]),
    ],
    ids=["no prefill", "no decode", "prompt too long", "decode full"],
)
def test_no_pair(prefills: list[Member], decodes: list[Member]) -> None:
    assert choose_pair(prefills, decodes, demand=demand(17, 33)) is None


def test_choices_share_the_full_pages_of_the_prompt_only() -> None:
    """A prompt of 17 tokens fills one page; each choice needs two more."""
    workers = [prefill("p0")], [decode("d0", num_pages=9)]
    assert choose_pair(*workers, demand=demand(17, 33, n=4)) is not None
    assert choose_pair(*workers, demand=demand(17, 33, n=5)) is None


Loads = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), max_size=4)


@given(prefills=Loads, decodes=Loads, prompt=st.integers(1, 100), output=st.integers(0, 60))
def test_whoever_is_chosen_has_room(
    prefills: list[tuple[int, int]], decodes: list[tuple[int, int]], prompt: int, output: int
) -> None:
    prefill_members = [
        prefill(f"p{index}", num_pages=pages, projected=load)
        for index, (pages, load) in enumerate(prefills)
    ]
    decode_members = [
        decode(f"d{index}", num_pages=pages, projected=min(load, pages))
        for index, (pages, load) in enumerate(decodes)
    ]
    fitting_prefills = [
        member for member in prefill_members if member.info.num_pages * 16 >= prompt
    ]
    fitting_decodes = [
        member for member in decode_members if member.num_unpromised_pages * 16 >= prompt + output
    ]
    pair = choose_pair(prefill_members, decode_members, demand=demand(prompt, prompt + output))
    assert (pair is None) is not bool(fitting_prefills and fitting_decodes)
    if pair is not None:
        assert pair.prefill in fitting_prefills
        assert pair.decode in fitting_decodes
        assert pair.prefill.num_projected_tokens == min(
            member.num_projected_tokens for member in fitting_prefills
        )


def test_a_prefill_worker_whose_prompts_wait_for_decode_workers_gets_no_more() -> None:
    full, other = prefill("p0"), prefill("p1", projected=500)
    full.info.max_parked_pages = other.info.max_parked_pages = 5
    full.state.parked_pages = 6
    pair = choose_pair([full, other], [decode("d0")], demand=demand(17, 33))
    assert pair is not None and pair.prefill is other
    assert choose_pair([full], [decode("d0")], demand=demand(17, 33)) is None


def test_what_is_parked_goes_to_the_least_loaded_that_could_hold_it() -> None:
    workers = [decode("d0", projected=9), decode("d1", projected=10), decode("d2", num_pages=2)]
    assert choose_successor(workers, demand=demand(17, 33)) is workers[0]


def test_what_is_parked_may_go_to_a_full_worker_but_to_none_that_is_avoided() -> None:
    workers = [decode("d0"), decode("d1", projected=10)]
    avoided = {workers[0].incarnation}
    assert choose_successor(workers, demand=demand(17, 33), avoided=avoided) is workers[1]
    avoided.add(workers[1].incarnation)
    assert choose_successor(workers, demand=demand(17, 33), avoided=avoided) is None
