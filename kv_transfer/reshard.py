"""Which rank of a prefill worker sends which KV heads to which rank of a decode worker. Pure.

Under tensor parallelism of degree t a model's KV heads are split evenly over t ranks, each with
pages of its own heads alone. Where t is larger than their number, several ranks hold each head.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pagewire.kv_transfer.layout import LayoutError


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTransfer:
    """Neighbouring KV heads that one rank of the sender sends to one rank of the receiver."""

    sender: int  # rank
    receiver: int  # rank
    sender_heads: range  # as the sender's pages count them
    receiver_heads: range  # as the receiver's pages count them


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSplit:
    """How the KV heads of a model lie on the ranks of a worker.

    Raises LayoutError when they cannot be split evenly, nor replicated evenly.
    """

    num_kv_heads: int  # of the model
    degree: int  # ranks of the worker

    def __post_init__(self) -> None:
        if self.degree < 1:
            raise LayoutError(f"tensor-parallel degree is {self.degree}; it must be at least 1")
        if self.num_kv_heads % self.degree and self.degree % self.num_kv_heads:
            raise LayoutError(
                f"tensor-parallel degree is {self.degree}, num_kv_heads {self.num_kv_heads}; "
                "choose a divisor or a multiple of num_kv_heads"
            )

    @property
    def num_shards(self) -> int:
        """Ranks with heads that no other has, not counting their replicas."""
        return min(self.degree, self.num_kv_heads)

    @property
    def num_replicas(self) -> int:
        """Neighbouring ranks that hold the same heads."""
        return self.degree // self.num_shards

    def heads(self, rank: int) -> range:
        """The heads of the model that `rank` holds."""
        return self.shard_heads(rank // self.num_replicas)

    def shard_heads(self, shard: int) -> range:
        """The heads of the model in the shard."""
        size = self.num_kv_heads // self.num_shards
        return range(shard * size, (shard + 1) * size)


def plan_heads(sender: HeadSplit, receiver: HeadSplit) -> Iterator[HeadTransfer]:
    """Every rank of the receiver gets each of its heads once, and from one rank.

    Replicas of a receiving rank are served by different replicas of the sending one, as far as
    there are any. Raises LayoutError when the two have different numbers of heads.
    """
    if sender.num_kv_heads != receiver.num_kv_heads:
        raise LayoutError(
            f"num_kv_heads is {sender.num_kv_heads} on the sender and {receiver.num_kv_heads} on "
            "the receiver; both must run the same model"
        )
    for rank in range(receiver.degree):
        wanted = receiver.heads(rank)
        replica = rank % receiver.num_replicas % sender.num_replicas
        for shard in range(sender.num_shards):
            held = sender.shard_heads(shard)
            first, end = max(wanted.start, held.start), min(wanted.stop, held.stop)
            if first < end:
                yield HeadTransfer(
                    sender=shard * sender.num_replicas + replica,
                    receiver=rank,
                    sender_heads=range(first - held.start, end - held.start),
                    receiver_heads=range(first - wanted.start, end - wanted.start),
                )
