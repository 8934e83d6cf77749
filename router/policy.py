"""Which pair of workers serves a request. Pure: values in, a choice out."""

from collections.abc import Collection, Iterable
from typing import NamedTuple

from pagewire.proto.choices import PageDemand
from pagewire.router.cached_pages import NO_HASHES, PageHashes
from pagewire.router.members import Member


class Pair(NamedTuple):
    """A prefill and a decode worker for one request."""

    prefill: Member
    decode: Member
    num_uncached_tokens: int  # of the prompt, as far as the router knows


def choose_pair(
    prefill: Iterable[Member],
    decode: Iterable[Member],
    *,
    demand: PageDemand,
    page_hashes: PageHashes = NO_HASHES,
    reserved: Member | None = None,
) -> Pair | None:
    """The least loaded pair that can hold the request; None while all are full.

    With `reserved`, a decode worker that has room for it already, only the other is chosen.

    A prefill worker whose prompts already wait for decode workers counts as full.

    Prefill workers compare by the prompt tokens that they would have to compute up to the end of
    this prompt, without those in their prefix cache; decode workers by the share of their pages
    that is promised, and equals by the prefix that they have. Both are projected: what was sent
    counts before the worker reports it. `page_hashes` are those of the prompt's full pages.
    """

    def num_uncached(member: Member) -> int:
        return max(1, demand.num_prompt_tokens - member.num_cached_tokens(page_hashes))

    prefills = [
        member
        for member in prefill
        if member.may_start_prompts
        and member.num_pages(demand.num_prompt_tokens) <= member.info.num_pages
    ]
    chosen = reserved or _least_loaded(
        (
            member
            for member in decode
            if demand.num_pages(member.page_size) <= member.num_unpromised_pages
        ),
        page_hashes,
    )
    if not prefills or chosen is None:
        return None
    best = min(
        prefills,
        key=lambda member: (member.num_projected_tokens + num_uncached(member), member.info.name),
    )
    return Pair(
        prefill=best,
        decode=chosen,
        num_uncached_tokens=num_uncached(best),
    )


def choose_successor(
    decode: Iterable[Member],
    *,
    demand: PageDemand,
    page_hashes: PageHashes = NO_HASHES,
    avoided: Collection[bytes] = (),
) -> Member | None:
    """The decode worker for what a prefill worker has parked: the least loaded, none of `avoided`.

    It may be full: the hand-off waits there. Were it to wait for room that is promised to prompts
    which have not started, and these for the memory that it holds, nobody would ever go on.
    """
    return _least_loaded(
        (
            member
            for member in decode
            if member.incarnation not in avoided
            and demand.num_pages(member.page_size) <= member.info.num_pages
        ),
        page_hashes,
    )


def _least_loaded(candidates: Iterable[Member], page_hashes: PageHashes) -> Member | None:
    """By the share of pages that is promised; among equals by the prefix that they have."""
    return min(
        candidates,
        key=lambda member: (
            member.num_projected_pages / member.info.num_pages,
            -member.num_cached_tokens(page_hashes),
            member.info.name,
        ),
        default=None,
    )
