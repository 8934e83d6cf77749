"""One request from its submission to its end, as text.

Whatever happens to the one who reads the text, leaving the block of a Generation either means
that the request had finished or cancels it on every worker.
"""

from collections.abc import AsyncIterator
from types import TracebackType

from pagewire.router.errors import ClientGone, internal
from pagewire.router.metrics import RequestMetrics
from pagewire.router.output import OutputText
from pagewire.router.request import Dispatcher, Request


class Generation:
    """`with Generation(...) as generation: async for text in generation.texts(): ...`"""

    def __init__(
        self,
        *,
        dispatcher: Dispatcher,
        request: Request,
        output: OutputText,
        metrics: RequestMetrics,
    ) -> None:
        self._dispatcher = dispatcher
        self._request = request
        self._metrics = metrics
        self.output = output

    def __enter__(self) -> "Generation":
        """Submit the request. Raises RequestFailed when it cannot be taken."""
        self._stream = self._dispatcher.submit(self._request)
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        outcome = self._outcome(error)
        if self.output.cut:
            self._stream.cancel("a stop string was found")
        elif self.output.finish_reason is None:
            self._stream.cancel("the client is gone" if outcome == "abort" else "it failed")
        self._metrics.finish(
            outcome,
            num_prompt_tokens=len(self._request.token_ids),
            num_cached_tokens=self.output.num_cached_tokens,
        )

    async def texts(self) -> AsyncIterator[str]:
        """The output in pieces, empty ones among them, until its finish_reason is set.

        Raises RequestFailed.
        """
        async for update in self._stream:
            if update.token_ids:
                self._metrics.tokens(len(update.token_ids))
            yield self.output.push(update)
            if self.output.finish_reason is not None:
                return
        raise internal()  # a stream ends with a reason or by an exception

    def _outcome(self, error: BaseException | None) -> str:
        if self.output.finish_reason is not None:
            return self.output.finish_reason
        gone = isinstance(error, ClientGone) or not isinstance(error, Exception)
        return "abort" if gone else "error"
