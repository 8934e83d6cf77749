"""Turns the tokens of one stream into text as they come.

Tokens are bytes, not characters, so a character that is not complete yet waits for the rest of
its bytes. The cost of a token does not depend on what came before it.
"""

import codecs
from collections.abc import Callable


class Detokenizer:
    """The text of one stream; never half a character."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        """`token_bytes` gives the bytes of a token id, none for one that has no text."""
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes."""
        return self._decoder.decode(self._token_bytes(token_id))

    def finish(self) -> str:
        """A replacement character if the stream ended inside a character."""
        return self._decoder.decode(b"", final=True)
