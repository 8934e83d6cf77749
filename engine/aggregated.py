"""Prefill and decode in one process over one pool: the plainest way to generate.

The oracle of tests and benchmarks: what a hand-off between workers must not change.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pagewire.engine.batch import Batch, BatchRow, StepResult
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.sampling_params import SamplingParams
from pagewire.engine.token_history import TokenHistory


@dataclass(slots=True, kw_only=True)
class _Generation:
    """One prompt on its way."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    page_table: range
    history: TokenHistory | None
    output: list[int] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return len(self.output) == self.sampling.max_tokens or (
            bool(self.output) and self.output[-1] in self.sampling.stop_token_ids
        )

    def decode_row(self) -> BatchRow:
        return BatchRow(
            request_id="",
            token_ids=self.output[-1:],
            start=len(self.prompt) + len(self.output) - 1,
            page_table=self.page_table,
            sampling=self.sampling,
            output_position=len(self.output),
            history=self.history,
        )


def generate(
    runner: ModelRunner,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    *,
    chunk_size: int = 512,
) -> list[list[int]]:
    """The output tokens of each prompt; a stop token that ended one is its last.

    All prompts are prefilled one after another, `chunk_size` tokens a step, and then decoded
    together. Overwrites the whole KV cache. Raises ValueError when it is too small for all of them
    at once.
    """
    generations = _with_pages(runner, prompts, sampling)
    for generation in generations:
        _prefill(runner, generation, chunk_size)
    while running := [generation for generation in generations if not generation.finished]:
        batch = Batch(rows=tuple(generation.decode_row() for generation in running))
        _append(running, runner.execute(batch))
    return [generation.output for generation in generations]


def _with_pages(
    runner: ModelRunner, prompts: Sequence[Sequence[int]], sampling: SamplingParams
) -> list[_Generation]:
    generations, end = [], 0
    for prompt in prompts:
        start, end = end, end + runner.layout.num_pages(len(prompt) + sampling.max_tokens)
        generations.append(
            _Generation(
                prompt=tuple(prompt),
                sampling=sampling,
                page_table=range(start, end),
                history=TokenHistory.for_params(sampling, prompt),
            )
        )
    if end > runner.num_pages:
        raise ValueError(f"the prompts need {end} pages; the KV cache has {runner.num_pages}")
    return generations


def _prefill(runner: ModelRunner, generation: _Generation, chunk_size: int) -> None:
    prompt = generation.prompt
    for start in range(0, len(prompt), chunk_size):
        chunk = prompt[start : start + chunk_size]
        last = start + len(chunk) == len(prompt)
        row = BatchRow(
            request_id="",
            token_ids=chunk,
            start=start,
            page_table=generation.page_table,
            sampling=generation.sampling if last else None,
            history=generation.history,
        )
        _append([generation], runner.execute(Batch(rows=(row,))))


def _append(generations: Sequence[_Generation], result: StepResult) -> None:
    for generation, tokens in zip(generations, result.tokens, strict=True):
        generation.output += tokens
        if generation.history is not None:
            for token in tokens:
                generation.history.append(token)
