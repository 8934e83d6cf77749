"""What a prefill worker tells the router of one prompt."""

from pagewire.prefill_worker.sequence import PrefillSequence
from pagewire.proto import worker_pb2 as pb
from pagewire.worker.effects import Emit
from pagewire.worker.identity import finish_reason, reply_route


def first_tokens(sequence: PrefillSequence, times: pb.TimeParts | None = None) -> list[Emit]:
    """Token 0 of each choice; `times` are those of its computation, unless they are known."""
    logprobs = sequence.first_logprobs
    bodies = [
        pb.FirstToken(
            choice=choice,
            token_id=token,
            position=sequence.num_resumed,
            finish_reason=finish_reason(token, sequence.num_resumed + 1, sequence.sampling),
            logprobs=logprobs[choice] if logprobs else None,
            cached_tokens=sequence.num_cached,
            times=None if choice else times,
        )
        for choice, token in enumerate(sequence.first_tokens)
    ]
    route = reply_route(sequence.route)
    return [Emit(event=pb.WorkerEvent(route=route, first_token=body)) for body in bodies]


def sealed(sequence: PrefillSequence) -> Emit:
    """Every frame is out, and where the time since the last chunk went."""
    exposed = sequence.sender.exposed
    times = pb.TimeParts(
        grant_wait_s=exposed.grant_wait_s, gather_s=exposed.gather_s, wire_s=exposed.wire_s
    )
    route = reply_route(sequence.route)
    return Emit(event=pb.WorkerEvent(route=route, sealed=pb.Sealed(times=times)))


def parked(sequence: PrefillSequence, code: "pb.FailureCode.ValueType", text: str) -> Emit:
    """The hand-off has failed, and the prompt waits for another one."""
    body = pb.Parked(code=code, message=text)
    return Emit(event=pb.WorkerEvent(route=reply_route(sequence.route), parked=body))
