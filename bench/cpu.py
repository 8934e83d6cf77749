"""Pagewire over HTTP beside other engines on the same processor, in the same run.

All engines run at the same time and take turns, so that a busy machine slows all of them; medians
and percentiles are over all rounds. Engines that are not installed are skipped, and the output says
so: `make bench-peers` installs them. The machine's own limits are measured in the same run.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from harness.load import closed_loop
from harness.machine import Machine
from harness.machine import from_json as machine_from_json
from harness.memory import idle_cores, memory_of, process_tree
from harness.process import StartError, run_async
from harness.prompts import TEXT, PromptSource
from harness.report import (
    PeerReport,
    cost_table,
    decode_of_bound,
    interference_figures,
    load_by_streams,
    load_table,
    prefill_figures,
    prefill_table,
    ratio_table,
)
from harness.scenarios import QUICK, Plan, Record, RoundInput, loads_of, make_round, run_round
from harness.starts import forget, start_seconds
from harness.streams import StreamError
from pagewire.cluster.api import tokenizer_of
from pagewire.engine.loading.resolve import resolve_model
from peers.catalog import all_peers
from peers.peer import Peer, RunningPeer
from peers.workspace import ROOT, Workspace, cores, pagewire_environment

QUICK_PEERS = ("pagewire",)
IDLE_S = 2.0
WARM_UP_TOKENS = 4
SEED = 1


@dataclass(slots=True, kw_only=True)
class Contender:
    """An engine under measurement."""

    peer: Peer
    running: RunningPeer
    idle_cores: float
    record: Record = field(default_factory=Record)


def select(names: Sequence[str], workspace: Workspace) -> tuple[list[Peer], dict[str, str]]:
    """The engines that can run here, and why each of the others is skipped."""
    peers, skipped = [], {}
    for name, peer in all_peers().items():
        if name not in names:
            continue
        reason = peer.missing(workspace)
        if reason is None:
            peers.append(peer)
        else:
            skipped[name] = reason
    return peers, skipped


async def compare(
    peers: Sequence[Peer],
    plan: Plan,
    machine: Machine,
    workspace: Workspace,
    skipped: dict[str, str],
) -> list[PeerReport]:
    """Start all engines, run all rounds, and report.

    An engine that does not start, or fails while it is measured, is added to `skipped`. Raises
    StreamError when one fails in the short outputs before the first round.
    """
    source = PromptSource(
        tokenizer_of(workspace.model).encode(TEXT.read_text(encoding="utf-8")), seed=SEED
    )
    async with AsyncExitStack() as stack:
        contenders = []
        for peer in peers:
            try:
                running = await stack.enter_async_context(peer.start(workspace))
            except StartError as error:
                skipped[peer.traits.name] = f"it did not start: {error}"
                continue
            contenders.append(
                Contender(peer=peer, running=running, idle_cores=idle_cores(running.pid, IDLE_S))
            )
            say(f"{peer.traits.name}: ready after {running.ready_s:.1f} s")
        await _warm_up(contenders, plan, source)
        for number in range(plan.rounds):
            prompts = make_round(plan, source)
            for contender in _rotated(contenders, number):
                say(f"round {number + 1} of {plan.rounds}: {contender.peer.traits.name}")
                try:
                    await measure(contender, plan, prompts)
                except StreamError as error:
                    skipped[contender.peer.traits.name] = f"it failed under load: {error}"
                    contenders.remove(contender)
        return [report(contender, plan, machine) for contender in contenders]


async def measure(contender: Contender, plan: Plan, prompts: RoundInput) -> None:
    """One round of one engine."""
    traits = contender.peer.traits
    await run_round(contender.running.endpoint, traits, plan, prompts, contender.record)


async def _warm_up(contenders: Sequence[Contender], plan: Plan, source: PromptSource) -> None:
    """Short outputs for as many streams as will be measured, forgotten."""
    for contender in contenders:
        for count in loads_of(contender.peer.traits, plan):
            await closed_loop(
                contender.running.endpoint,
                source.take(count, plan.prompt_tokens),
                num_streams=count,
                max_tokens=WARM_UP_TOKENS,
            )


def _rotated(contenders: Sequence[Contender], by: int) -> list[Contender]:
    """Another one begins in every round."""
    start = by % max(len(contenders), 1)
    return [*contenders[start:], *contenders[:start]]


def report(contender: Contender, plan: Plan, machine: Machine) -> PeerReport:
    """The figures of an engine that still runs."""
    traits, record = contender.peer.traits, contender.record
    load = load_by_streams(record)
    memory = memory_of(process_tree(contender.running.pid))
    return PeerReport(
        name=traits.name,
        weights=traits.weights,
        interface=traits.interface,
        ready_s=contender.running.ready_s,
        idle_cores=contender.idle_cores,
        pss_mb=sum(process.pss_mb for process in memory),
        pss_mb_by_command={
            f"{process.pid} {process.command}": process.pss_mb for process in memory
        },
        load=load,
        decode_of_bound=decode_of_bound(load, traits, plan, machine),
        prefill=prefill_figures(record, traits, plan, machine),
        interference=interference_figures(record),
    )


def measure_machine(workspace: Workspace) -> Machine:
    """The limits of this machine, measured in a process that ends before anything else starts."""
    threads = {"OMP_NUM_THREADS": str(len(cores()))}
    environment = {**os.environ, **pagewire_environment(), **threads}
    output = subprocess.run(
        [sys.executable, "-m", "harness.machine", str(workspace.model)],
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    return machine_from_json(output)


def measure_starts(workspace: Workspace) -> dict[str, float]:
    """Seconds of starts, by launcher and by whether the files were in memory."""
    seconds = {}
    for launcher in ("subprocess", "ray"):
        for kind in ("cold", "warm"):
            if kind == "cold":
                forget([Path(sys.prefix), workspace.model, ROOT / "src"])
            name = f"{launcher}, {kind}"
            seconds[name] = run_async(start_seconds(workspace, launcher=launcher))
            say(f"start with {name}: {seconds[name]:.1f} s")
    return seconds


def say(text: str) -> None:
    """Progress goes to standard error, results to standard output."""
    print(text, file=sys.stderr, flush=True)


def show(reports: Sequence[PeerReport], machine: Machine, skipped: Mapping[str, str]) -> None:
    """Print the tables."""
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in machine.gemm_gflop_per_s.items())
    print(
        f"{machine.cores} cores; memory read {machine.read_gb_per_s:.1f} GB/s; GFLOP/s of "
        f"{rates}; {skipped_line(skipped)}\n"
    )
    for table in (load_table, prefill_table, ratio_table, cost_table):
        if text := table(reports):
            print(text + "\n")


def skipped_line(skipped: Mapping[str, str]) -> str:
    """Which engines are not in the tables, and why."""
    if not skipped:
        return "nothing was skipped"
    return "skipped: " + "; ".join(f"{name} ({reason})" for name, reason in skipped.items())


def parse() -> argparse.Namespace:
    """The command line."""
    names = list(all_peers())
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--quick", action="store_true", help="Pagewire alone, within a minute")
    parser.add_argument("--peers", help=f"engines, separated by commas, of: {', '.join(names)}")
    parser.add_argument(
        "--rounds", type=int, help=f"default {Plan().rounds}, {QUICK.rounds} if quick"
    )
    parser.add_argument(
        "--requests-per-stream",
        type=int,
        default=Plan().requests_per_stream,
        metavar="N",
        help="of each load; 1, the default: all prompts arrive together and nothing follows them",
    )
    parser.add_argument("--no-starts", action="store_true", help="measure no cold and warm starts")
    arguments = parser.parse_args()
    chosen = QUICK_PEERS if arguments.quick else names
    arguments.peers = arguments.peers.split(",") if arguments.peers else list(chosen)
    if unknown := set(arguments.peers) - set(names):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(names)}")
    for name in ("rounds", "requests_per_stream"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    return arguments


def main() -> None:
    arguments = parse()
    plan = QUICK if arguments.quick else Plan()
    plan = replace(
        plan,
        rounds=arguments.rounds or plan.rounds,
        requests_per_stream=arguments.requests_per_stream,
    )
    workspace = Workspace(model=resolve_model(None))
    peers, skipped = select(arguments.peers, workspace)
    starts = {} if arguments.quick or arguments.no_starts else measure_starts(workspace)
    machine = measure_machine(workspace)
    reports = run_async(compare(peers, plan, machine, workspace, skipped))
    show(reports, machine, skipped)
    if arguments.json:
        result = {
            "plan": asdict(plan),
            "machine": asdict(machine) | {"system": platform.platform()},
            "start_s": starts,
            "engines": [asdict(each) for each in reports],
            "skipped": skipped,
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (StartError, StreamError) as failure:
        sys.exit(f"the benchmark failed: {failure}")
