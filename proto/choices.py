"""What routers and workers agree on about a request for several choices: their seeds and pages.

The choices of a request share its prompt, which is computed once and handed off once. On a decode
worker they share its full pages; from the last, partly filled one on each has pages of its own.
"""

from dataclasses import dataclass

MAX_CHOICES = 16


def choice_seed(seed: int, choice: int) -> int:
    """The seed of one choice: that of the request, plus the choice's index.

    So choice 0 does not depend on how many there are, and every choice is what a request for one
    would get with its seed.
    """
    return (seed + choice) % 2**64


@dataclass(frozen=True, slots=True, kw_only=True)
class PageDemand:
    """The KV that a request needs on a decode worker at most.

    Each choice needs that of the prompt and of its output, without the last token, whose KV is
    never computed.
    """

    num_prompt_tokens: int
    max_tokens: int  # of each choice
    n: int = 1  # choices

    def num_pages(self, page_size: int) -> int:
        """Pages of `page_size` tokens, those that the choices share counted once."""
        num_shared = self.num_prompt_tokens // page_size
        num_tokens = self.num_prompt_tokens + self.max_tokens - 1
        return num_shared + self.n * (-(-num_tokens // page_size) - num_shared)


def max_context_tokens(*, num_pages: int, page_size: int, num_prompt_tokens: int, n: int) -> int:
    """The longest prompt plus output of each of `n` choices for which `num_pages` pages suffice."""
    num_shared = num_prompt_tokens // page_size
    return (num_shared + (num_pages - num_shared) // n) * page_size
