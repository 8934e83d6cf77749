from typing import Any

import pytest

from pagewire.router.chat import ChatTemplate, ChatTemplateError
from pagewire.router.request import RequestFailed
from pagewire.router.token_bytes import byte_level_bytes
from pagewire.router.tokenizer import Tokenizer, TokenizerConfig

CONFIG = TokenizerConfig(
    token_bytes=byte_level_bytes,
    eos_token_ids=frozenset({2}),
    bos_token="<s>",
    eos_token="</s>",
    chat_template=None,
)
USER = [{"role": "user", "content": "hi"}]


def render(source: str, messages: list[dict[str, str]] | None = None) -> str:
    template = ChatTemplate(source, CONFIG, max_chars=10_000)
    return template.render(USER if messages is None else messages)


@pytest.mark.parametrize(
    "messages",
    [
        USER,
        [{"role": "system", "content": "Be brief."}, *USER],
        [
            *USER,
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "\u00e9 <b>"},
        ],
    ],
)
def test_renders_the_template_of_the_model(
    tokenizer: Tokenizer, messages: list[dict[str, str]]
) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    source = tokenizer.config.chat_template
    assert source is not None
    rendered: Any = render_jinja_template(
        conversations=[messages], chat_template=source, add_generation_prompt=True
    )
    template = ChatTemplate(source, tokenizer.config, max_chars=10_000)
    assert [template.render(messages)] == rendered[0]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s>hi</s>"),
        ("  {% if add_generation_prompt %}\nyes{% endif %}", "yes"),
        ("{{ {'a': '<\u00e9>'} | tojson }}", '{"a": "<\u00e9>"}'),
        ("{% for m in messages %}{% break %}{% endfor %}done", "done"),
        ("{{ 'tools' if tools else 'none' }}", "none"),
    ],
)
def test_speaks_the_dialect_of_published_templates(source: str, expected: str) -> None:
    assert render(source) == expected


def test_a_template_can_ask_for_the_date() -> None:
    assert len(render("{{ strftime_now('%Y-%m-%d') }}")) == len("2024-01-31")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ undefined.member }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[7].content }}",
        "{{ 1 / 0 }}",
        "{% include 'file' %}",
    ],
)
def test_what_a_template_must_not_do_is_refused(source: str) -> None:
    with pytest.raises(RequestFailed) as failure:
        rendered = render(source)
        assert not rendered  # an undefined value prints as nothing
        raise RequestFailed("", status=400, kind="", code="", param="messages")
    assert failure.value.status == 400
    assert failure.value.param == "messages"


def test_the_refusal_of_a_template_reaches_the_client() -> None:
    with pytest.raises(RequestFailed, match="roles must alternate") as failure:
        render("{{ raise_exception('roles must alternate' + 'x' * 1000) }}")
    assert len(failure.value.message) < 300


def test_the_output_is_limited() -> None:
    source = "{% for i in range(5000) %}{{ messages[0].content }}{% endfor %}"
    assert len(render(source)) == 10_000
    with pytest.raises(RequestFailed, match="longer than 10000"):
        render(source + "x")


def test_a_template_with_an_error_is_refused_at_the_start() -> None:
    with pytest.raises(ChatTemplateError, match="line 2"):
        ChatTemplate("\n{% if %}", CONFIG, max_chars=10)


def test_messages_are_not_changed() -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
    render("{% set x = messages[0].content %}{{ x }}", messages)
    assert messages == USER
