"""From a draft model's path to a DraftModel beside its target, once, at a worker's start."""

import logging
import time
from pathlib import Path

from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.draft_model import DraftModel
from pagewire.engine.errors import ModelError
from pagewire.engine.load import load_engine
from pagewire.engine.loading.weights import open_checkpoint
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.quantization import Quantization
from pagewire.engine.sampling_params import SamplingParams
from pagewire.kv_transfer.layout import KVLayout

logger = logging.getLogger(__name__)

_ROUNDS = 4


def draft_page_bytes(path: Path, *, page_size: int, dtype: str) -> int:
    """What a page takes in the pool of the draft model at `path`. Raises ModelError."""
    config = open_checkpoint(path).config
    layout = KVLayout(
        page_size=page_size,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=dtype,
    )
    return layout.page_bytes


def load_draft_model(
    path: Path,
    target: ModelRunner,
    *,
    dtype: str = "bfloat16",
    quantization: Quantization = Quantization.NONE,
    device: str = "cpu",
    kernels: str = "auto",
    cost: float | None = None,
) -> DraftModel:
    """Load the draft model of `target`, with as many pages; arguments are as in `load_engine`.

    `cost` None measures what a step of it takes. Raises ModelError when the two have different
    vocabularies, and what `load_engine` raises.
    """
    vocab_size = open_checkpoint(path).config.vocab_size
    if vocab_size != target.vocab_size:
        raise ModelError(
            f"draft_model {path.name} has a vocabulary of {vocab_size} tokens, the model one of "
            f"{target.vocab_size}; choose a smaller model of the same family"
        )
    runner = load_engine(
        path,
        dtype=dtype,
        quantization=quantization,
        device=device,
        page_size=target.layout.page_size,
        num_pages=target.num_pages,
        kernels=kernels,
    )
    draft_model = DraftModel(runner, cost=measure_cost(runner, target) if cost is None else cost)
    logger.info("a draft costs %.2f of a decode step", draft_model.cost)
    return draft_model


def measure_cost(draft: ModelRunner, target: ModelRunner) -> float:
    """What a decode step of one row takes, over one of `target`. Overwrites page 0 of both.

    Of alternating steps the shortest count, so that other work on the machine matters little.
    """
    of_draft, of_target = float("inf"), float("inf")
    for _ in range(_ROUNDS):
        of_draft = min(of_draft, _step_seconds(draft))
        of_target = min(of_target, _step_seconds(target))
    return of_draft / of_target


def _step_seconds(runner: ModelRunner) -> float:
    row = BatchRow(
        request_id="measurement",
        token_ids=(0,),
        start=0,
        page_table=(0,),
        sampling=SamplingParams(),
    )
    started = time.perf_counter()
    runner.execute(Batch(rows=(row,)))
    return time.perf_counter() - started
