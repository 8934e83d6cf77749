"""Events that both kinds of worker send to routers."""

from pagewire.engine.batch import TokenLogprobs
from pagewire.engine.page_pool import PagePool
from pagewire.proto import worker_pb2 as pb
from pagewire.worker.effects import Emit
from pagewire.worker.identity import reply_route


def failed(
    route: pb.Route,
    message: str,
    code: "pb.FailureCode.ValueType" = pb.FAILURE_CODE_INVALID,
) -> Emit:
    """The end of the attempt that came with `route`, for a reason that its client may read."""
    return Emit(
        event=pb.WorkerEvent(route=reply_route(route), failed=pb.Failed(code=code, message=message))
    )


def step_failed(route: pb.Route, kind: str) -> Emit:
    """The end of an attempt because of which a step has raised; `kind`: prefill or decode."""
    text = f"the {kind} step failed; the worker's log has the cause"
    return failed(route, text, pb.FAILURE_CODE_INTERNAL)


def page_counts(pool: PagePool) -> pb.PageCounts:
    """Pages by state."""
    counts = pool.counts()
    return pb.PageCounts(
        free=counts.free,
        cached=counts.cached,
        owned=counts.owned,
        pinned=counts.pinned,
        quarantined=counts.quarantined,
        total=counts.total,
    )


def logprobs_message(values: TokenLogprobs) -> pb.TokenLogprobs:
    """One token's, as routers get them."""
    return pb.TokenLogprobs(
        logprob=values.logprob,
        top_token_ids=[token for token, _ in values.top],
        top_logprobs=[logprob for _, logprob in values.top],
    )
