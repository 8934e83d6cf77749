"""What a decode worker needs to draft: loaded and measured once, at its start."""

import logging
from pathlib import Path

from pagewire.decode_worker.drafting import Speculation
from pagewire.engine.draft_model import DraftModel
from pagewire.engine.load_draft import load_draft_model
from pagewire.engine.measure_drafts import measure_costs
from pagewire.engine.model_runner import ModelRunner
from pagewire.worker.config import WorkerConfig

logger = logging.getLogger(__name__)


def load_speculation(
    config: WorkerConfig, target: ModelRunner
) -> tuple[Speculation | None, DraftModel | None]:
    """(None, None) where nothing is to be drafted, no DraftModel where drafts are looked up.

    Raises what `load_draft_model` raises.
    """
    if not config.max_draft_tokens:
        return None, None
    draft_model = None
    if config.draft_model is not None:
        draft_model = load_draft_model(
            Path(config.draft_model),
            target,
            dtype=config.dtype,
            quantization=config.draft_quantization,
            device=config.device,
            kernels=config.kernels,
        )
    costs = measure_costs(target, draft_model.runner if draft_model else None)
    logger.info(
        "of a decode step of one row, one more token costs %.2f and a draft of %s %.2f",
        costs.of_drafts(1, 1) - costs.per_draft,
        config.draft_model or "the text so far",
        costs.per_draft,
    )
    speculation = Speculation(
        max_draft_tokens=config.max_draft_tokens,
        costs=costs,
        draft_model_len=draft_model.runner.max_model_len if draft_model else None,
    )
    return speculation, draft_model
