"""Greedy tokens of the engine against transformers, on the default model in float32.

transformers reads the same GGUF file with its own loader and runs each prompt with the engine's
output behind it. That its most likely token is the engine's at every place means, by induction,
that it would have generated the same.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from pagewire.engine.aggregated import generate
from pagewire.engine.batch import SamplingParams
from pagewire.engine.load import load_engine
from pagewire.engine.loading.resolve import resolve_model

TEXT = Path(__file__).parents[1] / "LICENSE"  # English of the right length that is always here
LENGTHS = (1, 2, 16, 63, 64, 65, 200, 1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """What was compared and how much of it agreed."""

    num_prompts: int
    max_tokens: int
    prompt_tokens: int
    output_tokens: int
    equal_tokens: int
    equal_prompts: int
    smallest_margin: float  # between the two largest logits, over all places
    engine_seconds: float
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


def compare(path: Path, *, num_prompts: int, max_tokens: int) -> Parity:
    prompts = make_prompts(path, num_prompts)
    runner = load_engine(path, dtype="float32", num_pages=sum(len(p) for p in prompts) // 64 + 128)
    started = time.perf_counter()
    outputs = generate(runner, prompts, SamplingParams(max_tokens=max_tokens), chunk_size=96)
    engine_seconds = time.perf_counter() - started

    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    started = time.perf_counter()
    equal, margins = [], []
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + output[:-1]]), logits_to_keep=max_tokens).logits
        top = logits[0].topk(2, dim=-1)
        equal.append((top.indices[:, 0] == torch.tensor(output)).tolist())
        margins.append(float((top.values[:, 0] - top.values[:, 1]).min()))
    return Parity(
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
    parser.add_argument("--json", type=Path, help="write the result to this file")
    arguments = parser.parse_args()
    num_prompts, max_tokens = (8, 16) if arguments.quick else (32, 64)
    parity = compare(resolve_model(None), num_prompts=num_prompts, max_tokens=max_tokens)
    print(
        f"{parity.equal_tokens} of {parity.output_tokens} greedy tokens and {parity.equal_prompts} "
        f"of {num_prompts} outputs equal those of transformers {parity.transformers}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(parity), indent=2) + "\n", encoding="utf-8")
    return 0 if parity.equal_tokens == parity.output_tokens else 1


if __name__ == "__main__":
    sys.exit(main())
