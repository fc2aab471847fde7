"""The server of `megarl serve-reward` without its model: good, bad, slow, large and too many requests, who may ask, and how it stops."""

import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from megarl import cli
from megarl.data.preferences import read_preference
from megarl.data.tokenizers import load_tokenizer
from megarl.errors import RewardError, SetupError
from megarl.rewards.remote import RemoteScorer
from megarl.serving import server as serving
from megarl.serving.jobs import Jobs
from megarl.serving.model import checked
from megarl.serving.questions import Question, Refusal, Texts, read_questions
from megarl.serving.server import Limits, RewardServer, address_of, is_loopback
from tests.unit.reward_samples import scorer_rows
from tests.unit.text_files import character_tokenizer_directory, sentencepiece_letters

LIMITS = Limits(max_body_bytes=4096, max_queries=8, timeout_s=20)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(character_tokenizer_directory(tmp_path_factory.mktemp("t")))


class Served:
    """A server whose model says how many tokens a text has; `pause` holds it up."""

    def __init__(self, texts: Texts, limits: Limits = LIMITS, token: str | None = None):
        self.texts, self.done, self.pause = texts, [], threading.Event()
        self.pause.set()
        self.server = RewardServer("127.0.0.1", 0, Jobs(), limits, token)
        self.server.start()
        self.server.status = "ready"
        self.url = self.server.url
        self.thread = threading.Thread(target=self.compute, daemon=True)
        self.thread.start()

    def compute(self) -> None:
        while not self.server.jobs.is_over:
            if (job := self.server.jobs.next(0.05)) is None:
                continue
            self.pause.wait(20)
            try:
                rows = self.texts.tokens(job.questions)
                self.done.append(rows)
                job.settle([float(len(row)) for row in rows])
            except Refusal as refusal:
                job.settle(refusal)

    def close(self) -> None:
        self.pause.set()
        self.server.jobs.close()
        self.thread.join(20)
        self.server.stop()

    def post(self, body: object, **headers: str) -> httpx.Response:
        return httpx.post(self.url, content=json.dumps(body), headers=headers, timeout=20, trust_env=False)


@pytest.fixture
def start(tokenizer):
    served = []

    def make(**settings) -> Served:
        served.append(Served(Texts(tokenizer, 32), **settings))
        return served[-1]

    yield make
    for one in served:
        one.close()


@pytest.fixture(scope="module")
def shared(tokenizer):
    served = Served(Texts(tokenizer, 32))
    yield served
    served.close()


def raw(url: str, sent: bytes, dripped: bytes = b"") -> bytes:
    """What comes back for bytes on the wire; those at the end come one by one, with pauses."""
    at = httpx.URL(url)
    with socket.create_connection((at.host, at.port), timeout=20) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(sent)
            for byte in dripped:
                connection.sendall(bytes([byte]))
                time.sleep(0.05)
        received = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                received += part
        return received


# ---------------------------------------------------------------- scores
def test_our_client_gets_its_scores_in_order(shared):
    responses = ["x" * (i % 7) for i in range(37)]
    rows = scorer_rows(responses, [str(i) for i in range(37)])
    scores = RemoteScorer([shared.url], per_request=4, timeout_s=20).score(*rows)
    assert scores == [len(f"question {i}: ") + i % 7 + 1 for i in range(37)]


def test_openrlhfs_request_and_path(shared):
    url = shared.url.replace("/score", "/get_reward")
    reply = httpx.post(url, json={"query": ["ab<|im_end|>", "c"], "prompts": ["a", "no"], "labels": [None, None]}, trust_env=False)
    assert (reply.status_code, reply.json()) == (200, {"rewards": [3.0, 2.0]}), "an end that is spelled counts once"
    assert httpx.post(url, json={"query": ["abcd"]}, trust_env=False).json() == {"rewards": [5.0]}


def test_texts_become_the_tokens_of_preference_pairs(tokenizer, tmp_path):
    row = {"prompt": "bad ", "chosen": "cab", "rejected": "dab"}
    chat = {
        "prompt": [{"role": "user", "content": "bad "}],
        **{key: [{"role": "assistant", "content": row[key]}] for key in ("chosen", "rejected")},
    }
    for texts in (tokenizer, load_tokenizer(sentencepiece_letters(tmp_path / "sp.model"))):
        found = Texts(texts, 64).tokens([Question("bad ", "cab", True)])
        assert found == [list(read_preference(row, texts, False).chosen_ids)]
    found = Texts(tokenizer, 64, chat_template=True).tokens([Question("bad ", "cab", True)])
    assert found == [list(read_preference(chat, tokenizer, True).chosen_ids)]


def test_a_start_that_is_spelled_counts_once(tmp_path):
    texts = load_tokenizer(character_tokenizer_directory(tmp_path / "t", bos_token="<s>"))
    texts.bos_id = texts.encode("<s>")[0]
    ids = [texts.bos_id, *texts.encode("ab"), texts.eos_id]
    assert Texts(texts, 9).tokens([Question("<s>a", "b", True), Question("", "ab", False)]) == [ids, ids]


def test_a_chat_template_needs_prompts(tokenizer, tmp_path):
    with pytest.raises(Refusal, match="query 1 does not begin with a prompt of its own; expected prompts") as caught:
        Texts(tokenizer, 64, True).tokens(read_questions(b'{"query": ["ab", "cd"], "prompts": ["a", "d"]}', 9))
    assert caught.value.status == 400


def test_scores_that_are_no_numbers_are_refused_for_good():
    assert checked([1.0, 2.0]) == [1.0, 2.0]
    refusal = checked([1.0, float("nan")])
    assert (refusal.status, str(refusal)) == (422, "the model scores query 1 as nan; expected a finite number")


# ---------------------------------------------------------------- bad requests
BAD = {  # body: status, words
    "no JSON": (b"<html>", 400, "the body is not JSON (JSONDecodeError)"),
    "no text": (b"\xff\xfe{", 400, "the body is not JSON (UnicodeDecodeError)"),
    "deep": (b"[" * 4000, 400, "the body is"),
    "a list": (b"[]", 400, "the body is a list without query"),
    "no query": (b'{"prompts": []}', 400, "the body is an object without query"),
    "query is text": (b'{"query": "ab"}', 400, "query is a text; expected a list of texts"),
    "empty": (b'{"query": []}', 400, "query is empty"),
    "a number": (b'{"query": ["a", 1]}', 400, "query 1 is a number; expected a text"),
    "null": (b'{"query": [null]}', 400, "query 0 is null"),
    "half a pair": (b'{"query": ["\\ud800"]}', 400, "query 0 holds half of a surrogate pair"),
    "prompts are short": (b'{"query": ["a", "b"], "prompts": ["a"]}', 400, "prompts holds 1 texts for 2 queries"),
    "prompts are none": (b'{"query": ["a"], "prompts": [false]}', 400, "prompts 0 is a truth value"),
    "too many": (json.dumps({"query": ["a"] * 9}).encode(), 413, "query holds 9 texts; expected at most 8"),
    "too long": (json.dumps({"query": ["a", "b" * 40]}).encode(), 413, "query 1 has 41 tokens; expected at most 32"),
    "too large": (json.dumps({"query": ["a" * 5000]}).encode(), 413, "bytes; expected at most 4096 (--max-body)"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_one_line_and_a_status(shared, name):
    body, status, words = BAD[name]
    reply = httpx.post(shared.url, content=body, timeout=20, trust_env=False)
    assert reply.status_code == status and words in reply.json()["error"] and "\n" not in reply.json()["error"]
    assert reply.headers["content-type"] == "application/json" and list(reply.json()) == ["error"]


WIRE = {  # bytes: status, words
    "no length": (b"POST /score HTTP/1.1\r\n\r\n", b"411", b"expected a Content-Length"),
    "a negative length": (b"POST /score HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"411", b"expected a Content-Length"),
    "a huge length": (b"POST /score HTTP/1.1\r\nContent-Length: " + b"9" * 4000 + b"\r\n\r\n", b"413", b"expected at most 4096"),
    "in chunks": (b"POST /score HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n{}", b"411", b"in one piece"),
    "no such page": (b"POST /admin HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", b"404", b"expected POST /score or /get_reward"),
    "no such file": (b"GET /../etc/passwd HTTP/1.1\r\n\r\n", b"404", b"Not Found; expected POST"),
    "another method": (b"GET /score HTTP/1.1\r\n\r\n", b"405", b"expected POST /score"),
    "an unknown method": (b"PUT /score HTTP/1.1\r\nContent-Length: 0\r\n\r\n", b"501", b"Unsupported method"),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"400", b"Bad request"),
    "endless headers": (b"POST /score HTTP/1.1\r\nA: " + b"a" * 70000 + b"\r\n\r\n", b"431", b"Line too long"),
}


@pytest.mark.parametrize("name", WIRE)
def test_what_is_no_request_is_refused_in_the_same_form(shared, name):
    sent, status, words = WIRE[name]
    head, _, body = raw(shared.url, sent).rpartition(b"\r\n\r\n")
    assert words in body and list(json.loads(body)) == ["error"]
    assert head.split(b" ", 2)[1] == status if head else name == "no HTTP"


def test_the_client_reads_why_it_was_refused_while_it_still_sends(shared):
    rows = scorer_rows(["x" * 3_000_000])
    with pytest.raises(RewardError, match=r"answered status 413 for prompt 10: .*expected at most 4096"):
        RemoteScorer([shared.url], 1, 20).score(*rows)


# ---------------------------------------------------------------- who may ask, and when
def test_a_token_is_asked_for_before_anything_else(start):
    served = start(token="canary-123")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic canary-123"}, {"Authorization": "Bearer canary-1234"}):
        reply = served.post({"query": 1}, **headers)
        assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer") and "canary" not in reply.text
    assert b" 401 " in raw(served.url, b"POST /score HTTP/1.1\r\nAuthorization: Bearer \xff\xe9\r\nContent-Length: 2\r\n\r\n{}")
    assert RemoteScorer([served.url], 1, 20, "canary-123").score(*scorer_rows(["a"])) == [14.0]
    with pytest.raises(RewardError, match="answered status 401 .*token_file or MEGARL_REWARD_TOKEN"):
        RemoteScorer([served.url], 1, 20, "another").score(*scorer_rows(["a"]))


def test_health_says_what_to_expect(start):
    served = start(token="canary-123")
    health = served.url.replace("/score", "/health")
    for status, code in (("loading", 503), ("ready", 200), ("stopping", 503)):
        served.server.status = status
        reply = httpx.get(health, trust_env=False)
        assert (reply.status_code, reply.json()) == (code, {"status": status})
    reply = served.post({"query": ["a"]}, Authorization="Bearer canary-123")
    assert (reply.status_code, reply.json()["error"], reply.headers["retry-after"]) == (503, "the server is stopping", "1")


def test_a_request_that_waits_too_long_is_told_so_and_never_computed(start):
    served = start(limits=Limits(4096, 8, 0.4))
    served.pause.clear()
    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(served.post, {"query": [text]}) for text in ("a", "bb"))
        replies = [first.result(), second.result()]
    assert [reply.status_code for reply in replies] == [503, 503]
    assert "no scores within 0.4 s (--timeout)" in replies[0].json()["error"]
    served.pause.set()
    assert served.post({"query": ["ccc"]}).json() == {"rewards": [4.0]}
    assert len(served.done) == 2, "the one that was begun, and the last"


def test_clients_that_drip_are_cut_off(start, monkeypatch):
    monkeypatch.setattr(serving, "READ_S", 0.5)
    served, begun = start(), time.monotonic()
    body = raw(served.url, b"POST /score HTTP/1.1\r\nContent-Length: 4000\r\n\r\n", dripped=b" " * 40)
    assert b" 408 " in body and b"the body did not arrive within 0.5 s" in body
    assert raw(served.url, b"POST /score HTTP/1.1\r\n", dripped=b"A: b\r\n" * 6) == b""
    cut = b"POST /score HTTP/1.1\r\nContent-Length: 4000\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", served.server.server_port)) as connection:
        connection.sendall(cut)
        connection.shutdown(socket.SHUT_WR)
        assert b"the body ended after 1 of 4000 bytes" in connection.recv(4096), "a reply is one piece"
    assert time.monotonic() - begun < 15


def test_connections_have_a_limit(start, monkeypatch):
    monkeypatch.setattr(serving, "CONNECTIONS", 2)
    served = start()
    at = ("127.0.0.1", served.server.server_port)
    with socket.create_connection(at), socket.create_connection(at):
        while served.server._open < 2:
            time.sleep(0.01)
        assert b" 503 Busy\r\n" in raw(served.url, b"")
    scores = RemoteScorer([served.url], 1, 20).score(*scorer_rows(["a"] * 8))
    assert scores == [14.0] * 8, "a client that is told to come again comes again"


def test_who_waits_gets_scores_when_the_server_stops(start):
    served = start()
    served.pause.clear()
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(served.post, {"query": ["a" * n]}) for n in (1, 2, 3)]
        while served.server.jobs._waiting.qsize() < 2:
            time.sleep(0.01)
        served.server.jobs.close()
        late = served.post({"query": ["a"]})
        served.close()
        assert sorted(reply.result().json()["rewards"][0] for reply in waiting) == [2.0, 3.0, 4.0]
    assert (late.status_code, late.json()) == (503, {"error": "the server is stopping"})
    with pytest.raises(httpx.ConnectError):
        served.post({"query": ["a"]})


# ---------------------------------------------------------------- addresses
@pytest.mark.parametrize(
    ("address", "is_safe"),
    [
        ("127.0.0.1", True),
        ("127.3.2.1", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.1.2.3", False),
        ("fe80::1%lo", False),
    ],
)
def test_loopback_is_told_by_the_address(address, is_safe):
    assert is_loopback(address) is is_safe


def test_the_name_of_this_machine_alone_is_loopback():
    assert is_loopback(address_of("localhost"))
    with pytest.raises(SetupError, match="--host no.such.host.invalid: no address"):
        address_of("no.such.host.invalid")


def test_an_address_others_reach_needs_a_flag_and_a_token(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("MEGARL_REWARD_TOKEN", raising=False)
    path, token = str(tmp_path), tmp_path / "token"
    token.write_text("canary-123")
    token.chmod(0o600)
    for arguments, missing in (
        (["--host", "0.0.0.0"], "expected --expose and a token in --token-file or MEGARL_REWARD_TOKEN, or"),
        (["--host", "::", "--expose"], "expected a token in --token-file or MEGARL_REWARD_TOKEN, or"),
        (["--host", "0.0.0.0", "--token-file", str(token)], "expected --expose, or an address of this machine alone"),
    ):
        assert cli.run(["serve-reward", path, *arguments]) == 78
        err = capsys.readouterr().err
        assert missing in err and err.count("\n") == 1 and "canary" not in err


def test_a_port_in_use_and_a_token_others_read_are_named(capsys, tmp_path):
    token = tmp_path / "token"
    token.write_text("canary-123")
    token.chmod(0o644)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.run(["serve-reward", str(tmp_path), "--port", port]) == 2
        assert f"--host 127.0.0.1 --port {port}: cannot listen there (Address already in use)" in capsys.readouterr().err
    assert cli.run(["serve-reward", str(tmp_path), "--token-file", str(token)]) == 2
    assert "run chmod 600" in capsys.readouterr().err
    assert cli.run(["serve-reward", str(tmp_path), "--token", "canary-123"]) == 2, "no token on a command line"
