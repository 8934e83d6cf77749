"""Registration: who is taken in, and what a refusal says."""

from collections.abc import Callable

import pytest
from routing import registration

from pagewire.proto import worker_pb2 as pb
from pagewire.router.members import Members, RegistrationRefused


def with_change(change: Callable[[pb.RegisterRequest], None]) -> pb.RegisterRequest:
    info = registration("decode-0", pb.ROLE_DECODE)
    change(info)
    return info


def _set_layout(name: str, value: object) -> pb.RegisterRequest:
    return with_change(lambda info: setattr(info.layout, name, value))


def _set(name: str, value: object) -> pb.RegisterRequest:
    return with_change(lambda info: setattr(info, name, value))


@pytest.mark.parametrize(
    ("info", "field"),
    [
        (_set("incarnation", b"short"), "incarnation"),
        (_set("role", pb.ROLE_UNSPECIFIED), "role"),
        (_set("num_pages", 0), "num_pages"),
        (_set("max_model_len", 0), "max_model_len"),
        (_set("model_digest", b"other"), "model model has other weights than that of prefill-0"),
        (
            with_change(lambda info: info.ClearField("transports")),
            "transports are none, but prefill-0 has tcp",
        ),
        (_set_layout("page_size", 0), "layout.page_size"),
        (_set("model", "another"), "model is another, but prefill-0 was started with model"),
        (_set_layout("num_layers", 3), "layout.num_layers is 3, but prefill-0 was started with 2"),
        (_set_layout("num_kv_heads", 2), "layout.num_kv_heads"),
        (_set_layout("head_dim", 2), "layout.head_dim"),
    ],
)
def test_a_refusal_names_the_field(info: pb.RegisterRequest, field: str) -> None:
    members = Members()
    members.add(registration("prefill-0", pb.ROLE_PREFILL), 0.0)
    with pytest.raises(RegistrationRefused, match=field):
        members.check(info)


@pytest.mark.parametrize("info", [_set_layout("page_size", 64), _set_layout("dtype", "int8")])
def test_page_sizes_and_dtypes_may_differ(info: pb.RegisterRequest) -> None:
    members = Members()
    members.add(registration("prefill-0", pb.ROLE_PREFILL), 0.0)
    members.check(info)


def test_a_successor_may_differ_from_its_predecessor() -> None:
    members = Members()
    members.add(registration("decode-0", pb.ROLE_DECODE), 0.0)
    members.check(_set("model", "another"))


def test_members_are_found_by_incarnation_name_and_role() -> None:
    members = Members()
    member = members.add(registration("prefill-0", pb.ROLE_PREFILL), 0.0)
    assert members.get(member.incarnation) is member
    assert members.named("prefill-0") is member
    assert members.named("prefill-1") is None
    assert members.of_role(pb.ROLE_PREFILL) == list(members) == [member]
    assert members.of_role(pb.ROLE_DECODE) == []
    assert members.remove(member.incarnation) is member
    assert members.remove(member.incarnation) is None
    assert list(members) == []


def test_three_missed_heartbeats_are_silence() -> None:
    members = Members()
    member = members.add(registration("prefill-0", pb.ROLE_PREFILL), 10.0)
    assert members.silent(13.0) == []
    assert members.silent(13.1) == [member]
    member.last_seen = 13.0
    assert members.silent(13.1) == []
