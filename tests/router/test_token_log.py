"""TokenLog: each token is delivered once, in order, whoever tells it and how often."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.router.token_log import TokenConflict, TokenGap, TokenLog

Tokens = st.lists(st.integers(0, 99), min_size=1, max_size=20)


@given(
    tokens=Tokens,
    reports=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=20),
)
def test_overlapping_reports_deliver_each_token_once(
    tokens: list[int], reports: list[tuple[int, int]]
) -> None:
    log = TokenLog()
    delivered: list[int] = []
    for back, length in [*reports, (0, len(tokens))]:
        start = max(0, len(delivered) - back)
        delivered += log.append(start, tokens[start : start + length])
        assert delivered == log.token_ids
    assert delivered == tokens


@given(tokens=Tokens, gap=st.integers(1, 5))
def test_a_gap_is_an_error_and_changes_nothing(tokens: list[int], gap: int) -> None:
    log = TokenLog()
    log.append(0, tokens)
    with pytest.raises(TokenGap):
        log.append(len(tokens) + gap, [1])
    assert log.token_ids == tokens


@given(tokens=Tokens, data=st.data())
def test_a_conflict_is_an_error_and_changes_nothing(tokens: list[int], data: st.DataObject) -> None:
    log = TokenLog()
    log.append(0, tokens)
    wrong = data.draw(st.integers(0, len(tokens) - 1))
    start = data.draw(st.integers(0, wrong))
    report = [*tokens[start:], 1, 2]
    report[wrong - start] += 1
    with pytest.raises(TokenConflict):
        log.append(start, report)
    assert log.token_ids == tokens


def test_nothing_is_nothing_new() -> None:
    assert TokenLog().append(0, ()) == ()
