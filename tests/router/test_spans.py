"""The spans of a request: its parts in order, inside it, as long as the ledger says."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagewire.router.spans import part_spans, request_span
from pagewire.router.time_ledger import Part, TimeLedger, TimeSplit

ENDED_NS = 1_760_000_000_000_000_000

splits = st.dictionaries(st.sampled_from([*Part]), st.floats(0, 1e4)).map(
    lambda parts: TimeSplit(
        total_s=sum(parts.get(part, 0.0) for part in Part),
        parts={part: parts.get(part, 0.0) for part in Part},
    )
)


@given(splits)
def test_parts_follow_each_other_inside_the_request(split: TimeSplit) -> None:
    whole = request_span(split, "whole", ENDED_NS)
    spans = [*part_spans(split, ENDED_NS)]
    assert whole.end_ns == ENDED_NS
    assert all(whole.start_ns <= span.start_ns < span.end_ns <= ENDED_NS for span in spans)
    assert all(before.end_ns <= after.start_ns for before, after in pairwise(spans))
    assert [span.name for span in spans] == [
        part.value for part in Part if part.value in {span.name for span in spans}
    ]


@given(splits)
def test_parts_are_as_long_as_the_ledger_says(split: TimeSplit) -> None:
    found = {span.name: span.end_ns - span.start_ns for span in part_spans(split, ENDED_NS)}
    expected = {part.value: split.parts[part] * 1e9 for part in Part if part is not Part.NETWORK}
    assert {part: found.get(part, 0) for part in expected} == pytest.approx(expected, abs=10)


def test_the_network_is_a_gap_before_decode() -> None:
    ledger = TimeLedger(arrived=0.0)
    ledger.submit(1.0)
    ledger.record({Part.PREFILL: 2.0}, 4.0)
    ledger.record({Part.DECODE: 0.5}, 5.0)
    split = ledger.close(6.0)
    start_ns = ENDED_NS - 6_000_000_000
    assert [
        (name, start - start_ns, end - start_ns) for name, start, end in part_spans(split, ENDED_NS)
    ] == [
        ("preprocess", 0, 1_000_000_000),
        ("prefill", 1_000_000_000, 3_000_000_000),
        ("decode", 4_500_000_000, 6_000_000_000),
    ]
