"""Rewards over HTTP, and every way a server can fail: an error that names the prompts in bounded time, never a score that nobody gave."""

import logging
import math
import time

import pytest

from megarl.errors import RewardError, SetupError
from megarl.rewards import remote
from megarl.rewards.remote import RemoteScorer
from megarl.rewards.token import read_token
from tests.unit.reward_samples import scorer_rows
from tests.unit.reward_server import answers_with, reply, reward_server, rewards

SHORT_S = 1.0  # the time limit of servers that never answer well


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(remote, "BACK_OFF_S", (0.02, 0.2))


def lengths(number, body, connection):
    connection.sendall(rewards(*[len(query) for query in body["query"]]))


def test_every_response_gets_its_own_score_whatever_the_batches_and_servers():
    responses = ["x" * i for i in range(37)]
    rows = scorer_rows(responses, [str(i) for i in range(37)])
    with reward_server(lengths) as one, reward_server(lengths) as two:
        scores = RemoteScorer([one.url, two.url], per_request=4, timeout_s=20).score(*rows)
    assert scores == [len(f"question {i}: ") + i for i in range(37)]
    assert len(one.bodies) + len(two.bodies) == 10 and one.bodies and two.bodies
    body = next(body for body in one.bodies + two.bodies if "5" in body["labels"])
    at = body["labels"].index("5")
    assert body["query"][at] == "question 5: xxxxx" and body["prompts"][at] == "question 5: "


def drips(number, body, connection):
    connection.sendall(reply(b"", length=1000))
    for _ in range(200):
        time.sleep(0.05)
        connection.sendall(b" ")


def drips_headers(number, body, connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    for index in range(80):
        time.sleep(0.05)
        connection.sendall(f"X-{index}: 1\r\n".encode())


def floods(number, body, connection):
    connection.sendall(reply(b"", length=1 << 30))
    for _ in range(64):
        connection.sendall(b" " * (1 << 20))


BROKEN = {  # server: what the message says; these are not asked again
    "wrong length": (answers_with(rewards(1.0)), "returned 1 scores for 2 completions (prompts 10, 11)"),
    "NaN": (answers_with(rewards(1.0, math.nan)), "gave nan to completion 0 of prompt 11"),
    "infinity": (answers_with(rewards(math.inf, 1.0)), "gave inf to completion 0 of prompt 10"),
    "text": (answers_with(rewards(1.0, "0.5")), "gave str '0.5' to completion 0 of prompt 11"),
    "null": (answers_with(rewards(1.0, None)), "gave NoneType 'None' to completion 0 of prompt 11"),
    "no list": (answers_with(reply(b'{"rewards": 1}')), "returned 1; expected a list of 2 numbers"),
    "no JSON": (answers_with(reply(b"<html>")), "replied b'<html>' for prompts 10, 11; expected JSON"),
    "no text": (answers_with(reply(b"\xff\xfe{")), "expected JSON"),
    "deep JSON": (answers_with(reply(b"[" * 100_000)), "expected JSON"),
    "no rewards": (answers_with(reply(b'{"score": [1, 2]}')), 'expected {"rewards": [...]}'),
    "empty": (answers_with(reply(b"")), "expected JSON"),
    "huge": (floods, "replied with more than 1048576 bytes"),
    "not found": (answers_with(reply(b"no such page", "404 Not Found")), "answered status 404 for prompts 10, 11: 'no such page'"),
    "forbidden": (answers_with(reply(b"", "401 Unauthorized")), "expected the token in token_file or MEGARL_REWARD_TOKEN"),
    "redirect": (
        answers_with(reply(b"", "307 Temporary Redirect", "Location: http://127.0.0.1:1/\r\n")),
        "answered status 307 for prompts 10, 11: ''; redirects are not followed",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_reply_is_an_error_at_once(name):
    answer, reason = BROKEN[name]
    start = time.monotonic()
    with reward_server(answer) as server, pytest.raises(RewardError) as caught:
        RemoteScorer([server.url], 16, 60).score(*scorer_rows(["a", "b"]))
    assert reason in str(caught.value) and server.url in str(caught.value)
    assert len(server.bodies) == 1 and time.monotonic() - start < 20


FAILING = {  # server: the last failure the message names; these are asked again until the time is over
    "server error": (answers_with(reply(b"oops", "500 Internal Server Error")), "status 500"),
    "busy": (answers_with(reply(b"", "503 Service Unavailable")), "status 503"),
    "closes at once": (lambda *_: None, "Server disconnected"),
    "closes in the middle": (answers_with(reply(b'{"rewards": [1.0,', length=1000)), "peer closed connection"),
    "silent": (lambda *_: time.sleep(3), "ReadTimeout"),
    "drips": (drips, "the reply did not end in time"),
    "no HTTP": (answers_with(b"hello\r\n\r\n"), "RemoteProtocolError"),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_failing_server_is_asked_again_until_the_time_is_over(name):
    answer, reason = FAILING[name]
    start = time.monotonic()
    with reward_server(answer) as server, pytest.raises(RewardError) as caught:
        RemoteScorer([server.url], 16, SHORT_S).score(*scorer_rows(["a", "b"]))
    message = str(caught.value)
    assert "no scores for prompts 10, 11 within 1 s" in message and reason in message and server.url in message
    assert len(server.bodies) >= 2 and time.monotonic() - start < SHORT_S + 5


def test_an_attempt_that_the_end_cuts_short_does_not_hide_what_the_server_said():
    start = time.monotonic()

    def silent_at_the_end(number, body, connection):
        if time.monotonic() - start < 0.8 * SHORT_S:
            connection.sendall(reply(b"oops", "500 Internal Server Error"))
        else:
            time.sleep(SHORT_S)

    with reward_server(silent_at_the_end) as server, pytest.raises(RewardError, match="the last: .* status 500"):
        RemoteScorer([server.url], 16, SHORT_S).score(*scorer_rows(["a", "b"]))


def test_headers_without_end_end_with_the_time():
    start = time.monotonic()
    with (
        reward_server(drips_headers) as server,
        pytest.raises(RewardError, match="no scores for prompts 10, 11 within 1 s: a reply does not end"),
    ):
        RemoteScorer([server.url], 16, SHORT_S).score(*scorer_rows(["a", "b"]))
    assert time.monotonic() - start < SHORT_S + 3


def test_a_server_that_refuses_is_asked_again_until_the_time_is_over():
    with reward_server(lengths) as server:
        url = server.url  # nobody listens there after this block
    with pytest.raises(RewardError, match=r"within 1 s, \d+ attempts; the last: .*ConnectError"):
        RemoteScorer([url], 16, SHORT_S).score(*scorer_rows(["a"]))


def test_a_server_that_recovers_gives_its_scores():
    def recovers(number, body, connection):
        failures = [reply(b"", "503 Service Unavailable"), b"", reply(b"{", length=99), reply(b"", "429 Too Many Requests")]
        connection.sendall(failures[number]) if number < len(failures) else lengths(number, body, connection)

    with reward_server(recovers) as server:
        assert RemoteScorer([server.url], 16, 20).score(*scorer_rows(["abc"])) == [15.0]
    assert len(server.bodies) == 5


def test_another_address_takes_over_from_one_that_is_gone():
    with reward_server(lengths) as gone:
        pass
    with reward_server(lengths) as server:
        assert RemoteScorer([gone.url, server.url], 1, 20).score(*scorer_rows(["", "a", "ab"])) == [12.0, 13.0, 14.0]


def test_the_token_is_sent_and_never_said(tmp_path, monkeypatch, caplog):
    path = tmp_path / "token"
    path.write_text("canary-123\n")
    path.chmod(0o600)
    caplog.set_level(logging.DEBUG)
    with reward_server(answers_with(reply(b"", "403 Forbidden"))) as server, pytest.raises(RewardError) as caught:
        RemoteScorer([server.url], 1, 20, read_token(path)).score(*scorer_rows(["a"]))
    assert "authorization: Bearer canary-123" in server.headers[0].replace("Authorization", "authorization")
    assert "canary" not in str(caught.value) and "canary" not in caplog.text
    monkeypatch.setenv("MEGARL_REWARD_TOKEN", "from-the-environment")
    assert read_token(None) == "from-the-environment" and read_token(path) == "canary-123"
    monkeypatch.delenv("MEGARL_REWARD_TOKEN")
    assert read_token(None) is None


@pytest.mark.parametrize(
    ("content", "mode", "reason"),
    [
        (b"canary", 0o644, "run chmod 600"),
        (b"", 0o600, "one token"),
        (b"two canary", 0o600, "one token"),
        (b"\xff", 0o600, "no token can be read"),
    ],
)
def test_a_token_file_that_is_wrong_is_named_without_its_content(tmp_path, content, mode, reason):
    path = tmp_path / "token"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(SetupError, match=reason) as caught:
        read_token(path)
    assert str(path) in str(caught.value) and "canary" not in str(caught.value)
    with pytest.raises(SetupError, match="no token can be read"):
        read_token(tmp_path / "nothing")


def test_proxies_of_the_environment_are_not_asked(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    with reward_server(lengths) as server:
        assert RemoteScorer([server.url], 1, 20).score(*scorer_rows(["a"])) == [13.0]
