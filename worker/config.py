"""Everything that one worker process is started with."""

import json
from dataclasses import asdict, dataclass
from enum import StrEnum


class Role(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """The start parameters of one worker; travels to its process as JSON."""

    name: str  # prefill-0, decode-1, …
    role: Role
    model: str  # a GGUF file or a safetensors directory on this machine
    served_model: str  # the name that clients use
    routers: tuple[str, ...]  # host:port of each router's Membership service
    host: str = "127.0.0.1"  # where the worker listens for routers and for other workers
    transport: str = "auto"  # auto, ucx or tcp
    dtype: str = "bfloat16"
    device: str = "cpu"
    page_size: int = 64
    num_pages: int | None = None  # None: sized from the memory that is free
    max_model_len: int | None = None  # None: what the model says
    num_threads: int = 1
    kernels: str = "auto"  # auto, native or torch
    max_batch_tokens: int = 512  # prompt tokens that one prefill step runs
    max_batch_size: int = 32  # sequences that one decode step runs
    slot_bytes: int = 4 << 20  # a staging slot, and so the largest frame
    num_slots: int = 16  # staging slots of a decode worker

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "WorkerConfig":
        """Raises TypeError for an unknown key, ValueError for an unknown role."""
        values = json.loads(text)
        values["role"] = Role(values["role"])
        values["routers"] = tuple(values["routers"])
        return cls(**values)
