"""Figures and tables from what was measured, and the bounds that it is held against."""

import json
from dataclasses import asdict

import pytest

from harness.machine import Machine, ModelSize, from_json
from harness.report import (
    PeerReport,
    cost_table,
    interference_figures,
    load_by_streams,
    load_table,
    prefill_figures,
    prefill_table,
    ratio_table,
    throughput_ratios,
)
from harness.scenarios import Plan, Record, loads_of
from harness.streams import StreamTimes
from harness.table import markdown_table, number
from peers.peer import Interface, Traits

MACHINE = Machine(
    cores=2,
    read_gb_per_s=10.0,
    gemm_gflop_per_s={"float32": 100.0, "bfloat16": 200.0, "int8": 400.0},
    model=ModelSize(layer_weights=100_000_000, head_weights=20_000_000, kv_values=10_000),
)
PLAN = Plan(streams=(1, 8), long_prompt_tokens=1000)
TRAITS = Traits(name="pagewire", weights="bfloat16", interface=Interface.HTTP)


def times(*arrivals: float) -> StreamTimes:
    return StreamTimes(sent=0.0, arrivals=arrivals, num_tokens=len(arrivals))


def peer_report(name: str, record: Record) -> PeerReport:
    return PeerReport(
        name=name,
        weights="bfloat16",
        interface=Interface.HTTP,
        ready_s=1.0,
        idle_cores=0.0,
        pss_mb=1.0,
        pss_mb_by_command={},
        load=load_by_streams(record),
        decode_of_bound={},
        prefill=prefill_figures(record, TRAITS, PLAN, MACHINE),
        interference=interference_figures(record),
    )


def test_small_batches_are_bound_by_memory_and_large_ones_by_compute() -> None:
    # 120 M weights of 2 bytes, and 10 tokens of 10,000 values of 2 bytes, at 10 GB/s
    bound = MACHINE.decode_bound_ms("bfloat16", batch=1, context=10)
    assert bound == pytest.approx((240e6 + 200e3) / 10e9 * 1e3)
    assert MACHINE.decode_bound_ms("bfloat16", batch=100, context=1) == pytest.approx(120.0)
    assert MACHINE.prefill_bound_tokens_per_s("int8") == pytest.approx(2000.0)


def test_a_machine_survives_its_way_between_processes() -> None:
    assert from_json(json.dumps(asdict(MACHINE))) == MACHINE


def test_prefill_and_prefix_hits() -> None:
    record = Record(misses=[times(2.0), times(4.0)], hits=[times(0.2), times(0.2)])
    figures = prefill_figures(record, TRAITS, PLAN, MACHINE)
    assert figures is not None
    assert figures.tokens_per_s == pytest.approx(1000 / 3)
    assert figures.hit_ratio == pytest.approx(0.075)
    assert figures.of_bound == pytest.approx(1 / 3)


def test_interference_is_a_ratio_of_tails() -> None:
    record = Record(alone=[times(0.0, 1.0)], beside=[times(0.0, 1.5)], arrived=[times(2.0)])
    figures = interference_figures(record)
    assert figures is not None
    assert figures.tpot_p99_ratio == 1.5 and figures.num_prefills == 1


def test_what_was_not_asked_has_no_figures() -> None:
    assert prefill_figures(Record(), TRAITS, PLAN, MACHINE) is None
    assert interference_figures(Record()) is None


def test_an_engine_gets_only_the_streams_that_it_serves() -> None:
    single = Traits(name="x", weights="int4", interface=Interface.IN_PROCESS, max_streams=1)
    assert loads_of(single, PLAN) == [1]
    assert loads_of(TRAITS, PLAN) == [1, 8]


def test_throughput_against_the_others() -> None:
    fast, slow = Record(load={1: [[times(1.0, 2.0)]]}), Record(load={1: [[times(1.0, 4.0)]]})
    reports = [peer_report("pagewire", fast), peer_report("other", slow)]
    assert throughput_ratios(reports, "pagewire") == {"other": {1: 2.0}}
    assert "| pagewire / other | 2.00" in (ratio_table(reports) or "")
    assert ratio_table(reports[:1]) is None


def test_tables_have_a_dash_where_nothing_was_measured() -> None:
    reports = [peer_report("pagewire", Record(load={1: [[times(1.0)]]}))]
    assert "| pagewire | bfloat16 | HTTP" in load_table(reports)
    assert prefill_table(reports).count(" - ") == 9
    assert "pagewire" in cost_table(reports)


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    lines = markdown_table(["a", "b"], [["long", number(1234.5)], ["c", number(None)]]).split("\n")
    assert lines == ["| a    | b       |", "| ---- | ------- |", *lines[2:]]
    assert len(set(map(len, lines))) == 1
