"""Pagewire's engine in this process: requests that arrive together are one batch."""

import sys
from pathlib import Path

from pagewire.engine.aggregated import generate
from pagewire.engine.load import load_engine
from pagewire.engine.precision import default_dtype
from pagewire.engine.sampling_params import SamplingParams
from peers.children.lines import Lines

NUM_PAGES = 512


def main() -> None:
    lines = Lines()
    model, threads = Path(sys.argv[1]), int(sys.argv[2])
    runner = load_engine(
        model, dtype=default_dtype("cpu"), num_pages=NUM_PAGES, num_threads=threads
    )
    lines.ready()
    while burst := lines.next_burst():
        sampling = SamplingParams(max_tokens=max(request.max_tokens for request in burst))
        generate(runner, [request.prompt for request in burst], sampling)
        lines.step(
            {request.id: request.max_tokens for request in burst},
            [request.id for request in burst],
        )


if __name__ == "__main__":
    main()
