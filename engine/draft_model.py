"""A smaller model that proposes tokens for the rows of a step (speculative decoding, Leviathan et
al. 2023). It has weights and KV memory of its own, and shares the page numbers of the target: page
n of its pool belongs to whoever owns page n of the target's, so nobody allocates for it.
"""

from dataclasses import replace

from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.sampling_params import SamplingParams


class DraftModel:
    """Drafts for all rows of a batch together. Not safe for use by two threads at a time."""

    def __init__(self, runner: ModelRunner) -> None:
        """`runner` has as many pages as the target, of as many token slots."""
        self.runner = runner

    def add_drafts(self, batch: Batch) -> Batch:
        """Do the DraftWork of all rows: the batch with their drafts behind its tokens.

        Each draft is sampled by the parameters and the random number of the token that it stands
        for. Raises ValueError as `ModelRunner.execute` does.
        """
        drafts: list[list[int]] = [[] for _ in batch.rows]
        pending = [index for index, row in enumerate(batch.rows) if row.draft_work]
        while pending:
            rows = tuple(_draft_row(batch.rows[index], drafts[index]) for index in pending)
            result = self.runner.execute(Batch(rows=rows))
            for index, tokens in zip(pending, result.tokens, strict=True):
                drafts[index] += tokens
            pending = [
                index for index in pending if len(drafts[index]) < _num_drafts(batch.rows[index])
            ]
        return replace(batch, rows=tuple(map(_with_drafts, batch.rows, drafts)))


def _num_drafts(row: BatchRow) -> int:
    return row.draft_work.num_drafts if row.draft_work else 0


def _draft_row(row: BatchRow, drafts: list[int]) -> BatchRow:
    """What the draft model runs next for a row: what it has not seen, or its own last draft."""
    work = row.draft_work
    assert work is not None, "only rows with work are pending"
    token_ids = drafts[-1:] or work.token_ids
    return BatchRow(
        request_id=row.request_id,
        token_ids=token_ids,
        start=work.start if not drafts else work.start + len(work.token_ids) + len(drafts) - 1,
        page_table=row.page_table,
        sampling=_without_logprobs(row.sampling) if work.num_drafts else None,
        output_position=row.output_position + len(drafts),
    )


def _without_logprobs(sampling: SamplingParams | None) -> SamplingParams | None:
    if sampling is None or sampling.num_logprobs is None:
        return sampling
    return replace(sampling, num_logprobs=None)


def _with_drafts(row: BatchRow, drafts: list[int]) -> BatchRow:
    if not drafts:
        return row
    return replace(row, token_ids=(*row.token_ids, *drafts), num_drafts=len(drafts))
