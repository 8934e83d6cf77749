"""What a draft model is to run for one sequence: what it has not seen of it, then drafts. Pure.

The prefill worker computes the KV of the target model alone, so the draft model reads the prompt
itself, a part with each decode step. It drafts once it has caught up.
"""

from collections.abc import Iterable

from pagewire.engine.batch import DraftWork

# Reading a token costs a draft model about a twentieth of what a draft saves, and an output may end
# early: a long prompt in front of a short output is not read.
_MAX_UNSEEN_PER_TOKEN = 8


class ModelDrafter:
    """Follows one sequence and how much of it the draft model has KV of."""

    def __init__(self, token_ids: Iterable[int], *, max_model_len: int) -> None:
        """`max_model_len` is the draft model's: behind it there are no drafts."""
        self._tokens = list(token_ids)
        self._max_model_len = max_model_len
        self._num_seen = 0

    def extend(self, token_ids: Iterable[int]) -> None:
        """The sequence goes on with `token_ids`."""
        self._tokens += token_ids

    def plan(self, num_drafts: int, *, num_left: int, max_unseen: int) -> DraftWork | None:
        """Work that leads to `num_drafts` drafts behind the newest token, now or later.

        num_left: output tokens that may still come; max_unseen: tokens that may be run to catch
        up, at least 1. None where nothing is to be drafted, or where it comes too late.
        """
        num_unseen = len(self._tokens) - self._num_seen
        # The KV of the last draft is not needed, and neither is its position.
        num_drafts = min(num_drafts, self._max_model_len - len(self._tokens) + 1)
        if num_drafts < 1 or num_unseen > _MAX_UNSEEN_PER_TOKEN * num_left:
            return None
        return DraftWork(
            token_ids=self._tokens[self._num_seen : self._num_seen + max_unseen],
            start=self._num_seen,
            num_drafts=num_drafts if num_unseen <= max_unseen else 0,
        )

    def on_step(self, work: DraftWork, num_accepted: int) -> None:
        """`work` was done, and the first `num_accepted` drafts were right.

        The KV of right drafts stays, but for that of the last draft, which was never computed. That
        of wrong ones is overwritten by the tokens that come in their places.
        """
        num_drafts_seen = min(num_accepted, max(0, work.num_drafts - 1))
        self._num_seen = work.start + len(work.token_ids) + num_drafts_seen
