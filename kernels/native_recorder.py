"""Records the C++ calls of a step, to run them again without Python in between.

What a CUDA graph does on a GPU: addresses and shapes are those of the recording, and whoever
replays it puts new inputs where the old ones were.
"""

import ctypes
import math
import struct
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from pagewire.kernels.native_attention import NativeAttentionPlan
from pagewire.kernels.native_library import SIGNATURES, NativeFunctions
from pagewire.kernels.ops import AttentionBatch, NotRecordableError

_WORDS = 24  # arguments of a call, at most: kWords in replay.cpp
_LEAST_BYTES = 64  # of a block: a line of the cache


class _Call(ctypes.Structure):
    """struct Call of replay.cpp."""

    _fields_ = (("run", ctypes.c_void_p), ("words", ctypes.c_int64 * _WORDS))


class PlanAttention(Protocol):
    """`Ops.plan_attention` in C++."""

    def __call__(
        self, batch: AttentionBatch, *, scale: float, window: int | None
    ) -> NativeAttentionPlan: ...


class NativeRecorder:
    """Implements `pagewire.kernels.ops.StepRecorder`."""

    buckets = ()

    def __init__(self, functions: NativeFunctions, plan_attention: PlanAttention) -> None:
        self._functions = functions
        self._plan_attention = plan_attention
        self._arena = _Arena()
        self._plans: dict[tuple[float, int | None], NativeAttentionPlan] = {}  # by scale and window
        self._runs = {name: _run_of(functions, name) for name in SIGNATURES}

    @property
    def num_arena_bytes(self) -> int:
        """Memory that recordings share, between their runs."""
        return self._arena.num_free_bytes

    def plan_attention(
        self, batch: AttentionBatch, *, scale: float, window: int | None
    ) -> NativeAttentionPlan:
        """One for all recordings, renewed: no two of them run at a time."""
        plan = self._plans.get((scale, window))
        if plan is None:
            plan = self._plan_attention(batch, scale=scale, window=window)
            self._plans[scale, window] = plan
        elif plan.has_run:
            plan.renew(batch)
        return plan

    def record(self, step: Callable[[], Tensor]) -> "NativeRecording":
        calls: list[_Call] = []
        with (
            self._functions.recorded(lambda name, words: calls.append(self._call(name, words))),
            _OnlyOurs(self._arena),
        ):
            output = step()
        return NativeRecording(
            functions=self._functions,
            calls=(_Call * len(calls))(*calls),
            output=_borrowed(output),
            memory=(step, self._arena),
        )

    def _call(self, name: str, arguments: Sequence[object]) -> _Call:
        run = self._runs[name]
        if run is None:
            raise NotRecordableError(name)
        return _Call(run, (ctypes.c_int64 * _WORDS)(*map(_word, arguments)))


def _run_of(functions: NativeFunctions, name: str) -> int | None:
    """What a recorded call of a function has to run; None where it cannot be recorded."""
    run = ctypes.c_void_p()
    functions.recordable(name.encode(), ctypes.addressof(run))
    return run.value


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NativeRecording:
    """Implements `pagewire.kernels.ops.Recording`."""

    functions: NativeFunctions
    calls: "ctypes.Array[_Call]"
    output: Tensor
    memory: tuple[object, ...]  # whatever holds the tensors whose addresses were recorded

    def replay(self) -> Tensor:
        self.functions.replay(ctypes.addressof(self.calls), len(self.calls))
        return self.output


def _word(argument: object) -> int:
    """An argument as replay.cpp reads it."""
    match argument:
        case None:
            return 0
        case float():
            word: int = struct.unpack("<i", struct.pack("<f", argument))[0]
            return word
        case int():
            return int(argument)
    raise TypeError(f"a {type(argument).__name__} is no argument of a recorded call")


class _OnlyOurs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets a step allocate from an arena and look at tensors from other sides.

    Whatever else torch computes would be missing from a replay: it raises NotRecordableError.
    """

    def __init__(self, arena: "_Arena") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._arena = arena

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """To exclude this from compilation, torch would import its compiler: seconds."""
        return False

    def __torch_dispatch__(
        self,
        func: OpOverload[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.empty.memory_format:
            return self._arena.empty(args[0], kwargs.get("dtype") or torch.get_default_dtype())
        if func.is_view:
            return func(*args, **kwargs)
        raise NotRecordableError(str(func))


class _Arena:
    """Memory for what recorded steps compute in between, and for what comes of them.

    A tensor's memory is used again, by the same recording and by others, once the tensor and all
    views of it are gone. It never goes back to torch, so that recorded addresses stay valid.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)  # by size in bytes

    @property
    def num_free_bytes(self) -> int:
        return sum(size * len(blocks) for size, blocks in self._free.items())

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        # Of few sizes, so that steps of other numbers of tokens find blocks to share.
        size = max(_LEAST_BYTES, 1 << (num_bytes - 1).bit_length())
        free = self._free[size]
        memory = free.pop() if free else torch.empty(size, dtype=torch.uint8)
        # The storage of the tensor keeps this buffer, and so does every view of it.
        buffer = (ctypes.c_char * size).from_address(memory.data_ptr())
        weakref.finalize(buffer, free.append, memory)
        return torch.frombuffer(buffer, dtype=dtype, count=math.prod(shape)).view(tuple(shape))


def _borrowed(tensor: Tensor) -> Tensor:
    """The same memory, which others may use once `tensor` is gone."""
    buffer = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return torch.frombuffer(buffer, dtype=tensor.dtype).view(tensor.shape)
