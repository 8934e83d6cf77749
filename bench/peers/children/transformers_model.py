"""transformers' `generate` in this process: requests that arrive together are one batch.

The batch runs until its longest output is complete; who arrives meanwhile waits.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from peers.children.lines import LineRequest, Lines


class StepReporter(BaseStreamer):
    """Reports each step of a batch; `generate` calls it with the prompts first."""

    def __init__(self, lines: Lines, burst: Sequence[LineRequest]) -> None:
        self._lines = lines
        self._rest = {request.id: request.max_tokens for request in burst}
        self._has_prompts = False

    def put(self, value: Any) -> None:
        if not self._has_prompts:
            self._has_prompts = True
            return
        running = dict.fromkeys(self._rest, 1)
        self._rest = {key: rest - 1 for key, rest in self._rest.items()}
        done = [key for key, rest in self._rest.items() if rest == 0]
        for key in done:
            del self._rest[key]
        self._lines.step(running, done)

    def end(self) -> None:
        """All requests have been reported as complete."""


def pad(burst: Sequence[LineRequest]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts and mask, each [requests, longest prompt], padded at the left."""
    longest = max(len(request.prompt) for request in burst)
    missing = [longest - len(request.prompt) for request in burst]
    ids = [[0] * count + request.prompt for count, request in zip(missing, burst, strict=True)]
    mask = [[0] * count + [1] * (longest - count) for count in missing]
    return torch.tensor(ids), torch.tensor(mask)


def main() -> None:
    lines = Lines()
    torch.set_num_threads(int(sys.argv[2]))
    # Any: its published types do not let the class call its own `generate`.
    model: Any = LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None  # outputs have the length that was asked for
    model.generation_config.pad_token_id = 0
    lines.ready()
    while burst := lines.next_burst():
        input_ids, mask = pad(burst)
        model.generate(
            input_ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max(request.max_tokens for request in burst),
            streamer=StepReporter(lines, burst),
        )


if __name__ == "__main__":
    main()
