"""Workers, requests and events as the router's cores see them."""

from collections.abc import Sequence

from pagewire.proto import worker_pb2 as pb
from pagewire.router.request import Request

ROUTER = b"r" * 16
PAGE_SIZE = 16


def registration(
    name: str,
    role: "pb.Role.ValueType",
    *,
    incarnation: bytes | None = None,
    num_pages: int = 10,
) -> pb.RegisterRequest:
    """A worker; unless given, its incarnation follows from its name."""
    return pb.RegisterRequest(
        name=name,
        role=role,
        incarnation=incarnation or name.encode().ljust(16, b"-"),
        model="model",
        max_model_len=4096,
        num_pages=num_pages,
        layout=pb.KVLayout(
            page_size=PAGE_SIZE, num_layers=2, num_kv_heads=1, head_dim=1, dtype="float32"
        ),
        transports=[pb.TransportAddress(kind="tcp", address=b"there")],
    )


def make_request(
    request_id: str = "request",
    *,
    num_prompt_tokens: int = 20,
    max_tokens: int = 4,
    queue_deadline: float = 30.0,
    deadline: float = 60.0,
    priority: int = 0,
    n: int = 1,
) -> Request:
    return Request(
        request_id=request_id,
        token_ids=tuple(range(num_prompt_tokens)),
        sampling=pb.SamplingParams(max_tokens=max_tokens, top_p=1.0),
        queue_deadline=queue_deadline,
        deadline=deadline,
        priority=priority,
        n=n,
    )


def _route(sender: bytes, request_id: str, attempt: int) -> pb.Route:
    return pb.Route(request_id=request_id, attempt=attempt, sender=sender, receiver=ROUTER)


def attached(sender: bytes, request_id: str = "request", attempt: int = 1) -> pb.WorkerEvent:
    return pb.WorkerEvent(route=_route(sender, request_id, attempt), attached=pb.Attached())


def first_token(
    sender: bytes,
    token_id: int = 5,
    finish: "pb.FinishReason.ValueType" = pb.FINISH_REASON_UNSPECIFIED,
    request_id: str = "request",
    attempt: int = 1,
    choice: int = 0,
) -> pb.WorkerEvent:
    body = pb.FirstToken(token_id=token_id, finish_reason=finish, choice=choice)
    return pb.WorkerEvent(route=_route(sender, request_id, attempt), first_token=body)


def sealed(sender: bytes, request_id: str = "request", attempt: int = 1) -> pb.WorkerEvent:
    return pb.WorkerEvent(route=_route(sender, request_id, attempt), sealed=pb.Sealed())


def ready(sender: bytes, request_id: str = "request", attempt: int = 1) -> pb.WorkerEvent:
    return pb.WorkerEvent(route=_route(sender, request_id, attempt), ready=pb.Ready())


def tokens(
    sender: bytes,
    token_ids: Sequence[int] = (5, 6),
    position: int = 0,
    finish: "pb.FinishReason.ValueType" = pb.FINISH_REASON_UNSPECIFIED,
    request_id: str = "request",
    attempt: int = 1,
    choice: int = 0,
) -> pb.WorkerEvent:
    body = pb.Tokens(position=position, token_ids=token_ids, finish_reason=finish, choice=choice)
    return pb.WorkerEvent(route=_route(sender, request_id, attempt), tokens=body)


def failed(
    sender: bytes,
    code: "pb.FailureCode.ValueType" = pb.FAILURE_CODE_INTERNAL,
    request_id: str = "request",
    attempt: int = 1,
) -> pb.WorkerEvent:
    body = pb.Failed(code=code, message="it broke")
    return pb.WorkerEvent(route=_route(sender, request_id, attempt), failed=body)


def parked_event(
    sender: bytes,
    code: "pb.FailureCode.ValueType" = pb.FAILURE_CODE_PEER_LOST,
    request_id: str = "request",
    attempt: int = 1,
) -> pb.WorkerEvent:
    body = pb.Parked(code=code, message="the hand-off broke")
    return pb.WorkerEvent(route=_route(sender, request_id, attempt), parked=body)


def heartbeat(sender: bytes, state: pb.WorkerState | None = None) -> pb.WorkerEvent:
    return pb.WorkerEvent(
        route=pb.Route(sender=sender, receiver=ROUTER), heartbeat=state or pb.WorkerState()
    )
