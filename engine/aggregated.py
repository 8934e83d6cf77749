"""Prefill and decode in one process over one pool: the plainest way to generate.

The oracle of tests and benchmarks: what a hand-off between workers must not change.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pagewire.engine.batch import Batch, BatchRow, StepResult
from pagewire.engine.launched_step import LaunchedStep
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

    def decode_row(self, follows: int | None = None) -> BatchRow:
        """`follows`: its row in the step launched before, whose token is not known yet."""
        num_tokens = len(self.output) + (follows is not None)
        return BatchRow(
            request_id="",
            token_ids=self.output[-1:],
            start=len(self.prompt) + num_tokens - 1,
            page_table=self.page_table,
            sampling=self.sampling,
            output_position=num_tokens,
            history=self.history,
            follows=follows,
        )


def generate(
    runner: ModelRunner,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    *,
    chunk_size: int = 512,
    overlapped: bool = False,
) -> list[list[int]]:
    """The output tokens of each prompt; a stop token that ended one is its last.

    All prompts are prefilled one after another, `chunk_size` tokens a step, and then decoded
    together. With `overlapped` a decode step is launched before the tokens of the one before are
    read, which changes none of them. Overwrites the whole KV cache. Raises ValueError when it is
    too small for all of them at once.
    """
    generations = _with_pages(runner, prompts, sampling)
    for generation in generations:
        _prefill(runner, generation, chunk_size)
    if overlapped:
        _decode_ahead(runner, generations)
    while running := [generation for generation in generations if not generation.finished]:
        batch = Batch(rows=tuple(generation.decode_row() for generation in running))
        _append(running, runner.execute(batch))
    return [generation.output for generation in generations]


def _decode_ahead(runner: ModelRunner, generations: Sequence[_Generation]) -> None:
    """Decode to the end, one step ahead of what is known.

    So a stop token is found only when the step behind it runs: what that one samples is void.
    """
    running: list[_Generation] = []  # rows of `step`, whose tokens are not known
    step: LaunchedStep | None = None
    while True:
        row_of = {id(generation): row for row, generation in enumerate(running)}
        ahead = [
            generation
            for generation in generations
            if not generation.finished
            and len(generation.output) + (id(generation) in row_of) < generation.sampling.max_tokens
        ]
        rows = tuple(generation.decode_row(row_of.get(id(generation))) for generation in ahead)
        launched = runner.launch(Batch(rows=rows), previous=step) if rows else None
        if step is not None:
            _append(running, step.wait())
        if launched is None:
            return
        running, step = ahead, launched


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
        if generation.finished:
            continue
        generation.output += tokens
        if generation.history is not None:
            for token in tokens:
                generation.history.append(token)
