"""Makes calls between functions of a kernel cheap in Triton's interpreter.

It prepares the language anew for each of them, which takes longer than most kernels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import triton.language as tl
from triton.runtime import interpreter


@contextmanager
def cheap_calls() -> Iterator[None]:
    """Until it is left, called functions find the language prepared, for Triton's own ones here.

    For those of our kernels the launch does that.
    """
    prepared = interpreter._patch_lang(tl.sum.fn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", _call)
        yield
    prepared.restore()


def _call(self: Any, *arguments: Any, **named: Any) -> Any:
    return self.rewrite()(*arguments, **named)
