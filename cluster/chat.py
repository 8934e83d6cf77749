"""A conversation with a running server, written to the terminal as it streams."""

import sys

from pagewire.cluster.client import AnswerStats, Message, stream_chat


class Chat:
    """Keeps the messages so far. Answers go to standard output, their statistics to error."""

    def __init__(
        self,
        *,
        url: str,
        model: str,
        system: str | None,
        max_tokens: int | None,
        temperature: float,
    ) -> None:
        self._url = url
        self._model = model
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._messages: list[Message] = []
        if system is not None:
            self._messages.append({"role": "system", "content": system})

    def ask(self, text: str) -> None:
        """Write the answer to `text`. Raises RequestError; the conversation is then as before."""
        messages = [*self._messages, {"role": "user", "content": text}]
        answer = ""
        for item in stream_chat(
            self._url,
            messages,
            model=self._model,
            max_tokens=self._max_tokens,
            temperature=self._temperature,
        ):
            if isinstance(item, AnswerStats):
                sys.stdout.write("\n")
                sys.stdout.flush()
                print(_describe(item), file=sys.stderr)
            else:
                answer += item
                sys.stdout.write(item)
                sys.stdout.flush()
        self._messages = [*messages, {"role": "assistant", "content": answer}]


def _describe(stats: AnswerStats) -> str:
    return (
        f"[TTFT {stats.ttft_s * 1000:.0f} ms, {stats.num_tokens} tokens, "
        f"{stats.tokens_per_s:.1f} tokens/s]"
    )
