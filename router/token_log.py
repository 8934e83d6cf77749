"""What a client has been told of one choice: the authority on its tokens. Pure."""

from collections.abc import Sequence


class TokenGap(Exception):
    """Tokens arrived that do not follow those already delivered."""


class TokenConflict(Exception):
    """A token arrived for a position at which the client was told another one."""


class TokenLog:
    """Output tokens of one choice, by position.

    The prefill worker tells token 0 and the decode worker starts at position 0 too, so the same
    token may arrive twice, in either order; it is delivered once.
    """

    def __init__(self) -> None:
        self.token_ids: list[int] = []

    def append(self, position: int, token_ids: Sequence[int]) -> tuple[int, ...]:
        """The tokens among `token_ids`, which start at `position`, that are new.

        Raises TokenGap when tokens between the log and `position` are missing, TokenConflict when
        a repeated token differs from the delivered one. The log is unchanged then.
        """
        if position > len(self.token_ids):
            raise TokenGap(f"position {position} follows {len(self.token_ids)} tokens")
        num_known = min(len(self.token_ids) - position, len(token_ids))
        if self.token_ids[position : position + num_known] != list(token_ids[:num_known]):
            raise TokenConflict(f"tokens from position {position} differ from those delivered")
        new = tuple(token_ids[num_known:])
        self.token_ids += new
        return new
