"""Stage 5: tiny models of Hugging Face transformers give the same logits and greedy tokens."""

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]  # not in its __all__
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from gpu_stages.items import InapplicableError, Item
from gpu_stages.measurement import Measurement
from gpu_stages.scale import Scale
from pagewire.engine.aggregated import generate
from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.load import load_engine
from pagewire.engine.model_runner import ModelRunner
from pagewire.engine.parallel.nccl_ranks import rank_device
from pagewire.engine.parallel.process_group import join_group
from pagewire.engine.parallel.tensor_parallel import TensorParallel
from pagewire.engine.sampling_params import SamplingParams

NUM_RANKS = 2
NUM_PAGES = 8
MAX_ERROR = 1e-4  # of ‖logits - theirs‖ / ‖theirs‖, in float32
PROMPT = [(31 * index + 7) % 190 for index in range(21)]
SIZES: dict[str, Any] = {
    "vocab_size": 193,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # so large that the greedy choice depends on every token
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}
MODELS: dict[str, Callable[[dict[str, Any]], PreTrainedModel]] = {
    "Llama": lambda sizes: LlamaForCausalLM(LlamaConfig(**sizes)),
    "Qwen3": lambda sizes: Qwen3ForCausalLM(Qwen3Config(**sizes)),
    "Mixtral": lambda sizes: MixtralForCausalLM(
        MixtralConfig(**sizes, **EXPERTS, num_local_experts=4)
    ),
    "Qwen3-MoE": lambda sizes: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**sizes, **EXPERTS, num_experts=4, moe_intermediate_size=32)
    ),
}


def items(scale: Scale) -> Iterator[Item]:
    for name in MODELS:
        yield Item(name=name, measure=partial(_measure, name, scale))
    yield Item(name="Llama over 2 ranks", measure=partial(_over_ranks, "Llama", scale))


def _over_ranks(name: str, scale: Scale) -> Iterator[Measurement]:
    """Two ranks in threads choose the tokens of one: over NCCL, or over gloo on a CPU."""
    if scale.device == "cuda" and torch.cuda.device_count() < NUM_RANKS:
        raise InapplicableError(f"there are fewer than {NUM_RANKS} GPUs")
    # Triton's interpreter runs in one thread.
    kernels = "triton" if scale.device == "cuda" else "torch"
    model, store = tiny_model(name, scale), HashStore()
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        path = Path(directory)
        alone = _load(path, scale.device, kernels=kernels, parallel=None)
        (expected,) = generate(alone, [PROMPT], SamplingParams(max_tokens=scale.num_parity_tokens))

        def on_rank(rank: int) -> list[int]:
            group = join_group(store, rank, NUM_RANKS, device=scale.device)
            device, parallel = rank_device(scale.device, rank), TensorParallel(group=group)
            runner = _load(path, device, kernels=kernels, parallel=parallel)
            return _choices(runner, expected)

        with ThreadPoolExecutor(NUM_RANKS) as threads:
            tokens, *_ = threads.map(on_rank, range(NUM_RANKS))
    yield Measurement(
        name=f"{name} over {NUM_RANKS} ranks: greedy tokens that differ",
        value=float(sum(a != b for a, b in zip(tokens, expected, strict=True))),
        unit="",
        limit=0.0,
    )


def _choices(runner: ModelRunner, output: list[int]) -> list[int]:
    """The most likely token behind the prompt and behind each of the output but the last.

    Only rank 0 has all logits, so that the others cannot choose what comes next.
    """
    tokens = []
    fed, start = PROMPT, 0
    for following in output:
        tokens.append(int(runner.forward(Batch(rows=(_row(fed, start),))).argmax()))
        fed, start = [following], start + len(fed)
    return tokens


def _row(token_ids: list[int], start: int) -> BatchRow:
    return BatchRow(
        request_id="",
        token_ids=token_ids,
        start=start,
        page_table=range(NUM_PAGES),
        sampling=SamplingParams(),
    )


def _measure(name: str, scale: Scale) -> Iterator[Measurement]:
    model = tiny_model(name, scale)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        yield from _compare(name, model, Path(directory), scale)


def tiny_model(name: str, scale: Scale) -> PreTrainedModel:
    """One of MODELS, with the same random weights in every process on one kind of device."""
    torch.manual_seed(0)
    with torch.device(scale.device):
        model = MODELS[name]({**SIZES, "num_hidden_layers": scale.num_parity_layers})
    model.train(False)
    return model


def _load(path: Path, device: str, *, kernels: str, parallel: TensorParallel | None) -> ModelRunner:
    return load_engine(
        path,
        dtype="float32",
        device=device,
        page_size=16,
        num_pages=NUM_PAGES,
        kernels=kernels,
        parallel=parallel,
    )


def _compare(name: str, model: PreTrainedModel, path: Path, scale: Scale) -> Iterator[Measurement]:
    runner = _load(path, scale.device, kernels="triton", parallel=None)
    logits = runner.forward(Batch(rows=(_row(PROMPT, 0),)))
    prompt = torch.tensor([PROMPT], device=scale.device)
    with torch.inference_mode():
        expected = model(prompt).logits[0, -1:].float()
    yield Measurement(
        name=f"{name}: error of the logits",
        value=float((logits - expected).norm() / expected.norm()),
        unit="",
        limit=MAX_ERROR,
    )
    num_tokens = scale.num_parity_tokens
    (tokens,) = generate(runner, [PROMPT], SamplingParams(max_tokens=num_tokens))
    theirs = _greedy(model, prompt, num_tokens)
    yield Measurement(
        name=f"{name}: greedy tokens that differ",
        value=float(sum(a != b for a, b in zip(tokens, theirs, strict=True))),
        unit="",
        limit=0.0,
    )


@torch.inference_mode()
def _greedy(model: PreTrainedModel, prompt: torch.Tensor, num_tokens: int) -> list[int]:
    """The most likely tokens, whatever generation settings the model has."""
    tokens = prompt
    for _ in range(num_tokens):
        following = model(tokens).logits[:, -1:].argmax(dim=-1)
        tokens = torch.cat((tokens, following), dim=1)
    new: list[int] = tokens[0, prompt.shape[1] :].tolist()
    return new
