"""How many requests may be dispatched again, so that a worker that fails cannot double the load."""

_SHARE = 0.2  # of the requests that were admitted
_MIN = 3.0
_MAX = 32.0  # however long all went well


class RetryBudget:
    """One retry for every five requests, a few at once at any time. Pure."""

    def __init__(self) -> None:
        self._retries = _MIN

    def deposit(self) -> None:
        """A request was admitted."""
        self._retries = min(_MAX, self._retries + _SHARE)

    def withdraw(self) -> bool:
        """Whether one more may be dispatched again; it counts as done."""
        if self._retries < 1.0:
            return False
        self._retries -= 1.0
        return True
