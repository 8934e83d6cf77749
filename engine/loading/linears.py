"""From the tensors of a checkpoint to matrices that multiply: in floating point, 8 bits or 4.

Every tensor is converted straight into its place in a fused matrix, one after another, so that
loading takes little more memory than the model.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pagewire.engine.emulation import no_kernels
from pagewire.engine.errors import KernelError, ModelError
from pagewire.engine.loading.checkpoint import Checkpoint, Storage
from pagewire.engine.loading.quantized_matrices import NUMBERS, QuantizedMatrices
from pagewire.engine.quantization import Quantization
from pagewire.kernels.experts import Experts
from pagewire.kernels.float_linear import choose_float_kernel, float_linear
from pagewire.kernels.int4_linear import concatenated, int4_linear
from pagewire.kernels.int8_linear import int8_linear
from pagewire.kernels.linear import DenseLinear
from pagewire.kernels.ops import Linear
from pagewire.kernels.select import SelectedOps
from pagewire.kernels.sorted_experts import SortedExperts


class LinearLoader:
    """Reads tensors and matrices of one checkpoint for one device, dtype and quantization.

    Raises ModelError or KernelError for a quantization that the device or the selected operations
    do not have.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        device: str,
        quantization: Quantization,
        selected: SelectedOps,
    ) -> None:
        self._quantized = _quantized_matrices(checkpoint, quantization, selected, dtype)
        if self._quantized is None:
            _check(quantization, device, selected)
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._quantization = quantization
        self._selected = selected
        self._library = selected.library
        self._float_kernel = choose_float_kernel(selected, dtype, device)
        self._num_int4 = 0

    @property
    def explanation(self) -> str:
        """How the matrices are stored and what multiplies them, for people."""
        if self._quantization is Quantization.NONE:
            return f"{str(self._dtype).removeprefix('torch.')} by {self._float_kernel}"
        emulated = ", emulated" if self._quantized and self._quantized.emulated else ""
        return f"{self._quantization} by {self._selected.explanation}{emulated}"

    def tensor(self, name: str, *shape: int) -> Tensor:
        """One tensor in the loader's dtype."""
        tensor = self._empty(*shape)
        self._checkpoint.read(name, tensor)
        return tensor

    def linear(self, rows: Mapping[str, int], in_features: int, *, bias: bool = False) -> Linear:
        """The modules of `rows`, each with so many outputs, as one matrix."""
        biases = self._fused(rows, "bias") if bias else None
        if self._quantized is not None:
            return self._quantized.linear(
                rows, in_features, biases, lambda: self._fused(rows, "weight", in_features)
            )
        storage = self._storage(rows)
        if storage is Storage.INT4:
            return self._int4(rows, biases, self._dtype)
        weight = self._fused(rows, "weight", in_features)
        return self._from_weight(weight, biases, storage, self._dtype)

    def lm_head(self, module: str, vocab_size: int, hidden_size: int) -> Linear:
        """An LM head of its own. Gives float32, as samplers want it, where its kernel can.

        For a GPU it is quantised only if the files have it so.
        """
        if self._quantized is not None:
            stored = self._quantized.stored_linear(module, vocab_size, hidden_size, torch.float32)
            if stored is not None:
                return stored
        storage = self._storage([module])
        if storage is Storage.INT4:
            return self._int4([module], None, torch.float32)
        weight = self._fused({module: vocab_size}, "weight", hidden_size)
        return self._from_weight(weight, None, storage, torch.float32)

    def router(self, module: str, num_experts: int, hidden_size: int) -> Linear:
        """What scores experts: in floating point whatever the quantization, whose rounding could
        change the choice. Gives float32 where its kernel can.
        """
        weight = self._fused({module: num_experts}, "weight", hidden_size)
        return self._from_weight(weight, None, Storage.FLOAT, torch.float32)

    def tied_lm_head(self, module: str, embedding: Tensor) -> Linear:
        """The LM head that is the embedding, as `lm_head` makes it.

        Plain torch and Triton multiply the embedding itself; every other kernel has a copy of its
        own, since rows of the embedding have to lie as they are looked up.
        """
        storage = self._storage([module])
        if storage is Storage.INT4:
            return self._int4([module], None, torch.float32)
        return self._from_weight(embedding, None, storage, torch.float32)

    def experts(self, gate_up: Sequence[Linear], down: Sequence[Linear]) -> Experts:
        """All experts of a layer, of what `linear` made; in one product where there is one."""
        together = self._quantized.experts(gate_up, down) if self._quantized else None
        if together is not None:
            return together
        group_experts = self._selected.group_experts
        dense = [each.weight for each in (*gate_up, *down) if isinstance(each, DenseLinear)]
        if group_experts is not None and len(dense) == 2 * len(down):
            return group_experts(dense[: len(down)], dense[len(down) :])
        return SortedExperts(gate_up=tuple(gate_up), down=tuple(down), ops=self._selected.ops)

    def finish(self) -> None:
        """Once all matrices are made: say what became of those of the files.

        Raises ModelError when int4 was asked for and no matrix of the checkpoint has 4 bits.
        """
        if self._quantized is not None:
            self._quantized.log()
        if self._quantization is Quantization.INT4 and not self._num_int4:
            raise ModelError(
                "quantization int4 runs matrices that a file holds in 4 bits (GGUF's Q4_0 or Q4_1, "
                "GPTQ, AWQ, compressed-tensors), and this model has none; choose such a file, or "
                "quantization int8"
            )

    def _storage(self, modules: Iterable[str]) -> Storage:
        """How the matrix of these modules is kept in memory."""
        if self._quantization is Quantization.NONE or self._quantized is not None:
            return Storage.FLOAT
        if self._quantization is Quantization.INT8:
            return Storage.QUANTIZED
        kinds = {self._checkpoint.storage(f"{module}.weight") for module in modules}
        if len(kinds) == 1:
            return kinds.pop()
        return Storage.FLOAT if Storage.FLOAT in kinds else Storage.QUANTIZED

    def _int4(self, modules: Iterable[str], bias: Tensor | None, dtype: torch.dtype) -> Linear:
        assert self._library is not None  # int4 has one: see _check
        self._num_int4 += 1
        parts = [self._checkpoint.read_int4(f"{module}.weight") for module in modules]
        return int4_linear(concatenated(parts), bias, dtype=dtype, library=self._library)

    def _from_weight(
        self, weight: Tensor, bias: Tensor | None, storage: Storage, out_dtype: torch.dtype
    ) -> Linear:
        """A matrix of 8 bits or in floating point; weight: [out_features, in_features]."""
        if storage is not Storage.FLOAT:
            return int8_linear(weight, bias, dtype=out_dtype, library=self._library)
        return float_linear(
            weight, bias, kernel=self._float_kernel, library=self._library, out_dtype=out_dtype
        )

    def _fused(self, rows: Mapping[str, int], kind: str, *columns: int) -> Tensor:
        """The tensors of `rows` below one another: [sum of rows, *columns]."""
        fused = self._empty(sum(rows.values()), *columns)
        for module, into in zip(rows, torch.split(fused, list(rows.values())), strict=True):
            self._checkpoint.read(f"{module}.{kind}", into)
        return fused

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)


def _quantized_matrices(
    checkpoint: Checkpoint, quantization: Quantization, selected: SelectedOps, dtype: torch.dtype
) -> QuantizedMatrices | None:
    """What makes matrices of that quantization in the forms of a GPU, if anything here does."""
    linears, numbers = selected.quantized_linears, NUMBERS.get(quantization)
    if linears is None or numbers is None or numbers not in linears.dtypes:
        return None
    if checkpoint.config.mixture is not None and numbers not in linears.expert_dtypes:
        choices = [name for name, dtype in NUMBERS.items() if dtype in linears.expert_dtypes]
        raise KernelError(
            f"quantization {quantization} has no kernels for mixtures of experts by "
            f"{selected.explanation}; choose {' or '.join((*choices, 'none'))}"
        )
    return QuantizedMatrices(checkpoint, linears, numbers, dtype)


def _check(quantization: Quantization, device: str, selected: SelectedOps) -> None:
    """Raises ModelError or KernelError for a quantization that has no form on this device."""
    if quantization is Quantization.NONE:
        return
    if device != "cpu" or quantization not in (Quantization.INT8, Quantization.INT4):
        dtypes = selected.quantized_linears.dtypes if selected.quantized_linears else ()
        choices = [str(name) for name, numbers in NUMBERS.items() if numbers in dtypes]
        instead = " or ".join((*choices, "none"))
        raise no_kernels(f"quantization {quantization}", device, instead=instead)
    if quantization is Quantization.INT4 and selected.library is None:
        raise ModelError(
            f"quantization int4 needs the C++ kernels, and this runs {selected.explanation}; "
            f"{selected.remedy or 'choose kernels auto'}, or choose quantization int8"
        )
