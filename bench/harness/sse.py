"""What one line of an OpenAI completion stream says. Pure."""

import json
from dataclasses import dataclass

from harness.streams import StreamError


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamEvent:
    """One event: some text, the usage, both, or neither."""

    has_text: bool
    num_tokens: int | None  # of the whole output, in the event that carries the usage


def parse_line(line: str) -> StreamEvent | None:
    """The event of a `data:` line; None for a comment, an empty line and the end mark.

    Raises StreamError when the event reports a failure or is not what the API promises.
    """
    name, _, data = line.partition(":")
    data = data.strip()
    if name != "data" or data == "[DONE]":
        return None
    try:
        event = json.loads(data)
        if "error" in event:
            raise StreamError(f"the stream ended with an error: {event['error']}")
        usage = event.get("usage")
        return StreamEvent(
            has_text=any(choice["text"] for choice in event["choices"]),
            num_tokens=usage["completion_tokens"] if usage else None,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise StreamError(f"no event of the completions API: {line[:200]}") from error
