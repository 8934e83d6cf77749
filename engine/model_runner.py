"""Runs one Batch: lays its rows out as tensors, calls the model, samples."""

import torch
from torch import Tensor

from pagewire.engine.batch import Batch, StepResult
from pagewire.engine.kv_cache import KVCache
from pagewire.engine.models.llama import LlamaModel
from pagewire.engine.sampler import Sampler
from pagewire.engine.step_inputs import InputLimits, prepare
from pagewire.kv_transfer.layout import KVLayout


class ModelRunner:
    """A model with its KV cache. Not safe for use by two threads at a time."""

    def __init__(
        self, model: LlamaModel, kv_cache: KVCache, *, max_model_len: int, digest: bytes
    ) -> None:
        """`digest` identifies the model's files: see `model_digest`."""
        self.model = model
        self.kv_cache = kv_cache
        self.max_model_len = max_model_len
        self.digest = digest
        self._pages = kv_cache.pages
        self._device = torch.device(model.device)
        self._limits = InputLimits(
            vocab_size=model.config.vocab_size,
            num_pages=kv_cache.num_pages,
            page_size=kv_cache.layout.page_size,
            max_model_len=max_model_len,
        )
        self._sampler = Sampler()

    @property
    def layout(self) -> KVLayout:
        return self.kv_cache.layout

    @property
    def num_pages(self) -> int:
        return self.kv_cache.num_pages

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    def execute(self, batch: Batch) -> StepResult:
        """Run a step and sample. Raises ValueError as `forward` does."""
        logits = self.forward(batch)
        sampled = [
            (index, row.sampling, row.output_position, row.history)
            for index, row in enumerate(batch.rows)
            if row.sampling
        ]
        if not sampled:
            return StepResult(tokens=((),) * len(batch.rows))
        indices, params, positions, histories = zip(*sampled, strict=True)
        result = self._sampler.sample(logits, params, positions, histories)
        tokens = iter(result.token_ids)
        return StepResult(
            tokens=tuple((next(tokens),) if row.sampling else () for row in batch.rows),
            logprobs={indices[index]: values for index, values in result.logprobs.items()},
        )

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Run a step, storing its KV.

        Returns float32 [num_sampled_rows, vocab_size]: the logits of the last token of each row
        that samples; the LM head is not computed for the others. Raises ValueError as `prepare`
        does, before anything is written.
        """
        inputs = prepare(batch.rows, self._limits, self._device)
        return self.model.forward(inputs.token_ids, inputs.attention, self._pages, inputs.logits_of)
