"""Which pair of workers serves a request. Pure: values in, a choice out."""

from collections.abc import Iterable
from typing import NamedTuple

from pagewire.router.members import Member


class Pair(NamedTuple):
    """A prefill and a decode worker for one request."""

    prefill: Member
    decode: Member


def choose_pair(
    prefill: Iterable[Member],
    decode: Iterable[Member],
    *,
    num_prompt_tokens: int,
    num_tokens: int,
) -> Pair | None:
    """The least loaded pair that can hold the request; None while all are full.

    Prefill workers compare by the prompt tokens that they still have to compute, decode workers by
    the share of their pages that is promised, both projected: what was sent counts before the
    worker reports it. `num_tokens` is the KV that the request needs on the decode worker at most.
    """
    prefills = [
        member for member in prefill if member.num_pages(num_prompt_tokens) <= member.info.num_pages
    ]
    decodes = [
        member for member in decode if member.num_pages(num_tokens) <= member.num_unpromised_pages
    ]
    if not prefills or not decodes:
        return None
    return Pair(
        prefill=min(prefills, key=lambda member: (member.num_projected_tokens, member.info.name)),
        decode=min(
            decodes,
            key=lambda member: (
                member.num_projected_pages / member.info.num_pages,
                member.info.name,
            ),
        ),
    )
