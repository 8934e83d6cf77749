"""Typed access to the values of a model's configuration. Knows no torch."""

from collections.abc import Mapping
from typing import Any

from pagewire.engine.errors import ModelError


class Fields:
    """Values that come from a file. Raises ModelError when one is missing or of another type."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ModelError(f"{self._prefix}{name} is {value!r}; it must be an integer")
        return value

    def optional_integer(self, name: str) -> int | None:
        return None if self._values.get(self._prefix + name) is None else self.integer(name)

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ModelError(f"{self._prefix}{name} is {value!r}; it must be a number")
        return float(value)

    def flag(self, name: str, default: bool | None = None) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise ModelError(f"{self._prefix}{name} is {value!r}; it must be true or false")
        return value

    def string(self, name: str, default: str) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise ModelError(f"{self._prefix}{name} is {value!r}; it must be a string")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """Of a list, which may be missing."""
        values = self._get(name, [])
        if not isinstance(values, list) or not all(type(value) is int for value in values):
            raise ModelError(f"{self._prefix}{name} is {values!r}; it must be a list of integers")
        return tuple(values)

    def mapping(self, name: str) -> Mapping[str, Any]:
        """A JSON object, which may be missing."""
        values = self._get(name, {})
        if not isinstance(values, Mapping):
            raise ModelError(f"{self._prefix}{name} is {values!r}; it must be a JSON object")
        return values

    def _get(self, name: str, default: object) -> object:
        value = self._values.get(self._prefix + name)
        value = default if value is None else value
        if value is None:
            raise ModelError(f"the model's configuration has no {self._prefix}{name}")
        return value
