"""Feeds the tokens that one step sampled to the next one, on the device.

So the next step can be launched before the host has read them.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pagewire.engine.batch import BatchRow
from pagewire.engine.host_copies import to_device
from pagewire.engine.launched_step import LaunchedStep
from pagewire.engine.logit_adjustments import UnreadTokens


def feed(
    rows: Sequence[BatchRow], token_ids: Tensor, previous: LaunchedStep | None
) -> UnreadTokens | None:
    """The tokens that a step runs, those of `previous` among them; None where no row follows.

    token_ids: int64 [num_tokens], with others in their places. Raises ValueError, which names the
    request, unless both steps run and sample one token in every row, and for a row that is not in
    `previous`.
    """
    if all(row.follows is None for row in rows):
        return None
    if previous is None or previous.sampled is None:
        raise ValueError("rows follow those of a step that sampled nothing; give its LaunchedStep")
    _require_decode(rows)
    _require_decode(previous.batch.rows)
    num_sampled = len(previous.batch.rows)
    index = np.arange(len(rows))
    for number, row in enumerate(rows):
        if row.follows is None:
            continue
        if not 0 <= row.follows < num_sampled:
            raise ValueError(
                f"request {row.request_id} follows row {row.follows} of a step with {num_sampled}"
            )
        index[number] = len(rows) + row.follows
    known = torch.cat((token_ids, previous.sampled.tokens))
    # Where no token could be chosen any will do: the host ends the sequence when it learns of it.
    tokens = known.index_select(0, to_device(index, known.device)).clamp_(min=0)
    following = frozenset(number for number, row in enumerate(rows) if row.follows is not None)
    return UnreadTokens(rows=following, tokens=tokens)


def _require_decode(rows: Sequence[BatchRow]) -> None:
    for row in rows:
        if len(row.token_ids) != 1 or row.num_samples != 1:
            raise ValueError(
                f"request {row.request_id} runs {len(row.token_ids)} tokens and samples "
                f"{row.num_samples}; a step runs ahead where every row has one of both"
            )
