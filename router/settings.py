"""What an operator can set about the HTTP side of a router.

Every limit on what a client may send, and every time-out of a connection, is a field here.
"""

from dataclasses import dataclass

from pagewire.proto.choices import MAX_CHOICES


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """Limits and names; see the comment of each field for its unit."""

    served_model: str  # the name that responses carry
    aliases: tuple[str, ...] = ("default",)  # other names that requests may use
    max_model_len: int  # tokens, prompt plus output

    max_body_bytes: int = 4 * 1024 * 1024
    max_stop_strings: int = 16
    max_stop_chars: int = 256  # of one stop string
    max_stop_token_ids: int = 128
    max_n: int = MAX_CHOICES  # choices of one request

    queue_timeout_s: float = 60.0  # a request still waiting then fails
    request_timeout_s: float = 600.0  # a request still running then fails
    body_timeout_s: float = 30.0  # to receive a request body
    send_timeout_s: float = 30.0  # a reader that takes nothing for so long is given up
    keep_alive_s: float = 10.0  # longest silence of an event stream

    off_loop_bytes: int = 8 * 1024  # bodies above this are tokenized beside the event loop

    def __post_init__(self) -> None:
        if not self.served_model:
            raise ValueError("served_model is empty; name the model as clients shall call it")
        for name in self._positive_fields():
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.max_n > MAX_CHOICES:
            raise ValueError(f"max_n is {self.max_n}; workers take at most {MAX_CHOICES} choices")

    @staticmethod
    def _positive_fields() -> tuple[str, ...]:
        return (
            "max_model_len",
            "max_body_bytes",
            "max_n",
            "queue_timeout_s",
            "request_timeout_s",
            "body_timeout_s",
            "send_timeout_s",
            "keep_alive_s",
        )

    def serves(self, model: str) -> bool:
        """Whether a request for `model` is for the model behind this router."""
        return model == self.served_model or model in self.aliases
