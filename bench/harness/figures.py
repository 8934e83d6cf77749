"""From the times of streams to the figures of the field: TTFT, TPOT, ITL, tokens per second. Pure.

Latencies are pooled over rounds, throughput is the median of the rounds, so that one round in which
the machine did something else does not decide.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from harness.streams import StreamTimes

Round = Sequence[StreamTimes]  # streams that were under load together


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFigures:
    """One engine under one load. Times in milliseconds; None where no stream had two tokens."""

    num_streams: int
    ttft_p50_ms: float
    ttft_p99_ms: float
    tpot_mean_ms: float | None
    tpot_p50_ms: float | None
    tpot_p99_ms: float | None
    itl_p99_ms: float | None
    step_p50_ms: float | None  # between tokens while all streams decode; None where they never do
    output_tokens_per_s: float  # median of the rounds
    output_tokens_per_s_of_rounds: tuple[float, ...]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed (nearest rank).

    Raises ValueError when there are no values, or when `share` is not within 0 to 1.
    """
    if not values or not 0 <= share <= 1:
        raise ValueError(f"no percentile {share} of {len(values)} values")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def load_figures(rounds: Sequence[Round], *, num_concurrent: int) -> LoadFigures:
    """The figures of at least one round, in which `num_concurrent` streams were busy at a time."""
    streams = [stream for each in rounds for stream in each]
    ttfts = [stream.ttft_s for stream in streams]
    tpots = tpots_s(streams)
    gaps = [gap for stream in streams for gap in stream.gaps_s]
    steps = [gap for each in rounds for gap in gaps_of_full_batches(each, num_concurrent)]
    rates = tuple(output_rate(each) for each in rounds)
    return LoadFigures(
        num_streams=len(streams),
        ttft_p50_ms=percentile(ttfts, 0.5) * 1e3,
        ttft_p99_ms=percentile(ttfts, 0.99) * 1e3,
        tpot_mean_ms=statistics.mean(tpots) * 1e3 if tpots else None,
        tpot_p50_ms=percentile(tpots, 0.5) * 1e3 if tpots else None,
        tpot_p99_ms=percentile(tpots, 0.99) * 1e3 if tpots else None,
        itl_p99_ms=percentile(gaps, 0.99) * 1e3 if gaps else None,
        step_p50_ms=percentile(steps, 0.5) * 1e3 if steps else None,
        output_tokens_per_s=statistics.median(rates),
        output_tokens_per_s_of_rounds=rates,
    )


def gaps_of_full_batches(streams: Round, num_concurrent: int) -> list[float]:
    """The gaps between tokens, in seconds, while `num_concurrent` streams decode.

    Then no prompt is computed beside them, in a closed loop of so many streams: it is the time of
    a decode step of so many rows.
    """
    gaps = []
    for stream in streams:
        for earlier, later in zip(stream.arrivals, stream.arrivals[1:], strict=False):
            decoding = sum(other.arrivals[0] <= earlier and later <= other.end for other in streams)
            if decoding >= num_concurrent:
                gaps.append(later - earlier)
    return gaps


def tpots_s(streams: Sequence[StreamTimes]) -> list[float]:
    """The TPOT of every stream that has one."""
    return [stream.tpot_s for stream in streams if stream.tpot_s is not None]


def output_rate(streams: Round) -> float:
    """Output tokens per second from the first request sent to the last token received."""
    seconds = max(stream.end for stream in streams) - min(stream.sent for stream in streams)
    return sum(stream.num_tokens for stream in streams) / seconds
