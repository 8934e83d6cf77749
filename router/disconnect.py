"""Notices at once when a client closes its connection.

Starlette looks for a disconnect only between two writes, and a middleware can hide it; here the
ASGI receive channel is watched beside the work.
"""

import asyncio
from types import TracebackType

from starlette.types import Receive


class DisconnectScope:
    """`async with DisconnectScope(receive):` ends its block when the client is gone.

    The block is cancelled where it waits, as by `asyncio.timeout`, but leaves no exception:
    there is nobody to tell. The request body must have been read before.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._client_gone = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None, "a coroutine always runs in a task"
        self._task = task
        self._outer_cancellations = task.cancelling()
        self._watcher = asyncio.create_task(self._watch())

    async def __aexit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        # No await from here on: the watcher must not cancel what comes after the block.
        self._watcher.cancel()
        if not self._client_gone:
            return False
        only_ours = self._task.uncancel() <= self._outer_cancellations
        return only_ours and error_type is asyncio.CancelledError

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._client_gone = True
        self._task.cancel()
