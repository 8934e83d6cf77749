"""Costs of drafts that follow from two numbers, instead of being measured."""

from pagewire.engine.draft_length import DraftCosts


def linear_costs(per_token: float, *, per_draft: float = 0.0) -> DraftCosts:
    """`per_token` is what one more token costs, of a step's constant part."""
    steps = tuple((size, 1.0 + per_token * size) for size in (1, 64))
    return DraftCosts(steps=steps, per_draft=per_draft)
