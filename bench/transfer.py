"""How fast 4 MiB frames travel between two processes of this machine, in GB/s.

Every transport of Pagewire runs beside the bare way under it: a copy into shared memory and one out
of it, sockets with sendmsg and recv_into, gloo and UCX without headers, order or an event loop.
"pages" is what workers do: frames of pages over tcp, with header and checksum, into the pages of
the receiver; "bare pages" are the same bytes in the same memory over the same transport. Each of
the two processes has half of the cores. All take turns in every round, so that a busy machine slows
all of them; rates are medians over the rounds, and so are ratios, of two lanes in the same round.
Processor time is of both ends, per frame: other work on the machine changes it less. What aborts
and replays cost is counted at the end, with the real cores of workers under virtual time.
"""

import argparse
import asyncio
import json
import os
import platform
import select
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

from harness.checksum_rate import checksum_rates
from harness.handoff_safety import describe_safety, measure_safety
from harness.page_lane import (
    FRAME_BYTES,
    NUM_BUFFERS,
    RECEIVER,
    SENDER,
    BarePages,
    CheckedPages,
    PagesLane,
    receive_pages,
)
from pagewire.kv_transfer.landing import Landing
from pagewire.kv_transfer.select import create_transports, probe
from pagewire.kv_transfer.shared_memory import Offer, open_offer
from pagewire.kv_transfer.transport import Connection
from pagewire.kv_transfer.ucx_library import UcxLibrary, open_library

BASELINES = {
    "shm": "bare memory",
    "tcp": "bare socket",
    "pages": "bare pages",  # the same bytes, in the same memory
    "gloo": "bare gloo",
    "ucx": "bare ucx",
}
RING_BYTES = NUM_BUFFERS * FRAME_BYTES  # of the bare way through shared memory
DONE = b"done"


def make_buffers() -> list[memoryview]:
    return [memoryview(bytearray(os.urandom(FRAME_BYTES))) for _ in range(NUM_BUFFERS)]


class Lane(Protocol):
    """One way to send frames to the process at the other end."""

    def send(self, num_frames: int) -> None:
        """Send so many frames; returns when the receiver says that it has them all."""

    def close(self) -> None:
        """End the lane, and with it the receiver."""


class BareMemoryLane:
    """One copy into shared memory; a byte through a socket says that the other end may copy out."""

    def __init__(self, address: str) -> None:
        host, port = address.split(":")
        self._sock = socket.create_connection((host, int(port)))
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffers = make_buffers()
        self._memory = Offer(RING_BYTES)
        self._sock.sendall(self._memory.note)
        assert self._sock.recv(len(DONE)) == DONE

    def send(self, num_frames: int) -> None:
        self._sock.sendall(num_frames.to_bytes(4, "big"))
        num_freed = 0
        for number in range(num_frames):
            if number - num_freed == NUM_BUFFERS:
                num_freed += len(self._sock.recv(NUM_BUFFERS))
            index = number % NUM_BUFFERS
            start = index * FRAME_BYTES
            self._memory.segment.view[start : start + FRAME_BYTES] = self._buffers[index]
            self._sock.sendall(b"+")
        while num_freed < num_frames:
            num_freed += len(self._sock.recv(NUM_BUFFERS))

    def close(self) -> None:
        self._sock.close()
        self._memory.close()


def receive_bare_memory() -> None:
    sock = accept_one()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffers = make_buffers()
    memory = open_offer(sock.recv(24, socket.MSG_WAITALL), RING_BYTES)
    sock.sendall(DONE)
    while count := sock.recv(4, socket.MSG_WAITALL):
        for number in range(int.from_bytes(count, "big")):
            assert sock.recv(1) == b"+"
            index = number % NUM_BUFFERS
            start = index * FRAME_BYTES
            buffers[index][:] = memory.view[start : start + FRAME_BYTES]
            sock.sendall(b"-")
    memory.close()


class BareSocketLane:
    """One frame after the other through a socket."""

    def __init__(self, address: str) -> None:
        host, port = address.split(":")
        self._sock = socket.create_connection((host, int(port)))
        self._buffers = make_buffers()

    def send(self, num_frames: int) -> None:
        self._sock.sendall(num_frames.to_bytes(4, "big"))
        for number in range(num_frames):
            rest = self._buffers[number % NUM_BUFFERS]
            while rest:
                rest = rest[self._sock.sendmsg([rest]) :]
        assert self._sock.recv(len(DONE)) == DONE

    def close(self) -> None:
        self._sock.close()


def receive_bare_socket() -> None:
    sock = accept_one()
    buffers = make_buffers()
    while count := sock.recv(4, socket.MSG_WAITALL):
        for number in range(int.from_bytes(count, "big")):
            rest = buffers[number % NUM_BUFFERS]
            while rest:
                rest = rest[sock.recv_into(rest) :]
        sock.sendall(DONE)


class BareUcx:
    """A UCX worker and endpoint, driven by hand."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._library: UcxLibrary = open_library()
        self._worker = self._library.new_worker()
        address = bytes(self._worker.address)
        sock.sendall(len(address).to_bytes(4, "big") + address)
        length = int.from_bytes(sock.recv(4, socket.MSG_WAITALL), "big")
        peer = self._library.api.UCXAddress.create_from_buffer(
            sock.recv(length, socket.MSG_WAITALL)
        )
        self._endpoint = self._library.api.UCXEndpoint.create_from_worker_address(
            self._worker, peer, True
        )
        self._arrays = [self._library.array(buffer) for buffer in make_buffers()]

    def move(self, num_frames: int, *, sending: bool) -> None:
        """Send or receive so many frames, NUM_BUFFERS at a time."""
        start = self._endpoint.tag_send if sending else self._worker.tag_recv
        tag = self._library.api.UCXXTag
        requests: list[Any] = []
        for number in range(num_frames):
            if len(requests) == NUM_BUFFERS:
                self._wait(requests.pop(0))
            requests.append(start(self._arrays[number % NUM_BUFFERS], tag(number % NUM_BUFFERS)))
        for request in requests:
            self._wait(request)

    def _wait(self, request: Any) -> None:
        while not request.completed:
            self._worker.progress()
            if not request.completed and self._worker.arm():
                select.select([self._worker.epoll_file_descriptor], [], [], 0.001)
        request.check_error()


class BareUcxLane:
    """Frames through UCX alone; a socket says when a round begins and ends."""

    def __init__(self, address: str) -> None:
        host, port = address.split(":")
        self._ucx = BareUcx(socket.create_connection((host, int(port))))

    def send(self, num_frames: int) -> None:
        self._ucx.sock.sendall(num_frames.to_bytes(4, "big"))
        self._ucx.move(num_frames, sending=True)
        assert self._ucx.sock.recv(len(DONE)) == DONE

    def close(self) -> None:
        self._ucx.sock.close()


def receive_bare_ucx() -> None:
    ucx = BareUcx(accept_one())
    while count := ucx.sock.recv(4, socket.MSG_WAITALL):
        ucx.move(int.from_bytes(count, "big"), sending=False)
        ucx.sock.sendall(DONE)


def bare_gloo_lane(address: str) -> Lane:
    from harness.gloo_lane import BareGlooLane  # torch takes seconds to import

    return BareGlooLane(address)


def receive_bare_gloo() -> None:
    from harness import gloo_lane  # first, so that the sender need not wait

    gloo_lane.receive_bare_gloo(accept_one())


@dataclass(slots=True, kw_only=True)
class Rounds:
    """The Handler of both ends: the receiver counts frames, the sender waits for the answer."""

    buffers: list[memoryview] = field(default_factory=make_buffers)
    num_placed: int = 0
    arrived: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def place(self, peer: bytes, header: bytes, length: int) -> Landing:
        self.num_placed += 1
        return Landing(self.buffers[self.num_placed % NUM_BUFFERS][:length])

    def deliver(self, peer: bytes, header: bytes) -> None:
        self.arrived.put_nowait(header)

    def lost(self, peer: bytes, reason: str) -> None:
        self.ended.set()


class TransportLane:
    """Frames through one of Pagewire's transports, NUM_BUFFERS sends at a time."""

    def __init__(self, kind: str, address: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._connect(kind, address))

    async def _connect(self, kind: str, address: str) -> None:
        self._rounds = Rounds()
        self._transport = create_transports(kind, SENDER, self._rounds, "127.0.0.1").transports[0]
        await self._transport.start()
        self._connection: Connection = await self._transport.connect(RECEIVER, address.encode())

    def send(self, num_frames: int) -> None:
        self._loop.run_until_complete(self._send(num_frames))

    async def _send(self, num_frames: int) -> None:
        numbers = iter(range(num_frames))

        async def send_some(buffer: memoryview) -> None:
            for _ in numbers:
                await self._connection.send(b"frame", buffer)

        await self._connection.send(num_frames.to_bytes(4, "big"))
        await asyncio.gather(*(send_some(buffer) for buffer in self._rounds.buffers))
        assert await self._rounds.arrived.get() == DONE

    def close(self) -> None:
        self._loop.run_until_complete(self._transport.close())
        self._loop.close()


async def receive_transport(kind: str) -> None:
    rounds = Rounds()
    transport = create_transports(kind, RECEIVER, rounds, "127.0.0.1").transports[0]
    await transport.start()
    print(transport.address.decode(), flush=True)

    async def answer() -> None:
        while True:
            for _ in range(int.from_bytes(await rounds.arrived.get(), "big")):
                await rounds.arrived.get()
            connection = transport.connection(SENDER)
            assert connection is not None
            await connection.send(DONE)

    answering = asyncio.create_task(answer())
    await rounds.ended.wait()
    answering.cancel()
    await transport.close()


def accept_one() -> socket.socket:
    """Print an address, and return the connection that is made there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(f"127.0.0.1:{server.getsockname()[1]}", flush=True)
        sock, _ = server.accept()
    return sock


LANES: dict[str, tuple[Callable[[str], Lane], Callable[[], None]]] = {
    "bare memory": (BareMemoryLane, receive_bare_memory),
    "shm": (
        lambda address: TransportLane("shm", address),
        lambda: asyncio.run(receive_transport("shm")),
    ),
    "bare socket": (BareSocketLane, receive_bare_socket),
    "tcp": (
        lambda address: TransportLane("tcp", address),
        lambda: asyncio.run(receive_transport("tcp")),
    ),
    "bare pages": (
        lambda address: PagesLane(BarePages(), address),
        lambda: asyncio.run(receive_pages(BarePages())),
    ),
    "pages": (
        lambda address: PagesLane(CheckedPages(), address),
        lambda: asyncio.run(receive_pages(CheckedPages())),
    ),
    "bare gloo": (bare_gloo_lane, receive_bare_gloo),
    "gloo": (
        lambda address: TransportLane("gloo", address),
        lambda: asyncio.run(receive_transport("gloo")),
    ),
    "bare ucx": (BareUcxLane, receive_bare_ucx),
    "ucx": (
        lambda address: TransportLane("ucx", address),
        lambda: asyncio.run(receive_transport("ucx")),
    ),
}


def give_each_end_half(receivers: list[int]) -> None:
    """Half of the cores for this process and half for those of `receivers`, by pid."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if half := len(cores) // 2:
        os.sched_setaffinity(0, cores[:half])
        for pid in receivers:
            os.sched_setaffinity(pid, cores[half : 2 * half])


@dataclass(slots=True, kw_only=True)
class LaneTimes:
    """What one lane took, round by round."""

    seconds: list[float] = field(default_factory=list)
    sender_cpu_s: list[float] = field(default_factory=list)
    receiver_cpu_s: list[float] = field(default_factory=list)

    def measure(self, lane: Lane, receiver: psutil.Process, num_frames: int) -> None:
        """Add one round."""
        cpu_before, receiver_before = time.process_time(), _cpu_seconds(receiver)
        started = time.perf_counter()
        lane.send(num_frames)
        self.seconds.append(time.perf_counter() - started)
        self.sender_cpu_s.append(time.process_time() - cpu_before)
        self.receiver_cpu_s.append(_cpu_seconds(receiver) - receiver_before)


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def measure(names: list[str], num_rounds: int, num_frames: int) -> dict[str, LaneTimes]:
    """Every lane in every round."""
    receivers = [
        subprocess.Popen([sys.executable, __file__, "--receive", name], stdout=subprocess.PIPE)
        for name in names
    ]
    give_each_end_half([receiver.pid for receiver in receivers])
    lanes: list[Lane] = []
    for name, receiver in zip(names, receivers, strict=True):
        assert receiver.stdout is not None
        lanes.append(LANES[name][0](receiver.stdout.readline().decode().strip()))
    processes = [psutil.Process(receiver.pid) for receiver in receivers]
    times = {name: LaneTimes() for name in names}
    for lane in lanes:
        lane.send(num_frames)  # warms up both ends
    for _ in range(num_rounds):
        for name, lane, process in zip(names, lanes, processes, strict=True):
            times[name].measure(lane, process, num_frames)
    for lane, receiver in zip(lanes, receivers, strict=True):
        lane.close()
        receiver.communicate()
    return times


def congestion_control() -> str | None:
    """What the system gives TCP connections; one that paces them makes every lane of TCP slower."""
    if not hasattr(socket, "TCP_CONGESTION"):  # not on every operating system
        return None
    with socket.socket() as sock:
        name = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    return name.rstrip(b"\0").decode()


def report(times: dict[str, LaneTimes], num_frames: int) -> dict[str, Any]:
    num_bytes = num_frames * FRAME_BYTES
    return {
        "frame_bytes": FRAME_BYTES,
        "frames_per_round": num_frames,
        "machine": {
            "cpus": os.cpu_count(),
            "system": platform.platform(),
            "tcp_congestion_control": congestion_control(),
        },
        "gb_per_s": {
            name: {
                "median": num_bytes / statistics.median(lane.seconds) / 1e9,
                "min": num_bytes / max(lane.seconds) / 1e9,
                "max": num_bytes / min(lane.seconds) / 1e9,
            }
            for name, lane in times.items()
        },
        "ratio_to_baseline": {
            name: statistics.median(
                base / own
                for base, own in zip(times[bare].seconds, times[name].seconds, strict=True)
            )
            for name, bare in BASELINES.items()
            if {name, bare} <= times.keys()
        },
        "cpu_ms_per_frame": {
            name: {
                "sender": statistics.mean(lane.sender_cpu_s) / num_frames * 1e3,
                "receiver": statistics.mean(lane.receiver_cpu_s) / num_frames * 1e3,
            }
            for name, lane in times.items()
        },
        "checksum_gb_per_s": checksum_rates(),
    }


def describe(figures: dict[str, Any]) -> Iterator[str]:
    """Lines for a person to read."""
    for name, rate in figures["gb_per_s"].items():
        cpu = figures["cpu_ms_per_frame"][name]
        yield (
            f"{name:12} {rate['median']:6.2f} GB/s  ({rate['min']:.2f} to {rate['max']:.2f})  "
            f"processor time {cpu['sender']:.2f} and {cpu['receiver']:.2f} ms a frame"
        )
    for name, ratio in figures["ratio_to_baseline"].items():
        yield f"{name} / {BASELINES[name]}: {ratio:.2f}"
    rates = figures["checksum_gb_per_s"]
    yield f"checksum: {rates['from_memory']:.1f} GB/s from memory, {rates['in_cache']:.1f} in cache"
    if "pages" in figures["ratio_to_baseline"]:
        share = 1 / figures["ratio_to_baseline"]["pages"] - 1
        yield f"header, checksum and scatter: {share:.1%} of the transfer time on tcp"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, some seconds in all")
    parser.add_argument(
        "--lanes", nargs="+", choices=LANES, help="only these (default: all figures)"
    )
    parser.add_argument("--receive", choices=LANES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.receive:
        LANES[arguments.receive][1]()
        return
    found = probe()
    print(found.explanation)
    names = [name for name in arguments.lanes or LANES if found.usable or "ucx" not in name]
    num_rounds, num_frames = (7, 64) if arguments.quick else (31, 128)
    figures = report(measure(names, num_rounds, num_frames), num_frames)
    num_aborts, num_recorded = (300, 20) if arguments.quick else (10_000, 500)
    if not arguments.lanes:
        figures |= measure_safety(num_aborts=num_aborts, num_recorded=num_recorded)
    print(*describe(figures), sep="\n")
    if not arguments.lanes:
        print(*describe_safety(figures), sep="\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
