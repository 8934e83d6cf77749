"""Stage 4: prefill and decode with a pool each on one device, and the pages between them.

In one process, where pages go through a staging buffer of the device, and in two, over a transport;
then between workers of two ranks. The tokens must be those of one engine alone.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from gpu_stages import rank_handoff, two_processes
from gpu_stages.ceilings import Ceilings
from gpu_stages.items import Item
from gpu_stages.measurement import Measurement, above_floor
from gpu_stages.random_model import random_model, runner_of
from gpu_stages.scale import Scale
from gpu_stages.timing import wall_ms
from pagewire.engine.aggregated import generate
from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.sampling_params import SamplingParams
from pagewire.kernels.gpu.pages import PagePart, gather_pages, scatter_pages

MAX_TOKENS = 16
TWO_PROCESSES_S = 75.0  # to start, to load and to warm up
MAX_RATIO = 1 / 0.7  # of the bandwidth of the link, here the device's own memory


def items(scale: Scale, ceilings: Ceilings) -> Iterator[Item]:
    prompt = [7 * token % scale.model.vocab_size for token in range(scale.num_handed_over)]
    num_tokens = min(MAX_TOKENS, scale.num_parity_tokens)
    yield Item(
        name="one process", measure=partial(_one_process, scale, ceilings, prompt, num_tokens)
    )
    yield Item(
        name="two processes",
        measure=partial(two_processes.measure, scale, prompt, num_tokens),
        limit_s=TWO_PROCESSES_S,
    )
    yield Item(name="workers of two ranks", measure=partial(rank_handoff.measure, scale))


def _one_process(
    scale: Scale, ceilings: Ceilings, prompt: Sequence[int], num_tokens: int
) -> Iterator[Measurement]:
    sampling = SamplingParams(max_tokens=num_tokens)
    model = random_model(scale)
    num_pages = -(-(len(prompt) + sampling.max_tokens) // scale.page_size)
    prefill, decode = (runner_of(model, scale, num_pages + 1) for _ in range(2))
    (alone,) = generate(prefill, [prompt], sampling, chunk_size=len(prompt))

    sources = range(num_pages)
    targets = range(num_pages, 0, -1)  # other pages than the sender's
    first = _step(prefill, prompt, 0, sources, sampling)

    def hand_over() -> None:
        pages = prefill.layout.num_pages(len(prompt))
        _copy_pages(prefill, decode, sources[:pages], targets[:pages])

    hand_over_ms = wall_ms(hand_over, scale.device, scale.repeats)
    tokens = [first]
    while len(tokens) < sampling.max_tokens:
        position = len(prompt) + len(tokens) - 1
        tokens.append(_step(decode, tokens[-1:], position, targets, sampling))
    yield Measurement(
        name="tokens that differ from those of one engine",
        value=float(sum(a != b for a, b in zip(alone, tokens, strict=True))),
        unit="",
        limit=0.0,
    )
    moved = 4 * prefill.layout.num_pages(len(prompt)) * prefill.layout.page_bytes
    floor = ceilings.ms_to_move(moved)
    yield above_floor(f"pages of {len(prompt)} tokens", hand_over_ms, floor, times=MAX_RATIO)


def _step(
    runner: ModelRunner,
    token_ids: Sequence[int],
    start: int,
    pages: Sequence[int],
    sampling: SamplingParams,
) -> int:
    """Run tokens of the one sequence; returns the token that is sampled behind them."""
    row = BatchRow(
        request_id="",
        token_ids=token_ids,
        start=start,
        page_table=pages,
        sampling=sampling,
    )
    return runner.execute(Batch(rows=(row,))).tokens[0][0]


def _copy_pages(
    source: ModelRunner, target: ModelRunner, from_pages: Sequence[int], to_pages: Sequence[int]
) -> None:
    """Gather pages into a staging buffer and scatter it into others."""
    page_bytes, device = source.layout.page_bytes, source.kv_cache.pool.device
    whole = PagePart(offset=0, num_layers=1, layer_bytes=page_bytes, run_bytes=page_bytes)
    gathered, scattered = (
        torch.tensor(pages, dtype=torch.int32).to(device) for pages in (from_pages, to_pages)
    )
    staged = gather_pages(source.kv_cache.pool, gathered, whole)
    scatter_pages(staged, target.kv_cache.pool, scattered, whole)
