"""Whether a draft model means the same tokens as the model that it drafts for."""

from pathlib import Path

from pagewire.cluster.api import tokenizer_of
from pagewire.cluster.errors import StartError
from pagewire.router.tokenizer import Tokenizer


def require_same_tokens(tokenizer: Tokenizer, draft_model: Path) -> None:
    """Raise StartError unless the tokenizer of `draft_model` has the vocabulary of `tokenizer`."""
    expected = tokenizer.backend.get_vocab()
    found = tokenizer_of(draft_model).backend.get_vocab()
    if len(found) != len(expected):
        raise StartError(
            f"draft_model {draft_model.name} has {len(found)} tokens, the model {len(expected)}; "
            "choose a smaller model of the same family"
        )
    for token, token_id in expected.items():
        if found.get(token) != token_id:
            raise StartError(
                f"draft_model {draft_model.name} has another vocabulary than the model: token "
                f"{token_id} differs; choose a smaller model of the same family"
            )
