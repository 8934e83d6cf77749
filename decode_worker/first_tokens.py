"""Token 0 of every choice, as the Seal of a hand-off brings it. Pure."""

from google.protobuf.message import DecodeError

from pagewire.decode_worker.request import DecodeRequest
from pagewire.kv_transfer.messages import Seal
from pagewire.proto import worker_pb2 as pb
from pagewire.worker.identity import finish_reason


def take_logprobs(request: DecodeRequest, seal: Seal, vocab_size: int) -> bool:
    """Whether a Seal can be one of this request; if so, its sequences have their logprobs.

    It has token 0 of every choice, and not all of them are final: these need no hand-off.
    """
    tokens = seal.first_tokens
    if len(tokens) != request.num_choices or max(tokens) >= vocab_size:
        return False
    sampling = request.sequences[0].sampling
    num_tokens = request.sequences[0].num_resumed + 1
    if all(finish_reason(token, num_tokens, sampling) for token in tokens):
        return False
    if sampling.num_logprobs is None:
        return True
    try:
        for sequence in request.sequences:
            values = pb.TokenLogprobs.FromString(seal.first_logprobs[sequence.choice])
            sequence.logprobs = [values]
    except (IndexError, DecodeError):
        return False
    return True
