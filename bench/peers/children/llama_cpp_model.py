"""llama.cpp in this process, through llama_cpp_python: one sequence at a time."""

import itertools
import sys

from llama_cpp import Llama

from peers.children.lines import Lines

CONTEXT = 2048


def main() -> None:
    lines = Lines()
    threads = int(sys.argv[2])
    model = Llama(
        sys.argv[1], n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    lines.ready()
    while request := lines.next():
        # It goes on past end-of-sequence tokens, and keeps the KV of a prompt that begins alike.
        tokens = model.generate(request.prompt, temp=0.0)
        for number, _ in enumerate(itertools.islice(tokens, request.max_tokens), start=1):
            is_last = number == request.max_tokens
            lines.step({request.id: 1}, [request.id] if is_last else [])


if __name__ == "__main__":
    main()
