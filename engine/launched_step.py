"""A step that was launched, whose tokens the host need not know yet."""

from dataclasses import dataclass

from pagewire.engine.batch import Batch, StepResult, TokenLogprobs
from pagewire.engine.sampler import PendingTokens, SampledTokens
from pagewire.engine.speculative import num_accepted


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LaunchedStep:
    """What `ModelRunner.launch` returns. Waited for in the order of launches."""

    batch: Batch
    sampled: PendingTokens | None  # None: no row samples

    def wait(self) -> StepResult:
        """What the step sampled, once it is there. Raises LogitsError."""
        if self.sampled is None:
            return StepResult(tokens=((),) * len(self.batch.rows))
        return _by_row(self.batch, self.sampled.wait())


def _by_row(batch: Batch, sampled: SampledTokens) -> StepResult:
    """The sampled tokens of each row, up to the first that is not the draft in its place.

    Those of siblings, who have no drafts, are all kept.
    """
    tokens: list[tuple[int, ...]] = []
    logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
    start = 0
    for index, row in enumerate(batch.rows):
        if not row.sampling:
            tokens.append(())
            continue
        mine = sampled.token_ids[start : start + row.num_samples]
        drafts = row.token_ids[len(row.token_ids) - row.num_drafts :]
        kept = num_accepted(drafts, mine) + 1 + len(row.siblings)
        tokens.append(tuple(mine[:kept]))
        if row.sampling.num_logprobs is not None:
            logprobs[index] = tuple(sampled.logprobs[start + i][0] for i in range(kept))
        start += row.num_samples
    return StepResult(tokens=tuple(tokens), logprobs=logprobs)
