"""The output of one choice: from token updates to text, tokens counted and stop strings cut.

Pure: it neither waits nor cancels. What ends the output, a stop string included, is found token
by token, so that it does not depend on how tokens were grouped into updates.
"""

from pagewire.router.detokenizer import Detokenizer
from pagewire.router.logprobs import TokenLogprob
from pagewire.router.request import FinishReason, TokenUpdate
from pagewire.router.stop import StopChecker


class OutputText:
    """Accumulates one choice until `finish_reason` is set."""

    def __init__(
        self,
        *,
        detokenizer: Detokenizer,
        stop: StopChecker,
        stop_token_ids: frozenset[int] = frozenset(),
        min_tokens: int = 0,
    ) -> None:
        """`stop_token_ids` are those that the client asked for, reported as stop_reason.

        The text of the first `min_tokens` tokens is not searched for stop strings.
        """
        self._detokenizer = detokenizer
        self._stop = stop
        self._stop_token_ids = stop_token_ids
        self._min_tokens = min_tokens
        self._logprobs: list[TokenLogprob] = []
        self.num_tokens = 0
        self.num_cached_tokens = 0  # of the prompt
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None  # what the client asked to stop at

    @property
    def cut(self) -> bool:
        """Whether a stop string ended the text, of which the workers know nothing."""
        return self._stop.matched is not None

    def push(self, update: TokenUpdate) -> str:
        """The new text that is certain to belong to the output."""
        self.num_cached_tokens = max(self.num_cached_tokens, update.num_cached_tokens)
        text = ""
        for index, token_id in enumerate(update.token_ids):
            self.num_tokens += 1
            is_last = index == len(update.token_ids) - 1
            if is_last and update.finish_reason is FinishReason.STOP:
                # The stop token itself is not part of the text.
                self.stop_reason = token_id if token_id in self._stop_token_ids else None
                break
            if update.logprobs:
                values = update.logprobs[index]
                self._logprobs.append(TokenLogprob(token_id=token_id, values=values))
            piece = self._detokenizer.push(token_id)
            text += piece if self.num_tokens <= self._min_tokens else self._stop.push(piece)
            if self.cut:
                return text + self._end(FinishReason.STOP)
        if update.finish_reason is not None:
            text += self._stop.push(self._detokenizer.finish())
            text += self._end(update.finish_reason)
        return text

    def take_logprobs(self) -> list[TokenLogprob]:
        """Those of the tokens since the last call; none for a stop token, which is not output."""
        taken, self._logprobs = self._logprobs, []
        return taken

    def _end(self, reason: FinishReason) -> str:
        self.finish_reason = FinishReason.STOP if self.cut else reason
        if self.cut:
            self.stop_reason = self._stop.matched
            return ""
        return self._stop.finish()
