"""What a simulation raises when something is not as it must be."""


class InvariantViolation(AssertionError):
    """A promise was broken; the text says by whom."""


def require(condition: bool, message: str) -> None:
    """Raise InvariantViolation with `message` unless `condition` holds."""
    if not condition:
        raise InvariantViolation(message)
