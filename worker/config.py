"""Everything that one worker process is started with."""

import json
from dataclasses import asdict, dataclass
from enum import StrEnum

from pagewire.engine.kv_cache_dtype import KVCacheDtype
from pagewire.engine.quantization import Quantization
from pagewire.kv_transfer.tls import TlsFiles
from pagewire.proto.page_hash import PageHasher


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
    host: str = "127.0.0.1"  # where the worker listens for routers
    transport: str = "auto"  # auto, shm, ucx, nccl, gloo or tcp
    kv_host: str | None = None  # where it listens for other workers, if not on `host`
    kv_tls: TlsFiles | None = None  # of the tcp transport; None: it does not encrypt
    insecure_kv: bool = False  # KV pages may cross the network in the clear
    dtype: str = "bfloat16"
    quantization: Quantization = Quantization.NONE
    kv_cache_dtype: KVCacheDtype = KVCacheDtype.AUTO
    device: str = "cpu"  # or cuda
    # Of those that its launcher may use, the first of its own, one a rank; None: on a CPU
    gpu: int | None = None
    tensor_parallel_size: int = 1  # ranks that compute the model together, a process each
    page_size: int = 64  # as the dtype of the KV cache, it may differ between the roles
    num_pages: int | None = None  # None: sized from the memory that is free
    max_model_len: int | None = None  # None: what the model says
    num_threads: int = 1  # compute threads of a step, all ranks; with a core board, at most
    core_board: str | None = None  # the file of `worker.core_board`; None: num_threads always
    core_board_slot: int = 0
    kernels: str = "auto"  # auto, native, torch or triton
    deterministic: bool = False  # logits are the same to the bit in every batch
    max_batch_tokens: int = 512  # prompt tokens that one prefill step runs
    lease_s: float = 10.0  # how long a prompt, or the room for it, outlives a failed hand-off
    max_parked_share: float = 0.5  # of a prefill worker's pages, beyond which it starts no prompt
    max_waiting_handoffs: int = 16  # that wait for room at a decode worker
    max_batch_size: int = 32  # sequences that one decode step runs
    overlap_steps: bool | None = (
        None  # launch a decode step before the last one ends; None: on GPUs
    )
    max_draft_tokens: int = 0  # that a decode step checks beside its rows; 0: no speculation
    draft_model: str | None = None  # as `model`; None: drafts are looked up in the text
    draft_quantization: Quantization = Quantization.NONE
    stream_layers: bool = True  # the KV of a prompt's last chunk leaves while its step runs
    slot_bytes: int = 4 << 20  # a staging slot, and so the largest frame
    num_slots: int = 16  # staging slots of a decode worker, and of a prefill worker on a GPU
    prefix_cache_secret: str | None = None  # hexadecimal, the same for all; None: nothing is cached

    @property
    def page_hasher(self) -> PageHasher | None:
        """What names pages for the prefix cache, when there is one."""
        if self.prefix_cache_secret is None:
            return None
        secret = bytes.fromhex(self.prefix_cache_secret)
        return PageHasher(secret=secret, page_size=self.page_size)

    @property
    def overlaps_steps(self) -> bool:
        """Whether decode steps are launched one ahead, if the model can."""
        return self.device != "cpu" if self.overlap_steps is None else self.overlap_steps

    @property
    def threads_per_rank(self) -> int:
        return max(1, self.num_threads // self.tensor_parallel_size)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "WorkerConfig":
        """Raises TypeError for an unknown key, ValueError for an unknown role, quantization or
        dtype of the KV cache.
        """
        values = json.loads(text)
        values["role"] = Role(values["role"])
        for name in ("quantization", "draft_quantization"):
            values[name] = Quantization(values[name])
        values["kv_cache_dtype"] = KVCacheDtype(values["kv_cache_dtype"])
        if values["kv_tls"] is not None:
            values["kv_tls"] = TlsFiles(**values["kv_tls"])
        values["routers"] = tuple(values["routers"])
        return cls(**values)
