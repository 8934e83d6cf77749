from typing import Any

import pytest

from pagewire.router.settings import RouterSettings


@pytest.mark.parametrize(
    "fields",
    [
        {"served_model": ""},
        {"max_model_len": 0},
        {"max_body_bytes": -1},
        {"keep_alive_s": 0},
        {"request_timeout_s": 0.0},
    ],
)
def test_settings_that_cannot_work_name_their_field(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(ValueError, match=name):
        RouterSettings(**{"served_model": "m", "max_model_len": 10, **fields})


def test_the_names_of_the_model() -> None:
    settings = RouterSettings(served_model="m", max_model_len=10, aliases=("a", "b"))
    assert all(settings.serves(name) for name in ("m", "a", "b"))
    assert not settings.serves("default")
