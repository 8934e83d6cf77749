"""A prefill and a decode worker in processes of their own on one device, as they would be served.

Both are real workers with the same random model.
"""

import asyncio
import gc
import statistics
from collections.abc import Iterator, Sequence

import torch

from gpu_stages.measurement import Measurement
from gpu_stages.random_model import random_model, runner_of
from gpu_stages.scale import Scale
from gpu_stages.served import Served, request, workers
from pagewire.engine.aggregated import generate
from pagewire.engine.sampling_params import SamplingParams
from pagewire.worker.config import Role, WorkerConfig

MAX_EXPOSED_SHARE = 5.0  # percent of TTFT


def measure(scale: Scale, prompt: Sequence[int], max_tokens: int) -> Iterator[Measurement]:
    """`prompt` is handed over as often as the scale repeats it, after once to warm up."""
    expected = _alone(scale, prompt, max_tokens)
    runs = asyncio.run(_serve(scale, prompt, max_tokens))
    yield Measurement(
        name="two processes: tokens that differ from those of one engine",
        value=float(sum(run.tokens != expected for run in runs)),
        unit="",
        limit=0.0,
    )
    warm = runs[1:]
    ttft_s = statistics.median(run.ttft_s for run in warm)
    exposed_s = statistics.median(run.exposed_s for run in warm)
    yield Measurement(name="two processes: TTFT", value=1e3 * ttft_s, unit="ms")
    yield Measurement(name="two processes: exposed hand-off", value=1e3 * exposed_s, unit="ms")
    yield Measurement(
        name="two processes: exposed hand-off, share of TTFT",
        value=100 * exposed_s / ttft_s,
        unit="% of time",
        limit=MAX_EXPOSED_SHARE,
    )


def _alone(scale: Scale, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """What one engine generates. Its memory is free again behind it."""
    runner = runner_of(random_model(scale), scale, _num_pages(scale, prompt, max_tokens))
    sampling = SamplingParams(max_tokens=max_tokens)
    (tokens,) = generate(runner, [prompt], sampling, chunk_size=len(prompt))
    del runner
    gc.collect()
    if scale.device == "cuda":
        torch.cuda.empty_cache()
    return tokens


def _num_pages(scale: Scale, prompt: Sequence[int], max_tokens: int) -> int:
    return -(-(len(prompt) + max_tokens) // scale.page_size) + 1


async def _serve(scale: Scale, prompt: Sequence[int], max_tokens: int) -> list[Served]:
    num_pages = 2 * _num_pages(scale, prompt, max_tokens)  # of this request and the one before

    def configs(router: str) -> list[WorkerConfig]:
        return [_config(scale, role, router, num_pages, len(prompt)) for role in Role]

    async with workers("gpu_stages.handoff_worker", configs) as control:
        return [await request(control, prompt, max_tokens) for _ in range(scale.num_handovers)]


def _config(
    scale: Scale, role: Role, router: str, num_pages: int, max_batch_tokens: int
) -> WorkerConfig:
    return WorkerConfig(
        name=f"{role}-0",
        role=role,
        model="random",
        served_model="check",
        routers=(router,),
        device=scale.device,
        dtype=scale.dtype,
        page_size=scale.page_size,
        num_pages=num_pages,
        max_batch_tokens=max(max_batch_tokens, scale.page_size),
        max_batch_size=1,
        num_slots=scale.num_slots,
    )
