"""Which hand-offs get the free staging slots of a decode worker. Pure."""

from collections.abc import Collection

from pagewire.decode_worker.request import DecodeRequest
from pagewire.decode_worker.slots import SlotPool
from pagewire.kv_transfer.messages import Grant


def grant_slots(
    slots: SlotPool, receiving: Collection[DecodeRequest], *, max_per_handoff: int
) -> list[Grant]:
    """Hand out free slots, one at a time to the hand-off that holds the fewest."""
    grants: list[Grant] = []
    while slots.num_free:
        candidates = [
            request
            for request in receiving
            if request.receiver.wants_credit and slots.num_held(request.holder) < max_per_handoff
        ]
        if not candidates:
            break
        request = min(candidates, key=lambda item: slots.num_held(item.holder))
        credit = slots.grant(request.holder)
        grants.append(
            Grant(id=request.receiver.id, slot=credit.slot, slot_generation=credit.generation)
        )
    return grants
