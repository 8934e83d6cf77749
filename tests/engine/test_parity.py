"""The decoder against transformers: logits and greedy tokens, through chunks and pages."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pagewire.engine.aggregated import generate
from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.load import load_engine
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.sampling_params import SamplingParams

PROMPT_LENGTHS = (1, 63, 64, 65, 200, 1000)
MAX_TOKENS = 12
CHUNK_SIZE = 96  # no multiple of the page size, and it divides no prompt length
TOLERANCE = 1e-4

MakeModel = Callable[..., PreTrainedModel]


def make_prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(vocab_size, (length,), generator=generator).tolist()
        for length in PROMPT_LENGTHS
    ]


def reference_logits(model: PreTrainedModel, token_ids: list[int]) -> Tensor:
    """[len(token_ids), vocab_size]"""
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def load(directory: Path, *, page_size: int = 64) -> ModelRunner:
    return load_engine(directory, dtype="float32", page_size=page_size, num_pages=128)


def test_logits_and_greedy_tokens_equal_those_of_transformers(
    family: str, make_model: MakeModel, tmp_path: Path
) -> None:
    reference = make_model(family)
    runner = load(tmp_path)
    prompts = make_prompts(runner.vocab_size)
    sampling = SamplingParams(max_tokens=MAX_TOKENS)

    outputs = generate(runner, prompts, sampling, chunk_size=CHUNK_SIZE)

    # Overwrites the cache with the same prompts in one chunk each: logits of the last token.
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = reference_logits(reference, prompt + output)
        greedy = expected[len(prompt) - 1 : -1].argmax(dim=-1)
        assert output == greedy.tolist()
        row = BatchRow(
            request_id="whole",
            token_ids=prompt,
            start=0,
            page_table=range(runner.num_pages),
            sampling=sampling,
        )
        logits = runner.forward(Batch(rows=(row,)))[0]
        assert relative_error(logits, expected[len(prompt) - 1]) < TOLERANCE


@pytest.mark.parametrize("page_size", [16, 32, 128])
def test_the_page_size_does_not_change_the_tokens(
    page_size: int, make_model: MakeModel, tmp_path: Path
) -> None:
    make_model("llama")
    small, usual = load(tmp_path, page_size=page_size), load(tmp_path)
    prompts = make_prompts(small.vocab_size)[:5]
    sampling = SamplingParams(max_tokens=MAX_TOKENS)

    assert generate(small, prompts, sampling) == generate(usual, prompts, sampling)


def test_a_mixed_step_gives_the_logits_of_separate_steps(
    make_model: MakeModel, tmp_path: Path
) -> None:
    """One decode row, one first chunk, one later chunk that samples and one that does not."""
    reference = make_model("llama")
    runner = load(tmp_path)
    tokens = make_prompts(runner.vocab_size)[4]
    greedy = SamplingParams()

    def row(pages: range, start: int, end: int, sampling: SamplingParams | None) -> BatchRow:
        return BatchRow(
            request_id=str(pages),
            token_ids=tokens[start:end],
            start=start,
            page_table=pages,
            sampling=sampling,
        )

    pages = [range(index * 4, index * 4 + 4) for index in range(4)]
    runner.execute(Batch(rows=tuple(row(pages[i], 0, 99, None) for i in (0, 2, 3))))
    logits = runner.forward(
        Batch(
            rows=(
                row(pages[0], 99, 100, greedy),
                row(pages[1], 0, 30, greedy),
                row(pages[2], 99, 170, greedy),
                row(pages[3], 99, 120, None),
            )
        )
    )

    expected = reference_logits(reference, tokens)[[99, 29, 169]]
    assert logits.shape == expected.shape
    assert relative_error(logits, expected) < TOLERANCE


def test_shared_pages_serve_two_sequences(make_model: MakeModel, tmp_path: Path) -> None:
    """A full page of a common prefix may stand in several page tables."""
    reference = make_model("qwen3")
    runner = load(tmp_path)
    prompt = make_prompts(runner.vocab_size)[2]
    prefix = BatchRow(request_id="prefix", token_ids=prompt, start=0, page_table=[7], sampling=None)
    runner.execute(Batch(rows=(prefix,)))
    rows = tuple(
        BatchRow(
            request_id=str(token),
            token_ids=[token],
            start=64,
            page_table=[7, page],
            sampling=SamplingParams(),
        )
        for token, page in ((5, 3), (6, 9))
    )

    logits = runner.forward(Batch(rows=rows))

    for token, row_logits in zip((5, 6), logits, strict=True):
        expected = reference_logits(reference, [*prompt, token])[-1]
        assert relative_error(row_logits, expected) < TOLERANCE


def test_generation_ends_with_the_stop_token(make_model: MakeModel, tmp_path: Path) -> None:
    make_model("llama")
    runner = load(tmp_path)
    prompts = make_prompts(runner.vocab_size)[:1]
    [full] = generate(runner, prompts, SamplingParams(max_tokens=MAX_TOKENS))
    stop = full[4]

    sampling = SamplingParams(max_tokens=MAX_TOKENS, stop_token_ids=frozenset({stop}))

    assert generate(runner, prompts, sampling) == [full[: full.index(stop) + 1]]
