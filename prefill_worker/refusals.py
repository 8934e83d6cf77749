"""What the reasons for which a decode worker refuses a hand-off mean for its request."""

from pagewire.kv_transfer.messages import RefuseReason
from pagewire.proto import worker_pb2 as pb

# After these the same pages may be of use to another decode worker, or to this one.
PASSING = frozenset(
    {
        RefuseReason.UNKNOWN_TICKET,
        RefuseReason.INTEGRITY,
        RefuseReason.ABORTED,
        RefuseReason.FULL,
    }
)

# What the router is told: a code, and a sentence.
REFUSALS = {
    RefuseReason.UNKNOWN_TICKET: (  # it was expected there, so it was given up there
        pb.FAILURE_CODE_PEER_LOST,
        "the decode worker does not know the ticket of this hand-off",
    ),
    RefuseReason.LAYOUT: (
        pb.FAILURE_CODE_INVALID,
        "prefill and decode worker have KV caches of other layers, heads or head_dim, or the "
        "decode worker's staging slots are smaller than a frame",
    ),
    RefuseReason.PREFIX: (
        pb.FAILURE_CODE_INTEGRITY,
        "prefill and decode worker were given different prompts",
    ),
    RefuseReason.INTEGRITY: (
        pb.FAILURE_CODE_INTEGRITY,
        "the decode worker rejected a KV frame that failed its checks",
    ),
    RefuseReason.ABORTED: (
        pb.FAILURE_CODE_PEER_LOST,
        "the decode worker gave the request up",
    ),
    RefuseReason.FULL: (
        pb.FAILURE_CODE_FULL,
        "the decode worker has no room, and lets no more hand-offs wait for some",
    ),
}
