"""What drafts cost on this machine with these kernels: a few steps, timed at a worker's start."""

import time

from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.draft_length import DraftCosts
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.sampling_params import SamplingParams

_ROUNDS = 4
_SIZES = (1, 2, 4, 8, 16, 32, 64)  # tokens: matrices of some numbers of rows have kernels of theirs


def measure_costs(target: ModelRunner, draft: ModelRunner | None) -> DraftCosts:
    """Costs of drafts that `draft` makes, or that are looked up. Overwrites page 0 of both.

    Of alternating steps the shortest count, so that other work on the machine matters little. The
    context of `target` has room for two tokens at least, as without drafts.
    """
    seconds = {size: float("inf") for size in _SIZES if size <= target.max_model_len}
    of_draft = float("inf")
    for _ in range(_ROUNDS):
        for size, least in seconds.items():
            seconds[size] = min(least, _step_seconds(target, size))
        if draft is not None:
            of_draft = min(of_draft, _step_seconds(draft, 1))
    return DraftCosts(
        steps=tuple(seconds.items()),
        per_draft=of_draft / seconds[1] if draft is not None else 0.0,
    )


def _step_seconds(runner: ModelRunner, num_tokens: int) -> float:
    """A step of one row that samples behind each of its tokens."""
    row = BatchRow(
        request_id="measurement",
        token_ids=(0,) * num_tokens,
        start=0,
        page_table=(0,) * runner.layout.num_pages(num_tokens),
        sampling=SamplingParams(),
        num_drafts=num_tokens - 1,
    )
    started = time.perf_counter()
    runner.execute(Batch(rows=(row,)))
    return time.perf_counter() - started
