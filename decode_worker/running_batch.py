"""The running batch of a decode worker: one step after the other, as a pure state machine.

A request joins it when its hand-off is complete, with a sequence for each of its choices, and
leaves it with the last of them.
"""

from collections.abc import Collection, Sequence

from pagewire.decode_worker.drafting import Speculation
from pagewire.decode_worker.page_copies import PageCopies
from pagewire.decode_worker.page_owner import grow
from pagewire.decode_worker.request import DecodeRequest
from pagewire.decode_worker.running_step import RunningStep
from pagewire.decode_worker.scheduler import DecodeScheduler
from pagewire.decode_worker.sequence import DecodeSequence
from pagewire.engine.batch import Batch, PageCopy, StepResult, TokenLogprobs
from pagewire.engine.page_pool import PagePool
from pagewire.engine.prefix_cache import PrefixCache
from pagewire.kv_transfer.layout import KVLayout
from pagewire.proto import worker_pb2 as pb
from pagewire.proto.page_hash import PageHasher
from pagewire.worker.attempts import Attempts
from pagewire.worker.effects import Effect, Emit
from pagewire.worker.events import logprobs_message, step_failed
from pagewire.worker.identity import finish_reason, reply_route
from pagewire.worker.orphans import OrphanedPages


class RunningBatch:
    """The sequences that decode, and the steps of them that are out.

    Whoever calls it looks afterwards whether there is room for others.
    """

    def __init__(
        self,
        *,
        attempts: Attempts[DecodeRequest],
        pool: PagePool,
        cache: PrefixCache,
        layout: KVLayout,
        hasher: PageHasher | None,
        speculation: Speculation | None,
        max_batch_size: int,
    ) -> None:
        """Requests that end here end in `attempts`."""
        self._attempts = attempts
        self._pool = pool
        self._cache = cache
        self._layout = layout
        self._hasher = hasher
        self._speculation = speculation
        self._scheduler = DecodeScheduler(max_batch_size)
        self._copies = PageCopies(pool)
        self._steps: list[RunningStep] = []  # the one that runs now, and the one behind it
        self.num_generated_tokens = 0
        self.num_drafted_tokens = 0
        self.num_accepted_tokens = 0

    @property
    def num_running(self) -> int:
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Sequences that have no place in the next step."""
        return self._scheduler.num_waiting

    @property
    def is_stepping(self) -> bool:
        """Whether a step is out."""
        return bool(self._steps)

    # --- Who takes part ---------------------------------------------------------------------------

    def start(
        self, request: DecodeRequest, first_tokens: Sequence[int], now: float
    ) -> list[Effect]:
        """All of the prompt is here; `first_tokens` has token 0 of each choice.

        A choice that ends with it never runs, while others do.
        """
        request.queued_at = now
        effects: list[Effect] = []
        sequences, request.sequences = request.sequences, []
        for sequence in sequences:
            sequence.append(first_tokens[sequence.choice])
            reason = finish_reason(
                sequence.output[0], sequence.num_output_tokens, sequence.sampling
            )
            if reason:
                effects.append(_tokens(sequence, reason))
            else:
                request.sequences.append(sequence)
        self._fork(request)
        for sequence in request.sequences:
            self._cache_computed(sequence)
            self._scheduler.add(sequence)
        if not request.sequences:
            self._attempts.end(request)
        return effects

    def end(self, request: DecodeRequest) -> None:
        """Forget a request and release its pages; those that a step uses become quarantined."""
        self._attempts.end(request)
        for sequence in request.sequences:
            self._release(sequence)
        request.sequences = []

    def end_choice(self, request: DecodeRequest, sequence: DecodeSequence) -> None:
        """Forget one sequence of a request, whether it runs already or not. Others may be left."""
        request.sequences.remove(sequence)
        self._release(sequence)

    def _fork(self, request: DecodeRequest) -> None:
        """Share the prompt's pages among the sequences, copy-on-write.

        Nobody writes a full page again, so all have the same ones. The last page, when it is partly
        filled, is where each writes next: the first sequence takes it over, the others get a copy.
        """
        assert request.reservation is not None, "what is complete was reserved for"
        num_pages = self._layout.num_pages(request.num_prompt_tokens + request.max_tokens - 1)
        num_full = request.num_prompt_tokens // self._layout.page_size
        for index, sequence in enumerate(request.sequences):
            shared = request.pages[:num_full] if index else request.pages
            self._pool.retain(shared)
            sequence.reservation = self._pool.split(request.reservation, num_pages - len(shared))
            copied = request.pages[len(shared) :]
            own = self._pool.take(sequence.reservation, len(copied))
            self._copies.add(map(PageCopy, copied, own))
            sequence.pages = [*shared, *own]
        self._pool.release(request.pages)
        request.pages = []
        self._pool.cancel(request.reservation)  # the parts of choices that have ended

    def _release(self, sequence: DecodeSequence) -> None:
        """Let go of all that a sequence holds. Its full pages stay in the prefix cache."""
        self._scheduler.remove(sequence)
        for step in reversed(self._steps):
            if sequence in step.sequences:
                step.orphans.adopt(sequence.pages)
                break
        self._cache_computed(sequence)
        self._pool.release(sequence.pages)
        if sequence.reservation is not None:
            self._pool.cancel(sequence.reservation)

    def _cache_computed(self, sequence: DecodeSequence) -> None:
        """Let others share the full pages whose KV is here: all but that of the last token."""
        if self._hasher is None or not sequence.output:
            return
        token_ids = (*sequence.token_ids, *sequence.output[:-1])
        keys = self._hasher.keys(token_ids, sequence.cache_salt, sequence.page_keys)
        self._cache.register(keys, sequence.pages[: len(keys)])

    # --- Steps ------------------------------------------------------------------------------------

    def next_batch(self, now: float) -> Batch | None:
        """What the model runs next, once no step is out any more."""
        assert not self._steps, "a step is out already"
        sequences = self._scheduler.schedule()
        if not sequences:
            self._copies.drop()
            return None
        if self._speculation is not None:
            self._speculation.plan(
                [sequence.drafting for sequence in sequences],
                [sequence.num_tokens_left for sequence in sequences],
            )
        for sequence in sequences:
            self._grow(sequence, sequence.num_kv_tokens)
        self._begin_step(sequences, now)
        rows = tuple(sequence.next_row() for sequence in sequences)
        return Batch(rows=rows, copies=self._copies.begin())

    def next_batch_ahead(self, now: float) -> Batch | None:
        """The step behind the one that runs, of which no token is known yet; None if it must wait.

        A sequence may turn out to have ended already: what the step samples for it is dropped, and
        its pages stay in use until the step is over. Whose last token is being sampled has no part
        in it. How many tokens a step with drafts samples is not known, so nothing runs ahead of it.
        """
        (step,) = self._steps
        if self._speculation is not None or self._copies.are_waiting:
            return None
        row_of = {sequence: row for row, sequence in enumerate(step.sequences)}
        sequences = [
            sequence
            for sequence in self._scheduler.schedule()
            if sequence not in row_of or sequence.num_tokens_left > 1
        ]
        if not sequences:
            return None
        for sequence in sequences:
            self._grow(sequence, sequence.num_kv_tokens + (sequence in row_of))
        self._begin_step(sequences, now)
        return Batch(rows=tuple(each.next_row(row_of.get(each)) for each in sequences))

    def drop_batch_ahead(self) -> None:
        """The step behind the one that runs, or has failed, is void, and nothing of it runs."""
        step, ahead = self._steps
        step.orphans.take_over(ahead.orphans)
        self._steps = [step]

    def on_batch_done(self, result: StepResult, now: float) -> list[Effect]:
        """The older of the steps that are out has run."""
        step = self._steps.pop(0)
        effects: list[Effect] = []
        for index, (sequence, tokens) in enumerate(zip(step.sequences, result.tokens, strict=True)):
            request = self._request_of(sequence)
            if request is not None:
                times = step.first_times(request, now)
                logprobs = result.logprobs.get(index, ())
                effects.append(self._on_tokens(request, sequence, tokens, logprobs, times))
        self._copies.finish()
        step.orphans.free()
        return effects

    def on_batch_failed(self, rows: Collection[int]) -> list[Effect]:
        """The model raised because of `rows`: they fail, the rest of the batch runs again.

        A choice that fails fails its request. No other step is out.
        """
        (step,) = self._steps
        self._steps = []
        effects: list[Effect] = []
        for sequence in (step.sequences[index] for index in rows):
            request = self._request_of(sequence)
            if request is not None:
                self.end(request)
                effects.append(step_failed(request.route, "decode"))
        self._copies.retry()
        step.orphans.free()
        return effects

    def _begin_step(self, sequences: list[DecodeSequence], now: float) -> None:
        orphans = OrphanedPages(self._pool)
        self._steps.append(RunningStep(sequences=sequences, began=now, orphans=orphans))

    def _request_of(self, sequence: DecodeSequence) -> DecodeRequest | None:
        """None when the sequence has ended since its step began."""
        request = self._attempts.get(sequence.key)
        return request if request is not None and sequence in request.sequences else None

    def _on_tokens(
        self,
        request: DecodeRequest,
        sequence: DecodeSequence,
        sampled: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...],
        times: pb.TimeParts | None,
    ) -> Emit:
        """Take the tokens of a step up to the one that ends the sequence."""
        if sequence.drafting is not None:
            self.num_drafted_tokens += sequence.drafting.num_drafts
            self.num_accepted_tokens += len(sampled) - 1
            sequence.drafting.on_step(num_accepted=len(sampled) - 1)
        reason = pb.FINISH_REASON_UNSPECIFIED
        for token in sampled:
            sequence.append(token)
            self.num_generated_tokens += 1
            reason = finish_reason(token, sequence.num_output_tokens, sequence.sampling)
            if reason:
                break
        sequence.logprobs += map(logprobs_message, logprobs)
        event = _tokens(sequence, reason, times)
        if reason:
            self.end_choice(request, sequence)
            if not request.sequences:
                self._attempts.end(request)
        return event

    def _grow(self, sequence: DecodeSequence, num_tokens: int) -> None:
        grow(sequence, self._layout.num_pages(num_tokens), self._pool)


def _tokens(
    sequence: DecodeSequence,
    reason: "pb.FinishReason.ValueType",
    times: pb.TimeParts | None = None,
) -> Emit:
    """What the router has not been told of a sequence's output."""
    tokens = pb.Tokens(
        choice=sequence.choice,
        position=sequence.num_resumed + sequence.num_emitted,
        token_ids=sequence.output[sequence.num_emitted :],
        finish_reason=reason,
        times=times,
    )
    tokens.logprobs.extend(sequence.logprobs[: len(tokens.token_ids)])
    sequence.logprobs.clear()
    sequence.num_emitted = len(sequence.output)
    return Emit(event=pb.WorkerEvent(route=reply_route(sequence.route), tokens=tokens))
