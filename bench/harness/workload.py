"""Loads of reasoning models: few prompts, outputs whose lengths swing widely, arrivals on time.

Lengths are lognormal, as traces of reasoning models show them; a recorded trace can take their
place, of which only times and lengths are used. Pure but for reading the file.
"""

import csv
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path


class TraceError(Exception):
    """A trace that cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedRequest:
    """When a request arrives and how long it is."""

    at_s: float  # after the first
    prompt_tokens: int
    output_tokens: int


def reasoning_load(
    *,
    num_requests: int,
    rate_per_s: float,
    prompt_tokens: int,
    mean_output_tokens: float,
    sigma: float,
    max_output_tokens: int,
    seed: int,
) -> list[TimedRequest]:
    """Poisson arrivals; outputs lognormal with that mean, before they are cut at the maximum.

    `sigma` is the standard deviation of the logarithm: 0 makes all outputs alike, 1 gives a p99 of
    six times the mean.
    """
    chance = random.Random(seed)
    mu = math.log(mean_output_tokens) - sigma**2 / 2
    at_s, requests = 0.0, []
    for _ in range(num_requests):
        output_tokens = round(chance.lognormvariate(mu, sigma))
        requests.append(
            TimedRequest(
                at_s=at_s,
                prompt_tokens=prompt_tokens,
                output_tokens=min(max(output_tokens, 1), max_output_tokens),
            )
        )
        at_s += chance.expovariate(rate_per_s)
    return requests


def read_trace(path: Path) -> list[TimedRequest]:
    """A trace in the form of Azure's LLM traces (.csv) or Mooncake's (.jsonl).

    Raises TraceError when the file is not there or has another form.
    """
    readers = {".csv": _read_azure, ".jsonl": _read_mooncake}
    if path.suffix not in readers:
        raise TraceError(f"trace {path} is neither a .csv nor a .jsonl file")
    try:
        return readers[path.suffix](path)
    except (OSError, ValueError, KeyError) as error:
        raise TraceError(f"trace {path} cannot be read: {error}") from error


def _read_azure(path: Path) -> list[TimedRequest]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    # Seven digits of a second are one more than fromisoformat takes.
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in rows]
    return [
        TimedRequest(
            at_s=(time - times[0]).total_seconds(),
            prompt_tokens=int(row["ContextTokens"]),
            output_tokens=int(row["GeneratedTokens"]),
        )
        for time, row in zip(times, rows, strict=True)
    ]


def _read_mooncake(path: Path) -> list[TimedRequest]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        TimedRequest(
            at_s=(row["timestamp"] - rows[0]["timestamp"]) / 1e3,
            prompt_tokens=row["input_length"],
            output_tokens=row["output_length"],
        )
        for row in rows
    ]


def scaled(
    requests: Sequence[TimedRequest], *, num_requests: int, rate_per_s: float, tokens: float
) -> list[TimedRequest]:
    """The first of a trace, at another mean rate, with lengths multiplied by `tokens`."""
    first = requests[:num_requests]
    span_s = first[-1].at_s
    stretch = (len(first) - 1) / rate_per_s / span_s if span_s > 0 else 1.0
    return [
        TimedRequest(
            at_s=request.at_s * stretch,
            prompt_tokens=max(1, round(request.prompt_tokens * tokens)),
            output_tokens=max(1, round(request.output_tokens * tokens)),
        )
        for request in first
    ]
