"""How the matrices of a model are stored. Imports no torch: the command line knows the names."""

from enum import StrEnum


class Quantization(StrEnum):
    """What `--quantization` takes. Activations have 8 bits too, but in NONE and W4A16."""

    NONE = "none"  # in the model's dtype
    INT8 = "int8"  # 8 bits, a scale and a minimum per group of 32 inputs; on a GPU as FP8
    INT4 = "int4"  # the 4 bits of a file as they are; its other quantised matrices in 8 bits
    FP8 = "fp8"  # e4m3, a scale per output; those of the file, or made when the model is loaded
    W4A16 = "w4a16"  # 4 bits, a scale and a zero per group of 128 inputs; likewise
