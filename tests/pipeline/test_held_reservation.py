"""A prefill worker is lost in the middle of a hand-off: the next one finds its room held."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from pipeline import Pipeline, pipeline

from pagewire.decode_worker.admission import Admission
from pagewire.decode_worker.request import DecodeRequest
from pagewire.decode_worker.worker import DecodeWorker
from pagewire.kv_transfer.landing import Landing
from pagewire.kv_transfer.messages import Frame, decode
from pagewire.kv_transfer.tcp import TcpTransport
from pagewire.kv_transfer.transport import Handler, Transport
from pagewire.proto import worker_pb2 as pb

PROMPT = [index * 7 % 100 for index in range(300)]
SAMPLED = pb.SamplingParams(max_tokens=12, top_p=1.0, temperature=1.0, seed=5)


class Saboteur:
    """Ends the prefill worker that sends the first frame, once it is armed."""

    def __init__(self) -> None:
        self.victim: bytes | None = None  # its incarnation; nothing of it arrives any more
        self._armed: Pipeline | None = None

    def arm(self, cluster: Pipeline) -> None:
        self._armed = cluster

    def make_transports(self, incarnation: bytes, handler: Handler) -> Sequence[Transport]:
        watched = _WatchedHandler(self, handler)
        return [TcpTransport(incarnation=incarnation, handler=watched, host="127.0.0.1")]

    def on_frame(self, sender: bytes) -> None:
        if self._armed is None:
            return
        workers, self._armed = self._armed.workers, None
        self.victim = sender
        for item in workers.values():
            if item.worker.core.incarnation == sender:
                item.stop.set()


class _WatchedHandler:
    """Passes on what does not come from the saboteur's victim, and tells it of complete frames."""

    def __init__(self, saboteur: Saboteur, handler: Handler) -> None:
        self._saboteur = saboteur
        self._handler = handler

    def place(self, peer: bytes, header: bytes, length: int) -> Landing | None:
        if peer == self._saboteur.victim:
            return None
        return self._handler.place(peer, header, length)

    def deliver(self, peer: bytes, header: bytes) -> None:
        if peer == self._saboteur.victim:
            return
        self._handler.deliver(peer, header)
        if isinstance(self._handler, DecodeWorker) and isinstance(decode(header), Frame):
            self._saboteur.on_frame(peer)

    def lost(self, peer: bytes, reason: str) -> None:
        self._handler.lost(peer, reason)


def test_the_next_attempt_takes_the_reservation_over(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[bool] = []
    take_over = Admission.take_over

    def note(
        admission: Admission, request: DecodeRequest, predecessor: DecodeRequest, now: float
    ) -> None:
        taken.append(predecessor.reservation is not None)
        take_over(admission, request, predecessor, now)

    monkeypatch.setattr(Admission, "take_over", note)
    saboteur = Saboteur()

    async def run() -> None:
        async with pipeline(
            llama, saboteur.make_transports, prefill=2, max_batch_tokens=64, prefix_cache=False
        ) as cluster:
            expected = await cluster.generate(PROMPT, SAMPLED)
            saboteur.arm(cluster)
            assert await cluster.generate(PROMPT, SAMPLED) == expected
            assert taken == [True]
            survivors = [name for name, item in cluster.workers.items() if not item.stop.is_set()]
            assert len(survivors) == 2
            await cluster.until_idle(survivors)

    asyncio.run(run())
