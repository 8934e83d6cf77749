"""The workers that a router knows, and what it has promised of their capacity. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from pagewire.proto import worker_pb2 as pb
from pagewire.router.cached_pages import CachedPages, PageHashes

HEARTBEAT_S = 1.0
MISSED_HEARTBEATS = 3


class RegistrationRefused(Exception):
    """A worker that cannot work with those already registered; the text names the field."""


@dataclass(slots=True, kw_only=True, eq=False)
class Member:
    """One registered worker process."""

    info: pb.RegisterRequest
    last_seen: float  # seconds on the router's clock
    state: pb.WorkerState = field(default_factory=pb.WorkerState)  # of the last heartbeat
    cached_pages: CachedPages = field(default_factory=CachedPages)
    num_projected_pages: int = 0  # promised to requests that were sent to this worker
    num_projected_tokens: int = 0  # prompt tokens to compute before token 0 is known

    @property
    def incarnation(self) -> bytes:
        return self.info.incarnation

    @property
    def page_size(self) -> int:
        """Tokens in one page."""
        return self.info.layout.page_size

    def num_pages(self, num_tokens: int) -> int:
        """Pages of this worker that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def num_cached_tokens(self, page_hashes: PageHashes) -> int:
        """Leading tokens of a prompt whose KV this worker has, as far as the router knows."""
        page_size = self.info.layout.page_size
        return self.cached_pages.num_leading(page_hashes.get(page_size, ())) * page_size

    @property
    def may_start_prompts(self) -> bool:
        """False while too many pages of a prefill worker wait for decode workers."""
        return self.state.parked_pages <= self.info.max_parked_pages

    @property
    def num_unpromised_pages(self) -> int:
        return self.info.num_pages - self.num_projected_pages


class Members:
    """Registered workers by incarnation."""

    def __init__(self) -> None:
        self._members: dict[bytes, Member] = {}

    def __iter__(self) -> Iterator[Member]:
        return iter(list(self._members.values()))

    def get(self, incarnation: bytes) -> Member | None:
        return self._members.get(incarnation)

    def of_role(self, role: "pb.Role.ValueType") -> list[Member]:
        return [member for member in self._members.values() if member.info.role == role]

    def check(self, info: pb.RegisterRequest) -> None:
        """Raise RegistrationRefused unless a worker of this kind can be taken in."""
        if len(info.incarnation) != 16:
            raise RegistrationRefused("incarnation is not 16 bytes")
        if info.role not in (pb.ROLE_PREFILL, pb.ROLE_DECODE):
            raise RegistrationRefused("role is neither prefill nor decode")
        if min(info.num_pages, info.layout.page_size, info.max_model_len) < 1:
            raise RegistrationRefused(
                "num_pages, layout.page_size and max_model_len must be at least 1"
            )
        for member in self._members.values():
            if member.info.name == info.name:
                continue  # a new incarnation takes the place of the old one
            _require_equal("model", info.model, member.info.model, member)
            if info.model_digest != member.info.model_digest:
                raise RegistrationRefused(
                    f"model {info.model} has other weights than that of {member.info.name}; start "
                    "both workers with the same files"
                )
            _require_common_transport(info, member)
            # Page sizes and dtypes may differ: the receiver of a hand-off converts.
            for name in ("num_layers", "num_kv_heads", "head_dim"):
                mine, theirs = getattr(info.layout, name), getattr(member.info.layout, name)
                _require_equal(f"layout.{name}", mine, theirs, member)

    def add(self, info: pb.RegisterRequest, now: float) -> Member:
        member = Member(info=info, last_seen=now)
        self._members[info.incarnation] = member
        return member

    def remove(self, incarnation: bytes) -> Member | None:
        return self._members.pop(incarnation, None)

    def named(self, name: str) -> Member | None:
        return next((item for item in self._members.values() if item.info.name == name), None)

    def forgive(self, seconds: float, now: float) -> None:
        """Nobody could be heard for so long, for a reason of the router's own."""
        for member in self._members.values():
            member.last_seen = min(member.last_seen + seconds, now)

    def silent(self, now: float) -> list[Member]:
        """Those that have missed their heartbeats."""
        limit = HEARTBEAT_S * MISSED_HEARTBEATS
        return [member for member in self._members.values() if now - member.last_seen > limit]


def _require_common_transport(info: pb.RegisterRequest, member: Member) -> None:
    """A prefill and a decode worker must be able to connect."""
    kinds = [{item.kind for item in each.transports} for each in (info, member.info)]
    if info.role != member.info.role and not kinds[0] & kinds[1]:
        raise RegistrationRefused(
            f"transports are {', '.join(sorted(kinds[0])) or 'none'}, but {member.info.name} has "
            f"{', '.join(sorted(kinds[1])) or 'none'}; start both workers with transport auto"
        )


def _require_equal(name: str, mine: object, theirs: object, member: Member) -> None:
    if mine != theirs:
        raise RegistrationRefused(
            f"{name} is {mine}, but {member.info.name} was started with {theirs}; start both "
            "with the same value"
        )
