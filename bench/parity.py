"""Greedy tokens of the engine against transformers, on the default model in float32.

transformers gets the weights of the same GGUF file, by way of the `gguf` library and not of the
engine's loader, and runs each prompt with the engine's output behind it. That its most likely token
is the engine's at every place means, by induction, that it would have generated the same.
"""

import argparse
import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pagewire.engine.aggregated import generate
from pagewire.engine.load import load_engine
from pagewire.engine.loading.resolve import resolve_model
from pagewire.engine.sampling_params import SamplingParams
from pagewire.worker.config import Role, WorkerConfig
from pagewire.worker.followers import follower_processes
from pagewire.worker.load import load_worker_engine

TEXT = Path(__file__).parents[1] / "LICENSE"  # English of the right length that is always here
LENGTHS = (1, 2, 16, 63, 64, 65, 200, 1000)
CHUNK_SIZE = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """What was compared and how much of it agreed."""

    num_ranks: int
    num_prompts: int
    max_tokens: int
    prompt_tokens: int
    output_tokens: int
    equal_tokens: int
    equal_prompts: int
    smallest_margin: float  # between the two largest logits, over all places
    engine_seconds: float  # loading included
    reference_seconds: float
    torch: str
    transformers: str


def make_prompts(path: Path, num_prompts: int) -> list[list[int]]:
    """Pieces of a text in all LENGTHS, from different places."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokens: list[int] = tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"]
    prompts = []
    for index in range(num_prompts):
        length = LENGTHS[index % len(LENGTHS)]
        start = index * (len(tokens) - length) // num_prompts
        prompts.append(tokens[start : start + length])
    return prompts


def load_reference(path: Path) -> LlamaForCausalLM:
    """The Llama of a GGUF file, by the `gguf` library's own reader and dequantiser."""
    reader = gguf.GGUFReader(path)

    def value(key: str) -> Any:
        return reader.fields[f"llama.{key}"].contents()

    config = LlamaConfig(
        vocab_size=value("vocab_size"),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        max_position_embeddings=value("context_length"),
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = tensors[names.get_name(name, try_suffixes=(".weight",)) or name]
            values = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
            if "q_proj" in name or "k_proj" in name:  # rope pairs lie side by side in the file
                half = config.hidden_size // config.num_attention_heads // 2
                pairs = values.view(-1, half, 2, config.hidden_size)
                values = pairs.transpose(1, 2).reshape(values.shape)
            parameter.copy_(values)
    return model


async def outputs_of_ranks(
    path: Path, prompts: list[list[int]], params: SamplingParams, *, num_pages: int, num_ranks: int
) -> list[list[int]]:
    """What a worker of so many ranks generates, each in a process of its own."""
    config = WorkerConfig(
        name="parity",
        role=Role.DECODE,
        model=str(path),
        served_model="parity",
        routers=(),
        dtype="float32",
        num_pages=num_pages,
        num_threads=torch.get_num_threads(),
        tensor_parallel_size=num_ranks,
    )
    async with follower_processes(config) as followers:
        runner = load_worker_engine(config, followers.join())
        return generate(runner, prompts, params, chunk_size=CHUNK_SIZE)


def compare(path: Path, *, num_prompts: int, max_tokens: int, num_ranks: int) -> Parity:
    prompts = make_prompts(path, num_prompts)
    num_pages = sum(len(prompt) for prompt in prompts) // 64 + 128
    params = SamplingParams(max_tokens=max_tokens)
    started = time.perf_counter()
    if num_ranks == 1:
        runner = load_engine(path, dtype="float32", num_pages=num_pages)
        outputs = generate(runner, prompts, params, chunk_size=CHUNK_SIZE)
    else:
        outputs = asyncio.run(
            outputs_of_ranks(path, prompts, params, num_pages=num_pages, num_ranks=num_ranks)
        )
    engine_seconds = time.perf_counter() - started

    model = load_reference(path)
    started = time.perf_counter()
    equal, margins = [], []
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + output[:-1]]), logits_to_keep=max_tokens).logits
        top = logits[0].topk(2, dim=-1)
        equal.append((top.indices[:, 0] == torch.tensor(output)).tolist())
        margins.append(float((top.values[:, 0] - top.values[:, 1]).min()))
    return Parity(
        num_ranks=num_ranks,
        num_prompts=num_prompts,
        max_tokens=max_tokens,
        prompt_tokens=sum(len(prompt) for prompt in prompts),
        output_tokens=sum(len(output) for output in outputs),
        equal_tokens=sum(sum(places) for places in equal),
        equal_prompts=sum(all(places) for places in equal),
        smallest_margin=min(margins),
        engine_seconds=round(engine_seconds, 2),
        reference_seconds=round(time.perf_counter() - started, 2),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="8 prompts of 16 output tokens")
    parser.add_argument("--ranks", type=int, default=1, help="of the engine; SmolLM2 allows 3")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    arguments = parser.parse_args()
    num_prompts, max_tokens = (8, 16) if arguments.quick else (32, 64)
    parity = compare(
        resolve_model(None),
        num_prompts=num_prompts,
        max_tokens=max_tokens,
        num_ranks=arguments.ranks,
    )
    print(
        f"{parity.equal_tokens} of {parity.output_tokens} greedy tokens and {parity.equal_prompts} "
        f"of {num_prompts} outputs equal those of transformers {parity.transformers}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(parity), indent=2) + "\n", encoding="utf-8")
    return 0 if parity.equal_tokens == parity.output_tokens else 1


if __name__ == "__main__":
    sys.exit(main())
