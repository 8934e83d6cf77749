"""What must hold after every event, and what must hold when everything is over."""

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
        counts.free + counts.owned + counts.pinned + counts.quarantined == counts.total,
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


def check_settled(routers: Iterable[SimRouter], workers: Iterable[AnyWorker]) -> None:
    """Nothing is left of any request. Raises InvariantViolation that says what is, and where."""
    workers = list(workers)
    for worker in workers:
        check_worker(worker)
        counts = worker.core.pool.counts()
        require(counts.free == counts.total, f"{worker.process.name} has lost pages: {counts}")
        require(worker.core.is_idle, f"{worker.process.name} is not idle")
    for router in routers:
        check_router(router)
        name = router.process.name
        require(router.core.is_idle, f"{name} has live requests: {router.core.counts()}")
        members = {member.incarnation for member in router.core.members}
        require(
            members == {worker.incarnation for worker in workers},
            f"{name} does not know the workers that live",
        )
        for member in router.core.members:
            require(
                (member.num_projected_pages, member.num_projected_tokens) == (0, 0),
                f"{name} still counts on {member.info.name}",
            )
