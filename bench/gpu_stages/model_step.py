"""Stage 3: decode steps and prompts of a whole model, sampling and the host's part included."""

from collections.abc import Iterator
from dataclasses import replace

from gpu_stages.ceilings import Ceilings
from gpu_stages.measurement import Measurement, above_floor
from gpu_stages.random_model import bytes_of_step, random_model, runner_of
from gpu_stages.scale import Scale
from gpu_stages.timing import wall_ms
from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.sampling_params import SamplingParams

DECODE_RATIO, PREFILL_RATIO = 1.30, 1.35
MAX_HOST_GAP_MS = 0.15
GREEDY = SamplingParams()


def measure(scale: Scale, ceilings: Ceilings) -> Iterator[Measurement]:
    most_pages = max(rows * -(-context // scale.page_size) for rows, context in scale.decode)
    longest = max(scale.prefill)
    model = random_model(scale)
    runner = runner_of(model, scale, max(most_pages, -(-longest // scale.page_size)))
    runner.kv_cache.pool.zero_()
    runner.warm_up(max(rows for rows, _ in scale.decode))
    for num_rows, context in scale.decode:
        yield from _decode(runner, scale, ceilings, num_rows, context)
    for num_tokens in scale.prefill:
        yield _prefill(runner, scale, ceilings, num_tokens)


def _decode(
    runner: ModelRunner, scale: Scale, ceilings: Ceilings, num_rows: int, context: int
) -> Iterator[Measurement]:
    per_row = -(-context // scale.page_size)
    batch = Batch(
        rows=tuple(
            BatchRow(
                request_id=str(row),
                token_ids=[row % runner.vocab_size],
                start=context - 1,
                page_table=range(row * per_row, (row + 1) * per_row),
                sampling=GREEDY,
            )
            for row in range(num_rows)
        )
    )
    runner.execute(batch)
    step_ms = wall_ms(lambda: runner.execute(batch), scale.device, scale.repeats)
    kv_bytes = num_rows * context * runner.layout.page_bytes / scale.page_size
    floor = ceilings.ms_to_move(bytes_of_step(runner.model) + kv_bytes)
    name = f"decode, {num_rows} rows of {context}"
    yield above_floor(name, step_ms, floor, times=DECODE_RATIO)
    ahead_ms = wall_ms(lambda: _run_ahead(runner, batch, scale.repeats), scale.device, 1)
    yield above_floor(f"{name}, one ahead", ahead_ms / scale.repeats, floor, times=DECODE_RATIO)

    def steps_without_waiting() -> None:
        for _ in range(scale.repeats):
            runner.forward(batch)

    model_ms = wall_ms(steps_without_waiting, scale.device, 1) / scale.repeats
    # Sampling is in it too, which makes this an upper bound of what the host adds.
    yield Measurement(
        name=f"{name}: sampling and host beside the model",
        value=step_ms - model_ms,
        unit="ms",
        limit=MAX_HOST_GAP_MS if num_rows == 1 else None,
    )


def _run_ahead(runner: ModelRunner, batch: Batch, num_steps: int) -> None:
    """Steps each of which is launched before the tokens of the one before are read."""
    rows = tuple(replace(row, follows=index) for index, row in enumerate(batch.rows))
    following = Batch(rows=rows)
    step = runner.launch(batch)
    for _ in range(num_steps - 1):
        ahead = runner.launch(following, previous=step)
        step.wait()
        step = ahead
    step.wait()


def _prefill(runner: ModelRunner, scale: Scale, ceilings: Ceilings, num_tokens: int) -> Measurement:
    row = BatchRow(
        request_id="",
        token_ids=[token % runner.vocab_size for token in range(num_tokens)],
        start=0,
        page_table=range(-(-num_tokens // scale.page_size)),
        sampling=GREEDY,
    )
    batch = Batch(rows=(row,))
    runner.execute(batch)
    measured = wall_ms(lambda: runner.execute(batch), scale.device, max(1, scale.repeats // 4))
    config = runner.model.config
    head = config.vocab_size * config.hidden_size
    layers = bytes_of_step(runner.model) // runner.model.embedding.itemsize - head
    pairs = num_tokens * (num_tokens + 1) / 2
    attention = 4 * pairs * config.num_heads * config.head_dim * config.num_layers
    floor = ceilings.ms_to_compute(2 * layers * num_tokens + 2 * head + attention)
    return above_floor(f"prompt of {num_tokens}", measured, floor, times=PREFILL_RATIO)
