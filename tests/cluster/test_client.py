"""The chat client against a server that answers from a script."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pagewire.cluster.chat import Chat
from pagewire.cluster.client import AnswerStats, stream_chat
from pagewire.cluster.errors import RequestError


def event(body: object) -> str:
    return f"data: {json.dumps(body)}\n\n"


def delta(**content: str) -> str:
    return event({"choices": [{"index": 0, "delta": content}], "usage": None})


USAGE = event({"choices": [], "usage": {"completion_tokens": 3}})
ANSWER = (
    delta(role="assistant")
    + ": keep-alive\n\n"
    + delta(content="Par")
    + delta(content="is")
    + USAGE
    + "data: [DONE]\n\n"
)


class Script:
    """What the server says, and what it was asked."""

    def __init__(self, text: str, status: int = 200) -> None:
        self.text = text
        self.status = status
        self.requests: list[dict[str, object]] = []
        self.url = ""


@contextmanager
def serving(script: Script) -> Iterator[Script]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            script.requests.append(json.loads(self.rfile.read(length)))
            self.send_response(script.status)
            self.end_headers()
            self.wfile.write(script.text.encode())

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on standard error."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    script.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield script
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(script: Script) -> list[str | AnswerStats]:
    with serving(script):
        messages = [{"role": "user", "content": "Where?"}]
        return list(
            stream_chat(script.url, messages, model="default", max_tokens=None, temperature=0)
        )


def test_answer_comes_in_pieces_and_ends_with_its_statistics() -> None:
    *pieces, stats = ask(Script(ANSWER))
    assert pieces == ["Par", "is"]
    assert isinstance(stats, AnswerStats)
    assert stats.num_tokens == 3
    assert 0 <= stats.ttft_s <= stats.seconds


def test_rate_counts_what_follows_the_first_token() -> None:
    assert AnswerStats(ttft_s=1.0, num_tokens=11, seconds=3.0).tokens_per_s == 5.0
    assert AnswerStats(ttft_s=1.0, num_tokens=1, seconds=1.0).tokens_per_s == 0.0


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (Script('{"error": {"message": "the queue is full"}}', 503), "the queue is full"),
        (Script("<html>", 502), "502"),
        (Script(delta(content="Par") + event({"error": {"message": "lost"}})), "lost"),
        (Script(delta(content="Par")), "broke off"),
    ],
)
def test_what_goes_wrong_is_told(script: Script, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ask(script)


def test_nobody_listens() -> None:
    with serving(Script("")) as script:
        pass
    with pytest.raises(RequestError, match="pagewire serve"):
        next(stream_chat(script.url, [], model="default", max_tokens=None, temperature=0))


def test_conversation_remembers_answers(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Script(ANSWER)) as script:
        chat = Chat(url=script.url, model="m", system="Be brief.", max_tokens=9, temperature=0.5)
        chat.ask("Where?")
        chat.ask("Sure?")
    first, second = script.requests
    assert (first["model"], first["max_tokens"], first["temperature"]) == ("m", 9, 0.5)
    assert second["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "Paris"},
        {"role": "user", "content": "Sure?"},
    ]
    captured = capsys.readouterr()
    assert captured.out == "Paris\nParis\n"
    assert captured.err.count("TTFT") == 2


def test_failed_question_is_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Script("{}", 500)) as script:
        chat = Chat(url=script.url, model="m", system=None, max_tokens=None, temperature=0)
        with pytest.raises(RequestError):
            chat.ask("Lost?")
        script.text, script.status = ANSWER, 200
        chat.ask("Where?")
    assert script.requests[-1]["messages"] == [{"role": "user", "content": "Where?"}]
