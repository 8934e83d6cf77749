"""Which drafts are kept."""

from hypothesis import given
from hypothesis import strategies as st

from pagewire.engine.speculative import num_accepted

tokens = st.lists(st.integers(0, 2), max_size=8)


def test_only_leading_drafts_count() -> None:
    assert num_accepted([1, 2, 3], [1, 9, 3, 4]) == 1
    assert num_accepted([1, 2, 3], [1, 2, 3, 4]) == 3
    assert num_accepted([], [1]) == 0


@given(tokens, st.data())
def test_what_is_kept_is_what_was_sampled(drafts: list[int], data: st.DataObject) -> None:
    sampled = data.draw(st.lists(st.integers(0, 2), min_size=len(drafts) + 1, max_size=9))
    count = num_accepted(drafts, sampled)
    assert drafts[:count] == sampled[:count]
    assert count == len(drafts) or drafts[count] != sampled[count]
