"""How many requests may be dispatched again, so that a worker that fails cannot double the load."""

_PRICE = 5  # requests that earn one retry: dispatches are at most 1.2 times the requests
_MIN = 3  # retries, before there was any request
_MAX = 32  # retries, however long all went well


class RetryBudget:
    """One retry for every five requests, a few at once at any time. Pure."""

    def __init__(self) -> None:
        self._balance = _MIN * _PRICE  # requests whose share was not used

    def deposit(self) -> None:
        """A request was admitted."""
        self._balance = min(_MAX * _PRICE, self._balance + 1)

    def withdraw(self) -> bool:
        """Whether one more may be dispatched again; it counts as done."""
        if self._balance < _PRICE:
            return False
        self._balance -= _PRICE
        return True
