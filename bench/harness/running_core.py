"""A decode worker's core whose sequences run: hand-offs by the book, without bytes."""

from pagewire.decode_worker.core import DecodeCore
from pagewire.decode_worker.slots import SlotPool
from pagewire.engine.page_pool import PagePool
from pagewire.kv_transfer.checksum import EMPTY_DIGEST, extend_digest
from pagewire.kv_transfer.layout import KVLayout
from pagewire.kv_transfer.messages import Frame, Grant, HandoffId, Open, Seal
from pagewire.proto import worker_pb2 as pb
from pagewire.worker.effects import Effect, Send
from pagewire.worker.identity import prefix_hash

ROUTER, PREFILL, DECODE, TICKET = (letter * 16 for letter in (b"r", b"p", b"d", b"t"))
CHECKSUM = 1


def running_core(
    layout: KVLayout,
    *,
    num_pages: int,
    vocab_size: int,
    prompt: list[int],
    sampling: list[pb.SamplingParams],
) -> DecodeCore:
    """One sequence for each of `sampling`, all with the same prompt and token 0."""
    slot_bytes = layout.num_pages(len(prompt)) * layout.page_bytes
    core = DecodeCore(
        incarnation=DECODE,
        layout=layout,
        pool=PagePool(num_pages),
        slots=SlotPool(1),
        vocab_size=vocab_size,
        max_model_len=layout.page_size * num_pages,
        max_batch_size=len(sampling),
        slot_bytes=slot_bytes,
    )
    for index, params in enumerate(sampling):
        _hand_off(core, f"request-{index}", prompt, params)
    return core


def _hand_off(
    core: DecodeCore, request_id: str, prompt: list[int], params: pb.SamplingParams
) -> None:
    layout = core.layout
    route = pb.Route(request_id=request_id, attempt=1, sender=ROUTER, receiver=DECODE)
    attach = pb.Attach(token_ids=prompt, sampling=params, ticket=TICKET, prefill=PREFILL)
    core.on_command(pb.WorkerCommand(route=route, attach=attach), 0.0)
    handoff = HandoffId(request_id=request_id, attempt=1, sender=PREFILL, receiver=DECODE)
    opening = Open(
        id=handoff,
        ticket=TICKET,
        num_prompt_tokens=len(prompt),
        layout=layout,
        prefix_hash=prefix_hash(prompt),
        age_ms=0,
    )
    grant = _grant(core.on_message(PREFILL, opening, 0.0))
    frame = Frame(
        id=handoff,
        seq=0,
        slot=grant.slot,
        slot_generation=grant.slot_generation,
        first_page=0,
        num_pages=layout.num_pages(len(prompt)),
        first_layer=0,
        num_layers=layout.num_layers,
        layout_digest=layout.digest(),
        prefix_hash=prefix_hash(prompt),
        checksum=CHECKSUM,
    )
    core.place(PREFILL, frame, frame.part.num_bytes(layout))
    core.on_message(PREFILL, frame, 0.0)
    core.on_scattered(frame, True, 0.0)
    digest = extend_digest(EMPTY_DIGEST, CHECKSUM)
    seal = Seal(
        id=handoff,
        num_frames=1,
        digest=digest,
        first_tokens=(prompt[0],),
        first_logprobs=(pb.TokenLogprobs(logprob=-1.0).SerializeToString(),),
    )
    core.on_message(PREFILL, seal, 0.0)


def _grant(effects: list[Effect]) -> Grant:
    (grant,) = (
        effect.message
        for effect in effects
        if isinstance(effect, Send) and isinstance(effect.message, Grant)
    )
    return grant
