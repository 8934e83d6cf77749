"""From what was measured to figures, ratios and tables. Pure."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.figures import LoadFigures, load_figures, percentile, tpots_s
from harness.machine import Machine
from harness.scenarios import Plan, Record
from harness.streams import StreamTimes
from harness.table import markdown_table, number
from peers.peer import Interface, Traits


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillFigures:
    """Long prompts with one output token, one after the other."""

    tokens_per_s: float  # prompt tokens by median TTFT
    ttft_miss_ms: float
    ttft_hit_ms: float  # the same prompt again
    hit_ratio: float  # median over the prompts of hit by miss
    of_bound: float  # of the machine's products alone


@dataclass(frozen=True, slots=True, kw_only=True)
class InterferenceFigures:
    """Decoding beside a steady stream of long prompts, by decoding alone."""

    tpot_p99_alone_ms: float
    tpot_p99_beside_ms: float
    tpot_p99_ratio: float
    itl_p99_alone_ms: float
    itl_p99_beside_ms: float
    num_prefills: int  # that ended meanwhile
    prefill_ttft_p50_ms: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerReport:
    """One engine."""

    name: str
    weights: str
    interface: Interface
    ready_s: float
    idle_cores: float  # busy while nobody asks
    pss_mb: float  # all processes together, after the load
    pss_mb_by_command: Mapping[str, float]
    load: Mapping[int, LoadFigures]  # by number of streams
    decode_of_bound: Mapping[int, float]  # the bound's step time by the median step's
    prefill: PrefillFigures | None
    interference: InterferenceFigures | None


def prefill_figures(
    record: Record, traits: Traits, plan: Plan, machine: Machine
) -> PrefillFigures | None:
    """None where the engine was not asked."""
    if not record.misses:
        return None
    misses = [stream.ttft_s for stream in record.misses]
    hits = [stream.ttft_s for stream in record.hits]
    rate = plan.long_prompt_tokens / statistics.median(misses)
    return PrefillFigures(
        tokens_per_s=rate,
        ttft_miss_ms=statistics.median(misses) * 1e3,
        ttft_hit_ms=statistics.median(hits) * 1e3,
        hit_ratio=statistics.median(hit / miss for hit, miss in zip(hits, misses, strict=True)),
        of_bound=rate / machine.prefill_bound_tokens_per_s(traits.weights),
    )


def interference_figures(record: Record) -> InterferenceFigures | None:
    """None where the engine was not asked."""
    if not record.alone:
        return None
    alone, beside = (percentile(tpots_s(each), 0.99) for each in (record.alone, record.beside))
    ttfts = [stream.ttft_s for stream in record.arrived]
    return InterferenceFigures(
        tpot_p99_alone_ms=alone * 1e3,
        tpot_p99_beside_ms=beside * 1e3,
        tpot_p99_ratio=beside / alone,
        itl_p99_alone_ms=_itl_p99_ms(record.alone),
        itl_p99_beside_ms=_itl_p99_ms(record.beside),
        num_prefills=len(ttfts),
        prefill_ttft_p50_ms=statistics.median(ttfts) * 1e3 if ttfts else None,
    )


def _itl_p99_ms(streams: Sequence[StreamTimes]) -> float:
    return percentile([gap for stream in streams for gap in stream.gaps_s], 0.99) * 1e3


def load_by_streams(record: Record) -> dict[int, LoadFigures]:
    """The figures of every load that the engine was put under."""
    return {
        count: load_figures(rounds, num_concurrent=count) for count, rounds in record.load.items()
    }


def decode_of_bound(
    load: Mapping[int, LoadFigures], traits: Traits, plan: Plan, machine: Machine
) -> dict[int, float]:
    """The share of the machine's bound that decode steps reach; with the mean context."""
    context = plan.prompt_tokens + plan.max_tokens // 2
    return {
        count: machine.decode_bound_ms(traits.weights, batch=count, context=context)
        / figures.step_p50_ms
        for count, figures in load.items()
        if figures.step_p50_ms
    }


def load_table(reports: Sequence[PeerReport]) -> str:
    """Latency and throughput of all engines, by number of streams."""
    header = ["engine", "weights", "interface", "streams", "TTFT p50", "TPOT mean", "TPOT p50"]
    header += ["TPOT p99", "ITL p99 (ms)", "output tok/s", "of bound"]
    rows = []
    for count in sorted({count for report in reports for count in report.load}):
        for report in reports:
            if figures := report.load.get(count):
                rows.append(_load_row(report, count, figures))
    return markdown_table(header, rows)


def _load_row(report: PeerReport, count: int, figures: LoadFigures) -> list[str]:
    # An engine that reports all tokens at the end has no time to first token.
    times = [figures.tpot_mean_ms, figures.tpot_p50_ms, figures.tpot_p99_ms, figures.itl_p99_ms]
    ttft = figures.ttft_p50_ms if figures.itl_p99_ms is not None else None
    share = report.decode_of_bound.get(count)
    return [
        report.name,
        report.weights,
        report.interface,
        str(count),
        *(number(value) for value in (ttft, *times)),
        number(figures.output_tokens_per_s),
        number(share, 2),
    ]


def prefill_table(reports: Sequence[PeerReport]) -> str:
    """Long prompts, new and known, and what their stream does to decoding."""
    header = ["engine", "prefill tok/s", "of bound", "TTFT miss", "TTFT hit (ms)", "hit/miss"]
    header += ["TPOT p99 alone", "beside prefills (ms)", "ratio", "ITL p99 beside (ms)"]
    rows = []
    for report in reports:
        prefill, beside = report.prefill, report.interference
        cells = [None] * 5 if prefill is None else _prefill_cells(prefill)
        cells += [None] * 4 if beside is None else _interference_cells(beside)
        digits = [0, 2, 0, 0, 3, 1, 1, 2, 1]
        rows.append([report.name, *map(number, cells, digits)])
    return markdown_table(header, rows)


def _prefill_cells(figures: PrefillFigures) -> list[float | None]:
    return [
        figures.tokens_per_s,
        figures.of_bound,
        figures.ttft_miss_ms,
        figures.ttft_hit_ms,
        figures.hit_ratio,
    ]


def _interference_cells(figures: InterferenceFigures) -> list[float | None]:
    return [
        figures.tpot_p99_alone_ms,
        figures.tpot_p99_beside_ms,
        figures.tpot_p99_ratio,
        figures.itl_p99_beside_ms,
    ]


def cost_table(reports: Sequence[PeerReport]) -> str:
    """What the engines take of the machine beside their work."""
    rows = [
        [
            report.name,
            number(report.ready_s),
            number(report.pss_mb, 0),
            number(report.idle_cores, 2),
        ]
        for report in reports
    ]
    return markdown_table(["engine", "start (s)", "PSS (MB)", "cores when idle"], rows)


def throughput_ratios(reports: Sequence[PeerReport], base: str) -> dict[str, dict[int, float]]:
    """Output tokens per second of engine `base` by those of every other, by number of streams."""
    own = next(report for report in reports if report.name == base)
    return {
        report.name: {
            count: own.load[count].output_tokens_per_s / figures.output_tokens_per_s
            for count, figures in report.load.items()
            if count in own.load
        }
        for report in reports
        if report is not own
    }


def ratio_table(reports: Sequence[PeerReport]) -> str | None:
    """Every Pagewire server against every other engine: output tokens per second.

    None when there is nothing to compare with.
    """
    if len(reports) < 2:
        return None
    counts = sorted({count for report in reports for count in report.load})
    rows = []
    for report in reports:
        if report.interface is Interface.HTTP and report.name.startswith("pagewire"):
            for other, ratios in throughput_ratios(reports, report.name).items():
                cells = [number(ratios.get(count), 2) for count in counts]
                rows.append([f"{report.name} / {other}", *cells])
    return markdown_table(["output tok/s", *(f"{count} streams" for count in counts)], rows)
