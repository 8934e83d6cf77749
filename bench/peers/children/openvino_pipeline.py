"""OpenVINO GenAI's ContinuousBatchingPipeline in this process."""

import sys
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

from peers.children.lines import LineRequest, Lines

CACHE_GB = 2


def load(model: str, threads: int) -> Any:
    """The pipeline, with prefix caching as the other servers have it."""
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GB
    scheduler.enable_prefix_caching = True
    properties = {"INFERENCE_NUM_THREADS": threads}
    return genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)


def add(pipeline: Any, request: LineRequest) -> Any:
    """Hand a request over; returns its handle."""
    config = genai.GenerationConfig()
    config.max_new_tokens = request.max_tokens
    config.ignore_eos = True
    config.do_sample = False
    ids = ov.Tensor(np.array([request.prompt], dtype=np.int64))  # [1, tokens]
    return pipeline.add_request(request.id, ids, config)


def read_step(handles: dict[int, Any]) -> tuple[dict[int, int], list[int]]:
    """Tokens that a step brought, and the requests that it ended; these leave `handles`."""
    tokens: dict[int, int] = {}
    done: list[int] = []
    for request_id, handle in list(handles.items()):
        while handle.can_read():
            for output in handle.read().values():
                tokens[request_id] = tokens.get(request_id, 0) + len(output.generated_ids)
        if handle.get_status() != genai.GenerationStatus.RUNNING:
            done.append(request_id)
            del handles[request_id]
    return tokens, done


def main() -> None:
    lines = Lines()
    pipeline = load(sys.argv[1], int(sys.argv[2]))
    handles: dict[int, Any] = {}
    lines.ready()
    while True:
        arrived = lines.poll()
        if not handles and not arrived:
            if (request := lines.next()) is None:
                return
            arrived = [request]
        handles |= {request.id: add(pipeline, request) for request in arrived}
        pipeline.step()
        lines.step(*read_step(handles))


if __name__ == "__main__":
    main()
