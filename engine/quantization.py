"""How the matrices of a model are stored. Imports no torch: the command line knows the names."""

from enum import StrEnum


class Quantization(StrEnum):
    """What `--quantization` takes. Activations of quantised matrices have 8 bits."""

    NONE = "none"  # in the model's dtype
    INT8 = "int8"  # 8 bits, a scale and a minimum per group of 32 inputs
    INT4 = "int4"  # the 4 bits of a file as they are; its other quantised matrices in 8 bits
