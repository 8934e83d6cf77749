"""Seeds and pages of several choices."""

from hypothesis import given
from hypothesis import strategies as st

from pagewire.proto.choices import PageDemand, choice_seed, max_context_tokens


def test_choice_0_has_the_seed_of_the_request_and_no_two_have_the_same() -> None:
    for seed in (0, 7, 2**64 - 3):
        seeds = [choice_seed(seed, choice) for choice in range(16)]
        assert seeds[0] == seed
        assert len(set(seeds)) == 16
        assert all(0 <= each < 2**64 for each in seeds)


@given(
    page_size=st.sampled_from([1, 16, 64]),
    num_prompt_tokens=st.integers(1, 200),
    max_tokens=st.integers(1, 200),
    n=st.integers(1, 16),
)
def test_shared_pages_count_once(
    page_size: int, num_prompt_tokens: int, max_tokens: int, n: int
) -> None:
    demand = PageDemand(num_prompt_tokens=num_prompt_tokens, max_tokens=max_tokens, n=n)
    pages = set()
    for choice in range(n):
        for position in range(num_prompt_tokens + max_tokens - 1):
            page = position // page_size
            is_shared = (page + 1) * page_size <= num_prompt_tokens
            pages.add((page, None if is_shared else choice))
    assert demand.num_pages(page_size) == len(pages)


@given(
    num_pages=st.integers(1, 100),
    page_size=st.sampled_from([1, 16, 64]),
    num_prompt_tokens=st.integers(1, 500),
    n=st.integers(1, 16),
)
def test_the_longest_context_fits_and_one_page_more_does_not(
    num_pages: int, page_size: int, num_prompt_tokens: int, n: int
) -> None:
    longest = max_context_tokens(
        num_pages=num_pages, page_size=page_size, num_prompt_tokens=num_prompt_tokens, n=n
    )

    def fits(num_tokens: int) -> bool:
        max_tokens = num_tokens - num_prompt_tokens
        demand = PageDemand(num_prompt_tokens=num_prompt_tokens, max_tokens=max_tokens, n=n)
        return demand.num_pages(page_size) <= num_pages

    if longest > num_prompt_tokens:
        assert fits(longest)
        assert not fits(longest + page_size + 1)
    else:
        assert not fits(num_prompt_tokens + page_size + 1)
