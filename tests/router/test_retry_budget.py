"""RetryBudget: a few retries at once, and one for every five requests."""

from pagewire.router.retry_budget import RetryBudget


def num_retries(budget: RetryBudget) -> int:
    """How many there are now; none is left after that."""
    count = 0
    while budget.withdraw():
        count += 1
    return count


def test_three_retries_need_no_request() -> None:
    assert num_retries(RetryBudget()) == 3


def test_five_requests_earn_one_retry() -> None:
    budget = RetryBudget()
    assert num_retries(budget) == 3
    for _ in range(54):
        budget.deposit()
    assert num_retries(budget) == 10


def test_a_good_past_does_not_pay_for_a_storm() -> None:
    budget = RetryBudget()
    for _ in range(10_000):
        budget.deposit()
    assert num_retries(budget) == 32
