"""Stage 5: tiny models of Hugging Face transformers give the same logits and greedy tokens."""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
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

from gpu_stages.items import Item
from gpu_stages.measurement import Measurement
from gpu_stages.scale import Scale
from pagewire.engine.aggregated import generate
from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.load import load_engine
from pagewire.engine.sampling_params import SamplingParams

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


def _measure(name: str, scale: Scale) -> Iterator[Measurement]:
    torch.manual_seed(0)
    with torch.device(scale.device):
        model = MODELS[name]({**SIZES, "num_hidden_layers": scale.num_parity_layers})
    model.train(False)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        yield from _compare(name, model, Path(directory), scale)


def _compare(name: str, model: PreTrainedModel, path: Path, scale: Scale) -> Iterator[Measurement]:
    runner = load_engine(
        path,
        dtype="float32",
        device=scale.device,
        page_size=16,
        num_pages=8,
        kernels="triton",
    )
    row = BatchRow(
        request_id="",
        token_ids=PROMPT,
        start=0,
        page_table=range(2),
        sampling=SamplingParams(),
    )
    logits = runner.forward(Batch(rows=(row,)))
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
