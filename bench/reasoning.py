"""Reasoning loads on Pagewire: long outputs of swinging length, arriving at their own pace.

Each variant of the server gets the same requests at the same times: all begin with the same
instructions and are sampled as makers of reasoning models recommend. Measured are the KV use and
the batch of the decode worker over time, the time until a request is complete and how far the
slowest lag behind, and what quantisation, speculation and the prefix cache change. Variants run
one after the other, so what else the machine does disturbs all figures but the processor time.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.figures import output_rate, percentile, tpots_s
from harness.http_endpoint import open_http_endpoint
from harness.load import Arrival, open_loop
from harness.memory import cpu_seconds, process_tree
from harness.plot import sparkline
from harness.process import StartError, run_async
from harness.prompts import TEXT, PromptSource
from harness.streams import StreamError, StreamTimes
from harness.table import markdown_table, number
from harness.worker_samples import DecodeSample, sampled
from harness.workload import TimedRequest, TraceError, read_trace, reasoning_load, scaled
from pagewire.cluster.api import tokenizer_of
from pagewire.engine.loading.resolve import resolve_model
from peers.pagewire_server import SERVED_MODEL, PagewireServer
from peers.workspace import Workspace

SEED = 1
SAMPLE_S = 1.0
PLOT_WIDTH = 72
# Sampled, since a small model that is greedy soon repeats itself; with a seed, so that variants of
# the same weights write the same.
SAMPLING = {"temperature": 0.6, "top_p": 0.95, "seed": SEED}

# Arguments of `pagewire serve`, by what they are to show.
VARIANTS: dict[str, tuple[str, ...]] = {
    "default": (),
    "int8 weights": ("--quantization", "int8"),
    "int4 weights": ("--quantization", "int4"),
    "int8 KV": ("--kv-cache-dtype", "int8"),
    "speculation": ("--speculation", "ngram"),
    "no prefix cache": ("--no-prefix-cache",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is sent."""

    num_requests: int = 24
    rate_per_s: float = 1.0
    prompt_tokens: int = 64  # of the question, behind the instructions that all have in common
    mean_output_tokens: float = 200.0
    sigma: float = 0.9
    max_output_tokens: int = 800


INSTRUCTION_TOKENS = 320

QUICK = Load(num_requests=6, rate_per_s=1.5, mean_output_tokens=24.0, max_output_tokens=96)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One variant under the load. Times in seconds unless named otherwise."""

    output_tokens_per_s: float
    cpu_ms_per_token: float  # processor time of the whole server by the number of output tokens
    ttft_p50_ms: float
    tpot_p50_ms: float | None
    tpot_p99_ms: float | None
    e2e_p50: float
    e2e_p99: float
    last_tenth: float  # from the end of 90 % of the requests to the end of all, by the whole time
    kv_peak: int  # pages of the decode workers that requests hold
    kv_mean: float
    kv_total: int
    batch_peak: int
    batch_mean: float  # over the samples in which anything ran
    samples: tuple[DecodeSample, ...]


def make_arrivals(requests: Sequence[TimedRequest], workspace: Workspace) -> list[Arrival]:
    """Requests with prompts, the same in every variant; all begin with the same instructions."""
    tokens = tokenizer_of(workspace.model).encode(TEXT.read_text(encoding="utf-8"))
    source = PromptSource(tokens, seed=SEED)
    (instructions,) = source.take(1, INSTRUCTION_TOKENS)
    return [
        Arrival(
            at_s=request.at_s,
            prompt=instructions + source.take(1, request.prompt_tokens)[0],
            max_tokens=request.output_tokens,
        )
        for request in requests
    ]


async def run(options: Sequence[str], arrivals: Sequence[Arrival], workspace: Workspace) -> Outcome:
    """Start a server with these options and put it under the load.

    Raises StartError and StreamError.
    """
    async with PagewireServer(options=options).start(workspace) as running:
        assert running.url is not None
        async with (
            open_http_endpoint(running.url, SERVED_MODEL, sampling=SAMPLING) as endpoint,
            sampled(running.url, interval_s=SAMPLE_S) as samples,
        ):
            before = cpu_seconds(process_tree(running.pid))
            streams = await open_loop(endpoint, arrivals)
            cpu_s = cpu_seconds(process_tree(running.pid)) - before
    return outcome(streams, samples, cpu_s=cpu_s)


def outcome(
    streams: Sequence[StreamTimes], samples: Sequence[DecodeSample], *, cpu_s: float
) -> Outcome:
    """The figures of one run. Raises ValueError when there are no streams or samples."""
    e2e = [stream.end - stream.sent for stream in streams]
    ends = sorted(stream.end for stream in streams)
    start = min(stream.sent for stream in streams)
    tpots = tpots_s(streams)
    used = [sample.used_pages for sample in samples]
    batches = [sample.running for sample in samples if sample.running]
    return Outcome(
        output_tokens_per_s=output_rate(streams),
        cpu_ms_per_token=cpu_s * 1e3 / sum(stream.num_tokens for stream in streams),
        ttft_p50_ms=percentile([stream.ttft_s for stream in streams], 0.5) * 1e3,
        tpot_p50_ms=percentile(tpots, 0.5) * 1e3 if tpots else None,
        tpot_p99_ms=percentile(tpots, 0.99) * 1e3 if tpots else None,
        e2e_p50=percentile(e2e, 0.5),
        e2e_p99=percentile(e2e, 0.99),
        last_tenth=(ends[-1] - percentile(ends, 0.9)) / (ends[-1] - start),
        kv_peak=max(used),
        kv_mean=statistics.mean(used),
        kv_total=samples[-1].total_pages,
        batch_peak=max(batches, default=0),
        batch_mean=statistics.mean(batches) if batches else 0.0,
        samples=tuple(samples),
    )


def table(outcomes: dict[str, Outcome]) -> str:
    """All variants, one a row."""
    header = ["variant", "output tok/s", "CPU ms a token", "TTFT p50 (ms)", "TPOT p50"]
    header += ["TPOT p99 (ms)", "E2E p50", "E2E p99 (s)", "last tenth", "KV pages, peak", "mean"]
    header += ["batch, peak", "mean"]
    rows = []
    for name, each in outcomes.items():
        values: list[float | None] = [each.output_tokens_per_s, each.cpu_ms_per_token]
        values += [each.ttft_p50_ms, each.tpot_p50_ms, each.tpot_p99_ms, each.e2e_p50, each.e2e_p99]
        kv = [f"{each.kv_peak} of {each.kv_total}", number(each.kv_mean)]
        batch = [str(each.batch_peak), number(each.batch_mean)]
        rows.append([name, *map(number, values), f"{each.last_tenth:.0%}", *kv, *batch])
    return markdown_table(header, rows)


def plots(name: str, each: Outcome) -> str:
    """KV use and batch of one variant over time, each up to its own peak."""
    series = {
        "in use": [sample.used_pages for sample in each.samples],
        "cached": [sample.cached_pages for sample in each.samples],
        "batch": [sample.running for sample in each.samples],
    }
    lines = [f"{name}: KV pages and batch, {each.samples[-1].at_s:.0f} s from left to right"]
    for label, values in series.items():
        line = sparkline(values, width=PLOT_WIDTH, top=max(values))
        lines.append(f"  {label:6} |{line}| to {max(values)}")
    return "\n".join(lines)


def requests_of(arguments: argparse.Namespace, load: Load) -> list[TimedRequest]:
    """The load, or the trace in its place. Raises TraceError."""
    if arguments.trace is None:
        return reasoning_load(**asdict(load), seed=SEED)
    return scaled(
        read_trace(arguments.trace),
        num_requests=load.num_requests,
        rate_per_s=load.rate_per_s,
        tokens=arguments.scale_tokens,
    )


def chosen_variants(names: str | None, *, quick: bool) -> Sequence[str]:
    """What `--variants` says, or what stands for it."""
    if names is None:
        return ["default"] if quick else list(VARIANTS)
    return [name.strip() for name in names.split(",")]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--quick", action="store_true", help="a small load, within a minute each")
    parser.add_argument(
        "--variants",
        help=f"comma-separated, of {', '.join(VARIANTS)}; without it all, with --quick the first",
    )
    parser.add_argument("--requests", type=int, help=f"default {Load().num_requests}")
    parser.add_argument(
        "--rate", type=float, help=f"requests a second; default {Load().rate_per_s}"
    )
    parser.add_argument("--trace", type=Path, help="times and lengths of a .csv or .jsonl trace")
    parser.add_argument(
        "--scale-tokens", type=float, default=0.1, help="multiplies the lengths of a trace"
    )
    arguments = parser.parse_args()
    arguments.variants = chosen_variants(arguments.variants, quick=arguments.quick)
    if unknown := set(arguments.variants) - set(VARIANTS):
        parser.error(f"--variants has {', '.join(unknown)}; choose of {', '.join(VARIANTS)}")
    for name in ("requests", "rate", "scale_tokens"):
        if (value := getattr(arguments, name)) is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be above 0")
    return arguments


def save(
    path: Path, requests: Sequence[TimedRequest], outcomes: dict[str, Outcome], left: dict[str, str]
) -> None:
    """Write everything that is known so far."""
    result = {
        "requests": [asdict(request) for request in requests],
        "variants": {name: asdict(each) for name, each in outcomes.items()},
        "left_out": left,
    }
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    arguments = parse()
    base = QUICK if arguments.quick else Load()
    load = Load(
        **asdict(base)
        | {"num_requests": arguments.requests or base.num_requests}
        | {"rate_per_s": arguments.rate or base.rate_per_s}
    )
    try:
        requests = requests_of(arguments, load)
    except TraceError as error:
        raise SystemExit(str(error)) from error
    workspace = Workspace(model=resolve_model(None))
    arrivals = make_arrivals(requests, workspace)
    outcomes: dict[str, Outcome] = {}
    left: dict[str, str] = {}
    for name, options in VARIANTS.items():
        if name not in arguments.variants:
            left[name] = "not chosen; see --variants"
            continue
        started = time.perf_counter()
        try:
            outcomes[name] = run_async(run(options, arrivals, workspace))
        except (StartError, StreamError) as error:
            left[name] = str(error)
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
        if arguments.json:
            save(arguments.json, requests, outcomes, left)
    print("\n\n".join(plots(name, each) for name, each in outcomes.items()) + "\n")
    print(table(outcomes))
    for name, reason in left.items():
        print(f"left out: {name} ({reason})")


if __name__ == "__main__":
    main()
