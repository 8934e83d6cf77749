"""What a prefill and a decode worker say to each other during a hand-off.

Every message is one bounded msgpack array in front of an optional raw payload. Decoding accepts
only the declared fields with their declared types and ranges: these bytes come from a socket.
"""

from collections.abc import Mapping
from dataclasses import Field, astuple, dataclass, field, fields
from enum import StrEnum
from typing import Any, ClassVar

import msgpack

from pagewire.kv_transfer.layout import FrameRange, KVLayout, LayoutError

MAX_HEADER_BYTES = 16 * 1024
MAX_BYTES = 512  # of one value
MAX_ITEMS = 32  # of one array
ID_BYTES = 16  # incarnations, tickets, digests
MAX_AGE_S = 1_000_000  # eleven days; no request waits for so long


class MessageError(ValueError):
    """Bytes that are no message of the hand-off protocol."""


class RefuseReason(StrEnum):
    """Why a decode worker does not take a hand-off."""

    UNKNOWN_TICKET = "unknown_ticket"
    LAYOUT = "layout"
    PREFIX = "prefix"
    ABORTED = "aborted"
    INTEGRITY = "integrity"
    FULL = "full"


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffId:
    """Names one attempt at one request between two processes; on every message."""

    request_id: str
    attempt: int
    sender: bytes  # incarnation
    receiver: bytes  # incarnation

    def reply(self) -> "HandoffId":
        """The same hand-off, seen from the other end."""
        return HandoffId(
            request_id=self.request_id,
            attempt=self.attempt,
            sender=self.receiver,
            receiver=self.sender,
        )


def _uint(limit: int = 2**32) -> Any:
    return field(metadata={"limit": limit})


def _bytes(length: int = ID_BYTES) -> Any:
    return field(metadata={"length": length})


def _uints(limit: int = 2**32) -> Any:
    return field(metadata={"items": {"limit": limit}})


def _opaques(max_length: int) -> Any:
    return field(default=(), metadata={"items": {"max_length": max_length}})


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """P → D: a hand-off begins. D reserves what it expects; Accepted is the answer."""

    code: ClassVar[int] = 1
    id: HandoffId
    ticket: bytes = _bytes()
    num_prompt_tokens: int = _uint()
    layout: KVLayout = field(metadata={"layout": True})  # of P's pages, and so of the frames
    prefix_hash: bytes = _bytes()  # of the prompt's token ids
    age_ms: int = _uint(1000 * MAX_AGE_S + 1)  # for how long the router has had the request


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """D → P: credit for one frame, into this slot of this generation."""

    code: ClassVar[int] = 2
    id: HandoffId
    slot: int = _uint()
    slot_generation: int = _uint(2**63)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """P → D: the header in front of one frame's payload."""

    code: ClassVar[int] = 3
    id: HandoffId
    seq: int = _uint()
    slot: int = _uint()
    slot_generation: int = _uint(2**63)
    first_page: int = _uint()  # in pages of P, as everywhere in this protocol
    num_pages: int = _uint()
    first_layer: int = _uint()
    num_layers: int = _uint()
    layout_digest: bytes = _bytes()
    prefix_hash: bytes = _bytes()
    checksum: int = _uint()

    @property
    def part(self) -> FrameRange:
        """The pages and layers of the sequence that the payload holds."""
        return FrameRange(
            first_page=self.first_page,
            num_pages=self.num_pages,
            first_layer=self.first_layer,
            num_layers=self.num_layers,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameAck:
    """D → P: the frame was verified and lies in pages."""

    code: ClassVar[int] = 4
    id: HandoffId
    seq: int = _uint()


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal:
    """P → D: every frame is out."""

    code: ClassVar[int] = 5
    id: HandoffId
    num_frames: int = _uint()
    digest: int = _uint()  # of the frames' checksums, in order of seq
    first_tokens: tuple[int, ...] = _uints()  # token 0 of each choice, sampled by P
    first_logprobs: tuple[bytes, ...] = _opaques(MAX_BYTES)  # of each, as the workers write them


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """D → P: the hand-off is complete; P may free its pages."""

    code: ClassVar[int] = 6
    id: HandoffId


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """D → P: the hand-off cannot be, or can no longer, be taken."""

    code: ClassVar[int] = 7
    id: HandoffId
    reason: RefuseReason = field(metadata={"enum": RefuseReason})


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """P → D: no frame of this hand-off will follow. D may reuse the slots that it granted."""

    code: ClassVar[int] = 8
    id: HandoffId


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """D → P: the pages are reserved; Grants follow. P leaves the hits out.

    Where page sizes differ, D counts the pages of P that it has whole.
    """

    code: ClassVar[int] = 9
    id: HandoffId
    num_hit_pages: int = _uint()  # leading pages of the prompt that D has already


@dataclass(frozen=True, slots=True, kw_only=True)
class Renew:
    """D → P: the hand-off is alive here, though nothing moves: D has no room, or P computes."""

    code: ClassVar[int] = 10
    id: HandoffId


Message = Open | Grant | Frame | FrameAck | Seal | Committed | Refused | Closed | Accepted | Renew
_TYPES: dict[int, type[Message]] = {
    kind.code: kind
    for kind in (Open, Grant, Frame, FrameAck, Seal, Committed, Refused, Closed, Accepted, Renew)
}
# Those behind the id, in order.
_FIELDS: dict[int, tuple[Field[Any], ...]] = {
    code: tuple(item for item in fields(kind) if item.name != "id") for code, kind in _TYPES.items()
}


def encode(message: Message) -> bytes:
    """The header bytes of `message`."""
    body: list[object] = [
        message.code,
        message.id.request_id,
        message.id.attempt,
        message.id.sender,
        message.id.receiver,
    ]
    values = (getattr(message, item.name) for item in _FIELDS[message.code])
    body.extend(astuple(value) if isinstance(value, KVLayout) else value for value in values)
    packed: bytes = msgpack.packb(body)
    return packed


def decode(header: bytes | memoryview) -> Message:
    """The message in `header`. Raises MessageError, which names the field at fault."""
    if len(header) > MAX_HEADER_BYTES:
        raise MessageError(f"header of {len(header)} bytes; the limit is {MAX_HEADER_BYTES}")
    try:
        body = msgpack.unpackb(
            header,
            use_list=True,
            max_str_len=256,
            max_bin_len=MAX_BYTES,
            max_array_len=MAX_ITEMS,
            max_map_len=0,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise MessageError("header is not bounded msgpack") from error
    if not isinstance(body, list) or len(body) < 5:
        raise MessageError("header is not an array of a code, an id and fields")
    code, request_id, attempt, sender, receiver, *values = body
    kind = _TYPES.get(code) if type(code) is int else None
    if kind is None:
        raise MessageError("code is unknown")
    if type(request_id) is not str or not 0 < len(request_id) <= 64:
        raise MessageError("request_id is not a string of 1 to 64 characters")
    _check_uint("attempt", attempt, 2**32)
    _check_bytes("sender", sender, ID_BYTES)
    _check_bytes("receiver", receiver, ID_BYTES)
    items = _FIELDS[code]
    if len(values) != len(items):
        raise MessageError(f"{kind.__name__} has {len(values)} fields instead of {len(items)}")
    arguments: dict[str, Any] = {}
    for item, value in zip(items, values, strict=True):
        arguments[item.name] = _checked(item.name, value, item.metadata)
    identity = HandoffId(request_id=request_id, attempt=attempt, sender=sender, receiver=receiver)
    return kind(id=identity, **arguments)


def _checked(name: str, value: Any, metadata: Mapping[str, Any]) -> Any:
    """The value of a field, if it is as `metadata` declares it."""
    if "items" in metadata:
        if type(value) is not list:
            raise MessageError(f"{name} is not an array")
        return tuple(_checked(name, item, metadata["items"]) for item in value)
    if "limit" in metadata:
        _check_uint(name, value, metadata["limit"])
    elif "length" in metadata:
        _check_bytes(name, value, metadata["length"])
    elif "max_length" in metadata:
        _check_opaque(name, value, metadata["max_length"])
    elif "layout" in metadata:
        return _read_layout(name, value)
    else:
        try:
            return metadata["enum"](value)
        except ValueError as error:
            raise MessageError(f"{name} is unknown") from error
    return value


def _check_uint(name: str, value: object, limit: int) -> None:
    if type(value) is not int or not 0 <= value < limit:
        raise MessageError(f"{name} is not an integer from 0 to {limit - 1}")


def _check_bytes(name: str, value: object, length: int) -> None:
    if type(value) is not bytes or len(value) != length:
        raise MessageError(f"{name} is not {length} bytes")


def _check_opaque(name: str, value: object, max_length: int) -> None:
    if type(value) is not bytes or len(value) > max_length:
        raise MessageError(f"{name} is not at most {max_length} bytes")


def _read_layout(name: str, value: object) -> KVLayout:
    items = fields(KVLayout)
    if type(value) is not list or [type(each) for each in value] != [item.type for item in items]:
        raise MessageError(f"{name} is not {', '.join(item.name for item in items)}")
    try:
        return KVLayout(**{item.name: each for item, each in zip(items, value, strict=True)})
    except LayoutError as error:
        raise MessageError(f"{name} cannot be: {error}") from error
