"""What holds for all tests."""

import os

from hypothesis import settings

# Before torch is loaded: the tests share the cores with the workers that some of them start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before triton is loaded, which decides then whether kernels are compiled: tests run without a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

# How long an example takes says nothing on a shared machine.
settings.register_profile("pagewire", deadline=None)
settings.load_profile("pagewire")
