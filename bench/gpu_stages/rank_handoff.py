"""A hand-off between workers of two ranks, which have a GPU each and rank 0 the pages of both.

Both workers are on the same two GPUs, with a tiny model. On a CPU their ranks share host memory.
"""

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from gpu_stages.items import InapplicableError
from gpu_stages.measurement import Measurement
from gpu_stages.parity import NUM_RANKS, PROMPT, tiny_model
from gpu_stages.scale import Scale
from gpu_stages.served import Served, request, workers
from pagewire.engine.aggregated import generate
from pagewire.engine.load import load_engine
from pagewire.engine.sampling_params import SamplingParams
from pagewire.worker.config import Role, WorkerConfig

FAMILY = "Llama"
PAGE_SIZE = 16
NUM_PAGES = 16
NUM_REQUESTS = 2  # of which the second finds everything warm


def measure(scale: Scale) -> Iterator[Measurement]:
    if scale.device == "cuda" and torch.cuda.device_count() < NUM_RANKS:
        raise InapplicableError(f"there are fewer than {NUM_RANKS} GPUs, and each rank takes one")
    # Triton's interpreter would be slow, and says nothing of hand-offs.
    kernels = "triton" if scale.device == "cuda" else "torch"
    with tempfile.TemporaryDirectory() as directory:
        tiny_model(FAMILY, scale).save_pretrained(directory)
        path = Path(directory)
        expected = _alone(path, scale, kernels)
        runs = asyncio.run(_serve(path, scale, kernels))
    yield Measurement(
        name="workers of two ranks: requests with other tokens than those of one engine",
        value=float(sum(run.tokens != expected for run in runs)),
        unit="",
        limit=0.0,
    )
    yield Measurement(
        name="workers of two ranks: exposed hand-off", value=1e3 * runs[-1].exposed_s, unit="ms"
    )


def _alone(path: Path, scale: Scale, kernels: str) -> list[int]:
    runner = load_engine(
        path,
        dtype="float32",
        device=scale.device,
        page_size=PAGE_SIZE,
        num_pages=NUM_PAGES,
        kernels=kernels,
    )
    params = SamplingParams(max_tokens=scale.num_parity_tokens)
    (tokens,) = generate(runner, [PROMPT], params, chunk_size=len(PROMPT))
    return tokens


async def _serve(path: Path, scale: Scale, kernels: str) -> list[Served]:
    def configs(router: str) -> list[WorkerConfig]:
        return [
            WorkerConfig(
                name=f"{role}-0",
                role=role,
                model=str(path),
                served_model="check",
                routers=(router,),
                dtype="float32",
                device=scale.device,
                tensor_parallel_size=NUM_RANKS,
                page_size=PAGE_SIZE,
                num_pages=NUM_PAGES,
                kernels=kernels,
                max_batch_size=1,
                num_slots=scale.num_slots,
            )
            for role in Role
        ]

    async with workers("pagewire.cluster.worker_process", configs) as control:
        return [
            await request(control, PROMPT, scale.num_parity_tokens) for _ in range(NUM_REQUESTS)
        ]
