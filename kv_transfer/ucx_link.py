"""One pair's way through UCX: a worker of its own and the endpoint to the peer's worker.

A worker per pair makes the end of a pair final: once its endpoint is closed and its worker no
longer runs, nothing that the peer sent can reach a buffer. It runs on the event loop, woken by its
file descriptor; an idle link costs nothing.

Known limit: ucxx 0.52 never forgets a send that it cancelled, and with it the worker. A link that
is closed in the middle of its own sends leaves about eight descriptors behind until the process
ends.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pagewire.kv_transfer.announced import fail
from pagewire.kv_transfer.device_memory import DeviceMemory
from pagewire.kv_transfer.transport import TransportError
from pagewire.kv_transfer.ucx_library import UcxLibrary

# Bounds how long one turn keeps the event loop, to less than a frame: the headers of those that
# follow are then answered while it moves, and the link seldom runs dry.
_STEPS_PER_TURN = 16
_STEPS_TO_END = 10
# UCX cannot tell when a peer makes room in shared memory, which it does every few microseconds
# while a payload moves: a turn of the event loop takes longer. So while transfers are under way UCX
# is asked so many times in a turn, in so many turns, and then this often, for a peer may be slow or
# stopped.
_NUM_ASKED = 64
_NUM_BUSY_TURNS = 100
_POLL_S = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class _Transfer:
    """One send or receive under way."""

    request: Any
    buffer: Any  # the request itself keeps no reference to the memory
    done: asyncio.Future[None]


class UcxLink:
    """Moves payloads to and from one peer. `done` futures end when UCX has let go of a buffer.

    UCX itself tells the memory of a GPU from the host's. Raises TransportError when UCX cannot make
    a worker.
    """

    def __init__(
        self, library: UcxLibrary, *, settle_device: Callable[[], None] | None = None
    ) -> None:
        """`settle_device` returns when this worker's GPU has made every copy that it was told of.

        UCX tells it of some, and cannot take them back.
        """
        self._library = library
        self._settle_device = settle_device
        self._loop = asyncio.get_running_loop()
        self._worker: Any = library.new_worker()
        self._descriptor: int = self._worker.epoll_file_descriptor
        self._endpoint: Any = None
        self._transfers: list[_Transfer] = []
        self._num_sends = 0
        self._num_receives = 0
        self._turn: asyncio.Handle | None = None
        self._poll: asyncio.TimerHandle | None = None
        self._num_idle_turns = 0  # since UCX last had something to do
        self.address = bytes(self._worker.address)

    async def connect(self, address: bytes) -> None:
        """Reach the worker of that address, whose end calls this too. Raises TransportError.

        One byte goes each way: UCX has then set everything up, and is known to work.
        """
        self._create_endpoint(address)
        byte_in, byte_out = memoryview(bytearray(1)), memoryview(bytearray(1))
        received, sent = self._loop.create_future(), self._loop.create_future()
        self.receive(byte_in, received)
        self.send(byte_out, sent)
        await asyncio.gather(received, sent)

    def send(self, payload: memoryview | DeviceMemory, done: asyncio.Future[None]) -> None:
        """Send `payload` to the receive of the same number at the peer."""
        array = self._library.array(payload)
        request = self._endpoint.tag_send(array, self._library.api.UCXXTag(self._num_sends))
        self._num_sends += 1
        self._follow(request, array, done)

    def receive(self, target: memoryview | DeviceMemory, done: asyncio.Future[None]) -> None:
        """Receive into `target` what the peer sends under the same number."""
        array = self._library.array(target)
        request = self._worker.tag_recv(array, self._library.api.UCXXTag(self._num_receives))
        self._num_receives += 1
        self._follow(request, array, done)

    def close(self) -> None:
        """End every transfer at once: no buffer of the host is touched when this returns."""
        if self._worker is None:
            return
        self._loop.remove_reader(self._descriptor)
        for handle in (self._turn, self._poll):
            if handle is not None:
                handle.cancel()
        self._close_endpoint()
        for transfer in self._transfers:
            fail(transfer.done, "the connection has ended")
        # Dropping a request cancels it; dropping the worker destroys it.
        self._transfers.clear()
        self._worker = None

    async def wait_closed(self) -> None:
        """Return when no buffer of a GPU is touched any more, either. The event loop goes on."""
        if self._settle_device is not None:
            await asyncio.to_thread(self._settle_device)

    def _create_endpoint(self, address: bytes) -> None:
        api = self._library.api
        try:
            self._endpoint = api.UCXEndpoint.create_from_worker_address(
                self._worker, api.UCXAddress.create_from_buffer(address), True
            )
        except self._library.error as error:
            raise TransportError(
                f"UCX cannot reach the peer: {error}; check that both machines have a network "
                "that UCX can use, or use tcp"
            ) from error
        self._loop.add_reader(self._descriptor, self._run_turn)
        self._run_soon()

    def _close_endpoint(self) -> None:
        """Close by force: what had begun to arrive then ends with an error, at once."""
        if self._endpoint is None:
            return
        self._endpoint.close_blocking()
        self._endpoint = None
        for _ in range(_STEPS_TO_END):
            self._worker.progress()

    def _follow(self, request: Any, array: Any, done: asyncio.Future[None]) -> None:
        self._transfers.append(_Transfer(request=request, buffer=array, done=done))
        self._run_soon()

    def _run_soon(self) -> None:
        if self._turn is None:
            self._turn = self._loop.call_soon(self._run_turn)

    def _run_turn(self) -> None:
        """Let UCX work, finish what is complete, and go to sleep when nothing is left to do."""
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        if self._advance():
            self._num_idle_turns = 0
            self._finish_transfers()
            self._run_soon()
            return
        self._num_idle_turns += 1
        self._finish_transfers()
        asleep = self._worker.arm()
        if not asleep and self._num_idle_turns < _NUM_BUSY_TURNS:
            self._run_soon()
        elif self._transfers or not asleep:
            self._rest(asleep=asleep)

    def _rest(self, *, asleep: bool) -> None:
        """Let the event loop go on without this link for a while."""
        if not asleep:  # its descriptor stays readable, and would call again without end
            self._loop.remove_reader(self._descriptor)
        if self._poll is None:
            self._poll = self._loop.call_later(_POLL_S, self._on_poll)

    def _on_poll(self) -> None:
        self._poll = None
        self._loop.add_reader(self._descriptor, self._run_turn)
        self._run_turn()

    def _advance(self) -> bool:
        """Whether UCX had something to do."""
        for num_steps in range(_STEPS_PER_TURN):
            if not self._step():
                self._worker.progress()  # also ends what failed
                return num_steps > 0
        return True

    def _step(self) -> bool:
        """Whether UCX had something to do, be it a moment later."""
        num_asked = _NUM_ASKED if self._transfers else 1
        return any(self._worker.progress_once() for _ in range(num_asked))

    def _finish_transfers(self) -> None:
        under_way = []
        for transfer in self._transfers:
            if transfer.request.completed:
                self._settle(transfer)
            else:
                under_way.append(transfer)
        self._transfers = under_way

    def _settle(self, transfer: _Transfer) -> None:
        try:
            transfer.request.check_error()
        except self._library.error as error:
            fail(transfer.done, f"UCX lost the peer: {error}")
            return
        if not transfer.done.done():
            transfer.done.set_result(None)
