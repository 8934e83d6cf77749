"""How a worker names the work it was given, and checks that a command is meant for it."""

import hashlib
from array import array
from collections.abc import Iterable
from typing import NamedTuple

from pagewire.engine.sampling_params import SamplingParams
from pagewire.kv_transfer.messages import ID_BYTES, HandoffId
from pagewire.proto import worker_pb2 as pb
from pagewire.proto.choices import MAX_CHOICES


class CommandError(ValueError):
    """A command that this worker cannot carry out; the text is fit for a user."""


class AttemptKey(NamedTuple):
    """One attempt at one request, inside a worker."""

    request_id: str
    attempt: int

    @classmethod
    def of(cls, route: "pb.Route | HandoffId") -> "AttemptKey":
        return cls(route.request_id, route.attempt)


def prefix_hash(token_ids: Iterable[int]) -> bytes:
    """16 bytes that bind the frames of a hand-off to the prompt they were computed from."""
    return hashlib.blake2b(array("I", token_ids).tobytes(), digest_size=ID_BYTES).digest()


def reply_route(route: pb.Route) -> pb.Route:
    """The route of an answer to a message with `route`."""
    return pb.Route(
        request_id=route.request_id,
        attempt=route.attempt,
        sender=route.receiver,
        receiver=route.sender,
    )


def read_work(
    body: pb.Prefill | pb.Attach, *, vocab_size: int, max_model_len: int
) -> tuple[tuple[int, ...], tuple[SamplingParams, ...]]:
    """Token ids of a command, and how each choice is sampled; checked again where they are used.

    The router has validated the request, but a limit that is checked on one path only is the
    classic way to bring an engine down. Raises CommandError.
    """
    token_ids = tuple(body.token_ids)
    if not token_ids:
        raise CommandError("token_ids is empty; a prompt has at least one token")
    if max(token_ids) >= vocab_size:
        raise CommandError(f"token_ids holds an id outside the vocabulary of {vocab_size}")
    for name in ("stop_token_ids", "logit_bias"):
        if any(token >= vocab_size for token in getattr(body.sampling, name)):
            raise CommandError(f"{name} holds an id outside the vocabulary of {vocab_size}")
    n = body.n if body.HasField("n") else 1
    if not 1 <= n <= MAX_CHOICES:
        raise CommandError(f"n is {n}; it must be 1 to {MAX_CHOICES}")
    if len(body.ticket) != ID_BYTES:
        raise CommandError(f"ticket is not {ID_BYTES} bytes")
    try:
        sampling = _sampling_params(body.sampling)
    except ValueError as error:
        raise CommandError(str(error)) from error
    num_resumed = body.num_output_tokens
    if num_resumed >= min(len(token_ids), sampling.max_tokens) or (num_resumed and n > 1):
        raise CommandError(
            f"num_output_tokens is {num_resumed}; it must be less than max_tokens and token_ids, "
            "and 0 with several choices"
        )
    if len(token_ids) - num_resumed + sampling.max_tokens > max_model_len:
        raise CommandError(
            f"{len(token_ids)} prompt tokens and max_tokens {sampling.max_tokens} exceed the "
            f"model's {max_model_len}"
        )
    return token_ids, tuple(sampling.for_choice(choice) for choice in range(n))


def _sampling_params(message: pb.SamplingParams) -> SamplingParams:
    """Raises ValueError, which names the field."""
    has_repetition = message.HasField("repetition_penalty")
    return SamplingParams(
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty if has_repetition else 1.0,
        logit_bias=tuple(sorted(message.logit_bias.items())),
        seed=message.seed,
        stop_token_ids=frozenset(message.stop_token_ids),
        num_logprobs=message.num_logprobs if message.HasField("num_logprobs") else None,
    )


def finish_reason(
    token_id: int, num_output_tokens: int, sampling: SamplingParams
) -> "pb.FinishReason.ValueType":
    """Whether a sequence ends with `token_id`, its `num_output_tokens`-th output token."""
    if token_id in sampling.stop_token_ids:
        return pb.FINISH_REASON_STOP
    if num_output_tokens >= sampling.max_tokens:
        return pb.FINISH_REASON_LENGTH
    return pb.FINISH_REASON_UNSPECIFIED
