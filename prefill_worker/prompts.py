"""From a router's Prefill or Repoint to what a prefill worker keeps of a prompt. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from pagewire.engine.token_history import TokenHistory
from pagewire.kv_transfer.layout import KVLayout
from pagewire.kv_transfer.messages import MAX_AGE_S, HandoffId
from pagewire.prefill_worker.sender import Sender
from pagewire.prefill_worker.sequence import PrefillSequence
from pagewire.proto import worker_pb2 as pb
from pagewire.proto.page_hash import PageHasher
from pagewire.worker.identity import AttemptKey, CommandError, prefix_hash, read_work


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptReader:
    """What a prefill worker must know of itself to read the commands of a router."""

    layout: KVLayout
    num_pages: int
    slot_bytes: int
    vocab_size: int
    max_model_len: int
    hasher: PageHasher | None  # None: nothing is cached

    def sequence(self, command: pb.WorkerCommand, now: float) -> PrefillSequence:
        """The prompt of a Prefill.

        Raises CommandError when this worker could not compute it, however idle.
        """
        body = command.prefill
        token_ids, (sampling, *siblings) = read_work(
            body, vocab_size=self.vocab_size, max_model_len=self.max_model_len
        )
        prompt_end = len(token_ids) - body.num_output_tokens
        if not 0 <= body.age_s <= MAX_AGE_S:
            raise CommandError(f"age_s is {body.age_s}; it must be 0 to {MAX_AGE_S}")
        num_pages = self.layout.num_pages(len(token_ids))
        if num_pages > self.num_pages:
            raise CommandError(
                f"the prompt takes {num_pages} pages of KV cache; this worker has {self.num_pages}"
            )
        return PrefillSequence(
            key=AttemptKey.of(command.route),
            route=command.route,
            token_ids=token_ids,
            num_resumed=body.num_output_tokens,
            sampling=sampling,
            siblings=tuple(siblings),
            history=TokenHistory.for_params(
                sampling, token_ids[:prompt_end], token_ids[prompt_end:]
            ),
            sender=self.sender(command.route, body, token_ids),
            page_keys=self.hasher.keys(token_ids, body.cache_salt) if self.hasher else (),
            addresses=addresses(body),
            arrived=now,
            submitted=now - body.age_s,
            deadline=now + body.seconds_left,
            priority=body.priority,
        )

    def sender(
        self, route: pb.Route, body: pb.Prefill | pb.Repoint, token_ids: Sequence[int]
    ) -> Sender:
        """The hand-off of a prompt to the decode worker of one attempt."""
        return Sender(
            id=HandoffId(
                request_id=route.request_id,
                attempt=route.attempt,
                sender=route.receiver,
                receiver=body.decode,
            ),
            ticket=body.ticket,
            prefix_hash=prefix_hash(token_ids),
            num_prompt_tokens=len(token_ids),
            layout=self.layout,
            slot_bytes=self.slot_bytes,
        )


def addresses(body: pb.Prefill | pb.Repoint) -> tuple[tuple[str, bytes], ...]:
    """Where the decode worker listens: transport kind and address."""
    return tuple((item.kind, item.address) for item in body.transports)
