"""What a client measures of a stream, and the figures that come of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.figures import gaps_of_full_batches, load_figures, percentile
from harness.prompts import PromptSource
from harness.sse import StreamEvent, parse_line
from harness.streams import StreamError, StreamTimes


def times(sent: float, *arrivals: float) -> StreamTimes:
    return StreamTimes(sent=sent, arrivals=arrivals, num_tokens=len(arrivals))


def test_latencies_of_a_stream() -> None:
    stream = times(1.0, 1.5, 1.6, 1.9)
    assert stream.ttft_s == 0.5
    assert stream.tpot_s == pytest.approx(0.2)
    assert stream.gaps_s == pytest.approx((0.1, 0.3))


def test_tokens_per_output_token_counts_tokens_not_pieces() -> None:
    stream = StreamTimes(sent=0.0, arrivals=(1.0, 2.0), num_tokens=5)
    assert stream.tpot_s == 0.25


def test_one_token_has_no_tpot() -> None:
    assert times(0.0, 1.0).tpot_s is None
    figures = load_figures([[times(0.0, 1.0)]], num_concurrent=1)
    assert figures.tpot_p50_ms is None and figures.itl_p99_ms is None


def test_a_stream_without_output_is_an_error() -> None:
    with pytest.raises(StreamError):
        times(0.0)


def test_throughput_is_the_median_of_rounds() -> None:
    rounds = [[times(0.0, 1.0, end)] for end in (2.0, 4.0, 100.0)]
    figures = load_figures(rounds, num_concurrent=1)
    assert figures.output_tokens_per_s == 0.5
    assert figures.output_tokens_per_s_of_rounds == (1.0, 0.5, 0.02)


def test_a_step_is_timed_while_all_streams_decode() -> None:
    # The first decodes alone until 3 and the last one from 5 on.
    streams = [times(0.0, 1.0, 2.0, 3.5, 4.0, 5.0), times(0.0, 3.0, 3.5, 4.0, 5.0, 9.0)]
    assert gaps_of_full_batches(streams, 2) == [0.5, 1.0, 0.5, 0.5, 1.0]
    assert gaps_of_full_batches(streams, 3) == []
    assert load_figures([streams], num_concurrent=3).step_p50_ms is None


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
def test_a_percentile_is_a_value_that_enough_do_not_exceed(
    values: list[float], share: float
) -> None:
    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9


def test_no_percentile_of_nothing() -> None:
    with pytest.raises(ValueError, match="0 values"):
        percentile([], 0.5)


@pytest.mark.parametrize("line", ["", ": keep-alive", "data: [DONE]", "event: ping"])
def test_lines_without_an_event(line: str) -> None:
    assert parse_line(line) is None


def test_events_of_a_stream() -> None:
    text = 'data: {"choices": [{"text": "a"}], "usage": null}'
    assert parse_line(text) == StreamEvent(has_text=True, num_tokens=None)
    end = 'data: {"choices": [{"text": ""}]}'
    assert parse_line(end) == StreamEvent(has_text=False, num_tokens=None)
    usage = 'data: {"choices": [], "usage": {"completion_tokens": 3}}'
    assert parse_line(usage) == StreamEvent(has_text=False, num_tokens=3)


@pytest.mark.parametrize(
    "line", ['data: {"error": {"message": "full"}}', "data: {", 'data: {"choices": [{}]}']
)
def test_events_that_void_the_measurement(line: str) -> None:
    with pytest.raises(StreamError):
        parse_line(line)


@given(st.integers(1, 40), st.integers(0, 3))
def test_prompts_have_their_length_and_repeat_with_the_seed(length: int, seed: int) -> None:
    first, again = (PromptSource(range(100), seed=seed).take(3, length) for _ in range(2))
    assert first == again
    assert [len(prompt) for prompt in first] == [length] * 3


def test_a_text_that_is_too_short() -> None:
    with pytest.raises(ValueError, match="two phrases"):
        PromptSource([1, 2, 3], seed=0)
