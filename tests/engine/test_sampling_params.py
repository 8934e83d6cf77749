"""Every field out of its range is refused by name."""

import math
from typing import Any

import pytest

from pagewire.engine.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("max_tokens", value) for value in (0, -1)),
        *(("min_tokens", value) for value in (-1, 17)),
        *(("temperature", value) for value in (-0.1, math.inf, math.nan)),
        *(("top_p", value) for value in (0.0, 1.1, math.nan)),
        ("top_k", -1),
        *(("min_p", value) for value in (-0.1, 1.1, math.nan)),
        *(("presence_penalty", value) for value in (-2.1, 2.1, math.nan)),
        *(("frequency_penalty", value) for value in (-2.1, 2.1, math.nan)),
        *(("repetition_penalty", value) for value in (0.0, -1.0, math.inf, math.nan)),
        *(("logit_bias", ((1, value),)) for value in (-101.0, 101.0, math.nan)),
        *(("seed", value) for value in (-1, 2**64)),
        *(("num_logprobs", value) for value in (-1, 21)),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} "):
        SamplingParams(**{name: value})


def test_the_bounds_themselves_are_allowed() -> None:
    SamplingParams(
        max_tokens=5,
        min_tokens=5,
        top_p=1.0,
        min_p=1.0,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        logit_bias=((0, 100.0), (1, -100.0)),
        num_logprobs=20,
    )
