"""Looked-up drafts are copies of what is there."""

from hypothesis import given
from hypothesis import strategies as st

from pagewire.engine.ngram_drafter import MAX_MATCH, NgramDrafter

tokens = st.lists(st.integers(0, 3), max_size=60)


def propose(drafter: NgramDrafter, length: int) -> tuple[int, ...]:
    match = drafter.match()
    return drafter.continuation(match, length) if match else ()


def test_what_followed_the_last_occurrence_is_proposed() -> None:
    drafter = NgramDrafter([1, 2, 3, 4, 5, 9, 1, 2, 3])
    assert propose(drafter, 2) == (4, 5)


def test_the_latest_of_several_occurrences_counts() -> None:
    drafter = NgramDrafter([1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3])
    assert propose(drafter, 1) == (8,)


def test_a_longer_match_wins() -> None:
    drafter = NgramDrafter([1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3])
    assert propose(drafter, 1) == (7,)


def test_tokens_that_are_new_together_have_no_draft() -> None:
    assert propose(NgramDrafter([1, 2, 3, 4, 5, 6]), 4) == ()


def test_a_repetition_is_followed_beyond_the_end() -> None:
    assert propose(NgramDrafter([5, 6, 5, 6, 5, 6]), 5) == (5, 6, 5, 6, 5)
    assert propose(NgramDrafter([7, 7, 7]), 4) == (7, 7, 7, 7)


@given(tokens, st.integers(0, 60), st.integers(1, 8))
def test_a_sequence_in_parts_has_the_drafts_of_the_whole(
    token_ids: list[int], cut: int, limit: int
) -> None:
    whole = NgramDrafter(token_ids)
    parts = NgramDrafter(token_ids[:cut])
    parts.extend(token_ids[cut:])
    assert propose(parts, limit) == propose(whole, limit)


@given(tokens, st.integers(1, 8))
def test_a_draft_continues_an_earlier_occurrence_of_the_newest_tokens(
    token_ids: list[int], limit: int
) -> None:
    draft = propose(NgramDrafter(token_ids), limit)
    newest = token_ids[-2:]
    earlier = [
        token_ids[end]
        for end in range(2, len(token_ids))
        if len(newest) == 2 and token_ids[end - 2 : end] == newest
    ]
    assert len(draft) == (limit if earlier else 0)
    assert not draft or draft[0] in earlier


@given(tokens)
def test_a_match_says_how_much_stands_there(token_ids: list[int]) -> None:
    match = NgramDrafter(token_ids).match()
    if match is None:
        return
    start, count = match
    assert 2 <= count <= MAX_MATCH
    assert token_ids[start - count : start] == token_ids[-count:]
    longer = token_ids[start - count - 1 : start] == token_ids[-count - 1 :]
    assert count in (start, MAX_MATCH) or not longer
