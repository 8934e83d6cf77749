"""Loads of reasoning models, and what is drawn of them."""

import math
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.plot import LEVELS, sparkline
from harness.worker_samples import decode_sample
from harness.workload import TimedRequest, TraceError, read_trace, reasoning_load, scaled


def load(*, sigma: float, num_requests: int = 4000, seed: int = 0) -> list[TimedRequest]:
    return reasoning_load(
        num_requests=num_requests,
        rate_per_s=2.0,
        prompt_tokens=10,
        mean_output_tokens=500.0,
        sigma=sigma,
        max_output_tokens=100_000,
        seed=seed,
    )


def test_outputs_swing_around_their_mean() -> None:
    lengths = [request.output_tokens for request in load(sigma=0.9)]
    assert statistics.mean(lengths) == pytest.approx(500, rel=0.1)
    logs = [math.log(length) for length in lengths]
    assert statistics.stdev(logs) == pytest.approx(0.9, rel=0.1)


def test_arrivals_have_their_rate_and_repeat_with_the_seed() -> None:
    requests = load(sigma=0.5)
    assert requests == load(sigma=0.5) != load(sigma=0.5, seed=1)
    assert len(requests) / requests[-1].at_s == pytest.approx(2.0, rel=0.1)


def test_outputs_without_swing_are_alike() -> None:
    assert {request.output_tokens for request in load(sigma=0.0, num_requests=9)} == {500}


def test_traces_in_both_forms(tmp_path: Path) -> None:
    azure = tmp_path / "azure.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:05.9799600,3180,8\n"
    )
    mooncake = tmp_path / "mooncake.jsonl"
    mooncake.write_text(
        '{"timestamp": 1000, "input_length": 4808, "output_length": 10}\n'
        '{"timestamp": 3000, "input_length": 3180, "output_length": 8}\n'
    )
    assert read_trace(azure) == read_trace(mooncake)
    assert read_trace(azure)[1] == TimedRequest(at_s=2.0, prompt_tokens=3180, output_tokens=8)


@pytest.mark.parametrize("name", ["absent.csv", "trace.txt"])
def test_a_trace_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(TraceError, match=name):
        read_trace(tmp_path / name)


def test_a_trace_is_scaled_to_a_rate() -> None:
    requests = scaled(load(sigma=0.5), num_requests=11, rate_per_s=5.0, tokens=0.1)
    assert len(requests) == 11 and requests[-1].at_s == pytest.approx(2.0)
    assert {request.prompt_tokens for request in requests} == {1}


@given(st.lists(st.floats(0, 10), min_size=1, max_size=200), st.integers(1, 80))
def test_a_plot_has_its_width_and_shows_the_peak(values: list[float], width: int) -> None:
    line = sparkline(values, width=width, top=max(values))
    assert len(line) == min(width, len(values))
    assert max(values) == 0 or LEVELS[-1] in line


def test_a_sample_counts_decode_workers() -> None:
    pages = {"total": 10, "free": 4, "cached": 1}
    decode = {"role": "decode", "pages": pages, "running": 3, "queued": 1}
    prefill = {"role": "prefill", "pages": pages, "running": 1, "queued": 2}
    sample = decode_sample([prefill, decode], at_s=1.0)
    assert (sample.used_pages, sample.cached_pages, sample.total_pages) == (5, 1, 10)
    assert (sample.running, sample.queued) == (3, 3)
