"""Looked-up drafts are copies of what is there."""

from hypothesis import given
from hypothesis import strategies as st

from pagewire.engine.ngram_drafter import NgramDrafter

tokens = st.lists(st.integers(0, 3), max_size=60)


def test_what_followed_the_last_occurrence_is_proposed() -> None:
    drafter = NgramDrafter([1, 2, 3, 4, 5, 9, 1, 2, 3])
    assert drafter.propose(2) == (4, 5)


def test_the_latest_of_several_occurrences_counts() -> None:
    drafter = NgramDrafter([1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3])
    assert drafter.propose(1) == (8,)


def test_a_longer_match_wins() -> None:
    drafter = NgramDrafter([1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3])
    assert drafter.propose(1) == (7,)


def test_tokens_that_are_new_together_have_no_draft() -> None:
    assert NgramDrafter([1, 2, 3, 4, 5, 6]).propose(4) == ()


def test_a_repetition_is_followed_beyond_the_end() -> None:
    assert NgramDrafter([5, 6, 5, 6, 5, 6]).propose(5) == (5, 6, 5, 6, 5)
    assert NgramDrafter([7, 7, 7]).propose(4) == (7, 7, 7, 7)


@given(tokens, st.integers(0, 60), st.integers(1, 8))
def test_a_sequence_in_parts_has_the_drafts_of_the_whole(
    token_ids: list[int], cut: int, limit: int
) -> None:
    whole = NgramDrafter(token_ids)
    parts = NgramDrafter(token_ids[:cut])
    parts.extend(token_ids[cut:])
    assert parts.propose(limit) == whole.propose(limit)


@given(tokens, st.integers(1, 8))
def test_a_draft_continues_an_earlier_occurrence_of_the_newest_tokens(
    token_ids: list[int], limit: int
) -> None:
    draft = NgramDrafter(token_ids).propose(limit)
    newest = token_ids[-2:]
    earlier = [
        token_ids[end]
        for end in range(2, len(token_ids))
        if len(newest) == 2 and token_ids[end - 2 : end] == newest
    ]
    assert len(draft) == (limit if earlier else 0)
    assert not draft or draft[0] in earlier
