"""What must hold after every event, and what must be gone when everything is over."""

from collections.abc import Iterable

from pagewire.sim.decode import SimDecodeWorker
from pagewire.sim.prefill import SimPrefillWorker
from pagewire.sim.router import SimRouter
from pagewire.sim.violation import require

AnyWorker = SimPrefillWorker | SimDecodeWorker


def check_worker(worker: AnyWorker) -> None:
    """The books of one worker balance. Raises InvariantViolation or IntegrityError."""
    worker.core.check_integrity()
    counts = worker.core.pool.counts()
    require(
        counts.free + counts.cached + counts.owned + counts.pinned + counts.quarantined
        == counts.total,
        f"the page states of {worker.process.name} do not sum to its {counts.total} pages",
    )


def check_router(router: SimRouter) -> None:
    """A router has promised no more than there is. Raises InvariantViolation."""
    for member in router.core.members:
        name = f"{router.process.name} of {member.info.name}"
        require(
            0 <= member.num_projected_pages <= member.info.num_pages,
            f"{name}: {member.num_projected_pages} of {member.info.num_pages} pages are promised",
        )
        require(
            member.num_projected_tokens >= 0,
            f"{name}: {member.num_projected_tokens} prompt tokens are projected",
        )


def leftovers(routers: Iterable[SimRouter], workers: Iterable[AnyWorker]) -> list[str]:
    """What is left of requests that are over, and who does not know whom; empty if all is well."""
    workers = list(workers)
    return [
        *(text for worker in workers for text in _worker_leftovers(worker)),
        *(text for router in routers for text in _router_leftovers(router, workers)),
    ]


def _worker_leftovers(worker: AnyWorker) -> list[str]:
    name = worker.process.name
    pool = worker.core.pool
    found = []
    if pool.num_available != pool.num_pages:
        found.append(
            f"{name} has pages that are neither free nor cached, or promises some: {pool.counts()}"
        )
    if not worker.core.is_idle:
        found.append(f"{name} is not idle: {worker.core.state()}")
    return found


def _router_leftovers(router: SimRouter, workers: list[AnyWorker]) -> list[str]:
    name = router.process.name
    found = []
    if any(router.core.counts().values()):
        found.append(f"{name} has live requests: {router.core.counts()}")
    members = list(router.core.members)
    if {member.incarnation for member in members} != {worker.incarnation for worker in workers}:
        found.append(f"{name} knows {len(members)} workers, not the {len(workers)} that live")
    found += [
        f"{name} still counts on {member.info.name}"
        for member in members
        if member.num_projected_pages or member.num_projected_tokens
    ]
    return found
