"""What drafts cost on this machine with these kernels: a few steps, timed at a worker's start."""

import time

from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.draft_length import DraftCosts
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.sampling_params import SamplingParams

_ROUNDS = 4
_NUM_TOKENS = 16  # of the longer step; they fit into the smallest page


def measure_costs(target: ModelRunner, draft: ModelRunner | None) -> DraftCosts:
    """Costs of drafts that `draft` makes, or that are looked up. Overwrites page 0 of both.

    Of alternating steps the shortest count, so that other work on the machine matters little.
    """
    num_tokens = min(_NUM_TOKENS, target.max_model_len)
    one = many = of_draft = float("inf")
    for _ in range(_ROUNDS):
        one = min(one, _step_seconds(target, 1))
        many = min(many, _step_seconds(target, num_tokens))
        if draft is not None:
            of_draft = min(of_draft, _step_seconds(draft, 1))
    per_token = max(0.0, many - one) / max(1, num_tokens - 1)
    return DraftCosts(
        per_token=per_token / max(one - per_token, per_token),
        per_draft=of_draft / one if draft is not None else 0.0,
    )


def _step_seconds(runner: ModelRunner, num_tokens: int) -> float:
    """A step of one row that samples behind each of its tokens."""
    row = BatchRow(
        request_id="measurement",
        token_ids=(0,) * num_tokens,
        start=0,
        page_table=(0,),
        sampling=SamplingParams(),
        num_drafts=num_tokens - 1,
    )
    started = time.perf_counter()
    runner.execute(Batch(rows=(row,)))
    return time.perf_counter() - started
