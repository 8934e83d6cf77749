"""What a draft model has KV of is what is right, and it reads everything exactly once more."""

import random

from hypothesis import given
from hypothesis import strategies as st

from pagewire.engine.batch import DraftWork
from pagewire.engine.model_drafter import ModelDrafter


def drafter(num_tokens: int, max_model_len: int = 1000) -> ModelDrafter:
    return ModelDrafter(range(num_tokens), max_model_len=max_model_len)


def test_a_prompt_is_read_in_parts_and_then_drafted_for() -> None:
    model = drafter(5)
    plans = []
    for _ in range(3):
        work = model.plan(4, num_left=100, max_unseen=2)
        assert work is not None
        plans.append((list(work.token_ids), work.start, work.num_drafts))
        model.on_step(work, 0)
    assert plans == [([0, 1], 0, 0), ([2, 3], 2, 0), ([4], 4, 4)]


def test_after_right_drafts_only_the_newest_tokens_are_unseen() -> None:
    for num_accepted, unseen in ((0, [90]), (2, [90]), (3, [90]), (4, [4, 90])):
        model = drafter(3)
        work = model.plan(4, num_left=100, max_unseen=8)
        assert work is not None
        model.on_step(work, num_accepted)
        model.extend([*[1, 2, 3, 4][:num_accepted], 90])
        following = model.plan(4, num_left=100, max_unseen=8)
        assert following is not None
        assert list(following.token_ids) == unseen
        assert following.start == 3 + num_accepted + 1 - len(unseen)


def test_drafts_stay_inside_the_context_of_the_draft_model() -> None:
    for max_model_len, num_drafts in ((13, 4), (12, 3), (10, 1)):
        work = drafter(10, max_model_len).plan(4, num_left=100, max_unseen=16)
        assert work is not None and work.num_drafts == num_drafts
    assert drafter(10, 9).plan(4, num_left=100, max_unseen=16) is None


def test_a_long_prompt_is_not_read_for_a_short_output() -> None:
    assert drafter(500).plan(4, num_left=20, max_unseen=64) is None
    assert drafter(500).plan(4, num_left=200, max_unseen=64) is not None


def test_nothing_is_read_where_nothing_is_drafted() -> None:
    assert drafter(5).plan(0, num_left=100, max_unseen=64) is None


@given(st.integers(1, 40), st.integers(2, 9), st.integers(1, 6), st.integers(0, 99))
def test_the_kv_is_always_that_of_the_sequence(
    num_tokens: int, max_unseen: int, num_drafts: int, seed: int
) -> None:
    """A model of the draft model: it notes which token wrote each position last."""
    source = random.Random(seed)
    tokens = [source.randrange(3) for _ in range(num_tokens)]
    model = ModelDrafter(tokens, max_model_len=1000)
    kv: dict[int, int] = {}
    for _ in range(30):
        work = model.plan(num_drafts, num_left=1000, max_unseen=max_unseen)
        assert work is not None
        drafts = _draft(work, kv, source)
        assert [kv[position] for position in range(work.start)] == tokens[: work.start]
        sampled = [source.randrange(3) for _ in range(len(drafts) + 1)]
        accepted = 0
        while accepted < len(drafts) and drafts[accepted] == sampled[accepted]:
            accepted += 1
        model.on_step(work, accepted)
        model.extend(sampled[: accepted + 1])
        tokens += sampled[: accepted + 1]


def _draft(work: DraftWork, kv: dict[int, int], source: random.Random) -> list[int]:
    """Do `work` as DraftModel does: the KV of the last draft is not written."""
    drafts = [source.randrange(3) for _ in range(work.num_drafts)]
    for offset, token in enumerate([*work.token_ids, *drafts[:-1]]):
        kv[work.start + offset] = token
    return drafts
