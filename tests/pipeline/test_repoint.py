"""A decode worker is lost in the middle of a hand-off: another gets the pages that are computed."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from pipeline import Pipeline, pipeline

from pagewire.decode_worker.worker import DecodeWorker
from pagewire.kv_transfer.landing import Landing
from pagewire.kv_transfer.messages import Message, Open, Seal, decode
from pagewire.kv_transfer.tcp import TcpTransport
from pagewire.kv_transfer.transport import Handler, Transport
from pagewire.proto import worker_pb2 as pb
from pagewire.worker.config import Role

PROMPT = [index * 7 % 100 for index in range(300)]
SAMPLED = pb.SamplingParams(
    max_tokens=12, top_p=1.0, temperature=1.0, seed=5, presence_penalty=0.5, num_logprobs=1
)


class Saboteur:
    """Ends the first decode worker that a message of one kind reaches, once it is armed."""

    def __init__(self, step: type[Message]) -> None:
        self._step = step
        self._armed: Pipeline | None = None

    def arm(self, cluster: Pipeline) -> None:
        self._armed = cluster

    def make_transports(self, incarnation: bytes, handler: Handler) -> Sequence[Transport]:
        sabotaged = _SabotagedHandler(self, handler)
        return [TcpTransport(incarnation=incarnation, handler=sabotaged, host="127.0.0.1")]

    def strikes(self, handler: Handler, message: Message) -> bool:
        """Whether the worker of `handler` ends here; it is then told to."""
        if self._armed is None or not isinstance(message, self._step):
            return False
        cluster, self._armed = self._armed, None
        (victim,) = [item for item in cluster.workers.values() if item.worker is handler]
        victim.stop.set()
        return True


class _SabotagedHandler:
    """Passes everything on until its worker is struck, and nothing from then on."""

    def __init__(self, saboteur: Saboteur, handler: Handler) -> None:
        self._saboteur = saboteur
        self._handler = handler
        self._is_struck = False

    def place(self, peer: bytes, header: bytes, length: int) -> Landing | None:
        return None if self._is_struck else self._handler.place(peer, header, length)

    def deliver(self, peer: bytes, header: bytes) -> None:
        if isinstance(self._handler, DecodeWorker) and not self._is_struck:
            self._is_struck = self._saboteur.strikes(self._handler, decode(header))
        if not self._is_struck:
            self._handler.deliver(peer, header)

    def lost(self, peer: bytes, reason: str) -> None:
        self._handler.lost(peer, reason)


@pytest.mark.parametrize(
    ("step", "n", "options"),
    [
        (Open, 1, {}),
        (Seal, 1, {}),
        (Seal, 2, {}),
        (Seal, 1, {"max_draft_tokens": 3}),
        (Seal, 1, {"by_role": {Role.DECODE: {"page_size": 32}}}),
    ],
    ids=["at Open", "at Seal", "two choices", "drafts", "unequal pages"],
)
def test_the_tokens_are_those_of_a_run_without_faults(
    step: type[Message], n: int, options: Mapping[str, Any], llama: Path
) -> None:
    saboteur = Saboteur(step)

    async def run() -> None:
        async with pipeline(
            llama, saboteur.make_transports, decode=2, prefix_cache=False, **options
        ) as cluster:
            prefill = cluster.workers["prefill-0"].worker
            expected = await cluster.generate_choices(PROMPT, SAMPLED, n)
            assert prefill.state().prompt_tokens == len(PROMPT)
            saboteur.arm(cluster)
            assert await cluster.generate_choices(PROMPT, SAMPLED, n) == expected
            assert prefill.state().prompt_tokens == 2 * len(PROMPT)
            assert cluster.control.counts() == dict.fromkeys(cluster.control.counts(), 0)
            (survivor,) = [
                name
                for name, item in cluster.workers.items()
                if name != "prefill-0" and not item.stop.is_set()
            ]
            await cluster.until_idle(["prefill-0", survivor])

    asyncio.run(run())
