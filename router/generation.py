"""One request from its submission to its end, as text.

Whatever happens to the one who reads the text, leaving the block of a Generation either means
that the request had finished or cancels it on every worker.
"""

from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import NamedTuple

from pagewire.router.errors import ClientGone, internal
from pagewire.router.metrics import RequestMetrics
from pagewire.router.output import OutputText
from pagewire.router.request import Dispatcher, FinishReason, Request, RequestFailed
from pagewire.router.spans import FinishedRequest, RequestTrace
from pagewire.router.time_ledger import TimeSplit


class Piece(NamedTuple):
    """New text of one choice; it may be empty."""

    choice: int
    text: str


class Generation:
    """`with Generation(...) as generation: async for piece in generation.pieces(): ...`"""

    def __init__(
        self,
        *,
        dispatcher: Dispatcher,
        request: Request,
        outputs: Sequence[OutputText],
        metrics: RequestMetrics,
        trace: RequestTrace | None = None,
    ) -> None:
        """`outputs` are those of the choices, in order."""
        self._dispatcher = dispatcher
        self._request = request
        self._metrics = metrics
        self._trace = trace
        self.outputs = tuple(outputs)

    def __enter__(self) -> "Generation":
        """Submit the request. Raises RequestFailed when it cannot be taken."""
        self._metrics.submit()
        self._stream = self._dispatcher.submit(self._request)
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        outcome = self._outcome(error)
        if not self.is_finished:
            self._stream.cancel("the client is gone" if outcome == "abort" else "it failed")
        elif any(output.cut for output in self.outputs):
            self._stream.cancel("a stop string was found")
        self._metrics.finish(
            outcome,
            num_prompt_tokens=len(self._request.token_ids),
            num_cached_tokens=self.num_cached_tokens,
        )
        if self._trace is not None:
            self._trace.finish(self._finished(outcome, error))

    def _finished(self, outcome: str, error: BaseException | None) -> FinishedRequest:
        code = error.code if isinstance(error, RequestFailed) else internal().code
        return FinishedRequest(
            request_id=self._request.request_id,
            outcome=outcome,
            error_code=code if outcome == "error" else None,
            finish_reasons=tuple(
                output.finish_reason.value for output in self.outputs if output.finish_reason
            ),
            num_prompt_tokens=len(self._request.token_ids),
            num_cached_tokens=self.num_cached_tokens,
            num_output_tokens=self.num_tokens,
            split=self.time_split,
        )

    @property
    def is_finished(self) -> bool:
        """Whether every choice has its finish_reason."""
        return all(output.finish_reason is not None for output in self.outputs)

    @property
    def num_tokens(self) -> int:
        """Output tokens of all choices up to now."""
        return sum(output.num_tokens for output in self.outputs)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompt, which the choices share, that were in the prefix cache."""
        return max(output.num_cached_tokens for output in self.outputs)

    @property
    def time_split(self) -> TimeSplit:
        """Where its time went, once its block has been left."""
        assert self._metrics.split is not None, "a split needs the whole"
        return self._metrics.split

    async def pieces(self) -> AsyncIterator[Piece]:
        """The outputs in pieces, until every one of them has its finish_reason.

        Raises RequestFailed.
        """
        async for update in self._stream:
            self._metrics.update(update)
            output = self.outputs[update.choice]
            if output.finish_reason is not None:  # it was on its way when the choice was stopped
                continue
            if update.token_ids:
                self._metrics.tokens(len(update.token_ids), update.choice)
            piece = Piece(update.choice, output.push(update))
            if output.cut and not self.is_finished:
                self._stream.stop_choice(update.choice)
            yield piece
            if self.is_finished:
                return
        raise internal()  # a stream ends with a reason or by an exception

    def _outcome(self, error: BaseException | None) -> str:
        """Length if one choice was cut off: such an answer lacks something."""
        if self.is_finished:
            reasons = {output.finish_reason for output in self.outputs}
            return FinishReason.LENGTH if FinishReason.LENGTH in reasons else FinishReason.STOP
        gone = isinstance(error, ClientGone) or not isinstance(error, Exception)
        return "abort" if gone else "error"
