"""What holds pages on a decode worker: a request while they arrive, then each of its sequences."""

from typing import Protocol

from pagewire.engine.page_pool import PagePool, Reservation


class PageOwner(Protocol):
    """Pages, and the promise of those that it does not have yet."""

    pages: list[int]
    reservation: Reservation | None


def grow(owner: PageOwner, num_pages: int, pool: PagePool) -> None:
    """Let `owner` have at least `num_pages` pages, out of its Reservation."""
    missing = num_pages - len(owner.pages)
    if missing > 0:
        assert owner.reservation is not None, "who grows was reserved for"
        owner.pages += pool.take(owner.reservation, missing)
