"""From a router's Attach to a request that a decode worker can serve. Pure."""

from dataclasses import dataclass

from pagewire.decode_worker.drafting import Drafting, Speculation
from pagewire.decode_worker.receiver import Receiver
from pagewire.decode_worker.request import DecodeRequest
from pagewire.decode_worker.sequence import DecodeSequence
from pagewire.engine.sampling_params import SamplingParams
from pagewire.engine.token_history import TokenHistory
from pagewire.kv_transfer.layout import KVLayout
from pagewire.kv_transfer.messages import HandoffId
from pagewire.proto import worker_pb2 as pb
from pagewire.proto.page_hash import PageHasher
from pagewire.worker.identity import AttemptKey, CommandError, prefix_hash, read_work


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachReader:
    """What a decode worker must know of itself to read an Attach."""

    layout: KVLayout
    num_pages: int
    vocab_size: int
    max_model_len: int
    hasher: PageHasher | None  # None: nothing is cached
    speculation: Speculation | None  # None: nothing is drafted

    def read(self, command: pb.WorkerCommand) -> DecodeRequest:
        """The request of a command, with a sequence for each of its choices.

        Raises CommandError when this worker could not serve it, however idle.
        """
        body = command.attach
        token_ids, choices = read_work(
            body, vocab_size=self.vocab_size, max_model_len=self.max_model_len
        )
        request = DecodeRequest(
            key=AttemptKey.of(command.route),
            route=command.route,
            token_ids=token_ids,
            max_tokens=choices[0].max_tokens - body.num_output_tokens,
            num_choices=len(choices),
            receiver=self._receiver(command, token_ids),
            page_keys=self.hasher.keys(token_ids, body.cache_salt) if self.hasher else (),
        )
        request.sequences = [
            self._sequence(request, body, choice, sampling)
            for choice, sampling in enumerate(choices)
        ]
        num_pages = request.demand.num_pages(self.layout.page_size)
        if num_pages > self.num_pages:
            raise CommandError(
                f"prompt, max_tokens and n take {num_pages} pages of KV cache; this worker has "
                f"{self.num_pages}"
            )
        return request

    def _receiver(self, command: pb.WorkerCommand, token_ids: tuple[int, ...]) -> Receiver:
        return Receiver(
            id=HandoffId(
                request_id=command.route.request_id,
                attempt=command.route.attempt,
                sender=command.route.receiver,
                receiver=command.attach.prefill,
            ),
            ticket=command.attach.ticket,
            prefix_hash=prefix_hash(token_ids),
            num_prompt_tokens=len(token_ids),
            layout=self.layout,
        )

    def _sequence(
        self, request: DecodeRequest, body: pb.Attach, choice: int, sampling: SamplingParams
    ) -> DecodeSequence:
        token_ids = request.token_ids
        prompt_end = len(token_ids) - body.num_output_tokens
        return DecodeSequence(
            key=request.key,
            choice=choice,
            route=request.route,
            token_ids=token_ids,
            num_resumed=body.num_output_tokens,
            sampling=sampling,
            history=TokenHistory.for_params(
                sampling, token_ids[:prompt_end], token_ids[prompt_end:]
            ),
            cache_salt=body.cache_salt,
            page_keys=request.page_keys,
            priority=body.priority,
            drafting=self._drafting(token_ids, sampling),
        )

    def _drafting(self, token_ids: tuple[int, ...], sampling: SamplingParams) -> Drafting | None:
        return self.speculation.drafting(token_ids, sampling) if self.speculation else None
