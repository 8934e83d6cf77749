"""From a draft model's path to a DraftModel beside its target, once, at a worker's start."""

from pathlib import Path

from pagewire.engine.draft_model import DraftModel
from pagewire.engine.errors import ModelError
from pagewire.engine.load import kv_layout, load_engine
from pagewire.engine.loading.weights import open_checkpoint
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.quantization import Quantization


def draft_page_bytes(path: Path, *, page_size: int, dtype: str) -> int:
    """What a page takes in the pool of the draft model at `path`.

    Raises ModelError, and LayoutError for a dtype or page size that cannot be.
    """
    config = open_checkpoint(path).config
    return kv_layout(config, page_size=page_size, dtype=dtype).page_bytes


def load_draft_model(
    path: Path,
    target: ModelRunner,
    *,
    dtype: str = "bfloat16",
    quantization: Quantization = Quantization.NONE,
    device: str = "cpu",
    kernels: str = "auto",
) -> DraftModel:
    """Load the draft model of `target`, with as many pages; arguments are as in `load_engine`.

    Raises ModelError when the two have different vocabularies, and what `load_engine` raises.
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
    return DraftModel(runner)
