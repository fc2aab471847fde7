"""The control channel between trainer and generators: who may talk, how much, and for how long one waits."""

import json
import os
import socket
import struct
import threading
import time

import pytest

from megarl.errors import RolloutError
from megarl.rollout.control import Channel, Listener, connect, new_token, read_private, write_private


@pytest.fixture(params=["unix", "tcp"])
def listener(request, tmp_path):
    token = new_token()
    opened = Listener.unix(tmp_path / "control", token) if request.param == "unix" else Listener.tcp("127.0.0.1", token)
    with opened:
        yield opened, token


def accept_in_background(listener: Listener, timeout_s: float = 5.0) -> tuple[threading.Thread, list]:
    found: list = []
    thread = threading.Thread(target=lambda: found.append(listener.accept(timeout_s)))
    thread.start()
    return thread, found


def pair(listener: Listener, token: bytes) -> tuple[Channel, Channel, dict]:
    thread, found = accept_in_background(listener)
    ours = connect(listener.address, token, {"rank": 3})
    thread.join()
    theirs, greeting = found[0]
    theirs.name = "generator 0"
    return ours, theirs, greeting


def test_messages_of_any_size_arrive_whole_and_in_order(listener):
    ours, theirs, greeting = pair(*listener)
    assert greeting == {"rank": 3}
    messages = [{"do": "generate", "tokens": list(range(200_000))}, {}, {"text": "ä" * 1000}]
    sender = threading.Thread(target=lambda: [ours.send(message, 5) for message in messages])
    sender.start()
    assert [theirs.receive(5) for _ in messages] == messages
    sender.join()
    assert not theirs.has_message()


def test_who_does_not_know_the_token_is_turned_away(listener):
    opened, _ = listener
    thread, found = accept_in_background(opened, timeout_s=1.0)
    with pytest.raises(RolloutError, match="is gone"):
        connect(opened.address, new_token(), {}, timeout_s=5)
    thread.join()
    assert found == [None]


def test_a_trainer_that_does_not_know_the_token_is_refused(tmp_path):
    """Somebody else listens at the address: nothing but a proof that is worth nothing elsewhere leaves this process."""
    token = new_token()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def pretend() -> None:
            channel = Channel(server.accept()[0], "a generator")
            channel.send({"nonce": "00"}, 5)
            assert token.hex() not in json.dumps(channel.receive(5))
            channel.send({"proof": "guess"}, 5)

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(RolloutError, match="does not know this run's token"):
            connect(f"tcp:127.0.0.1:{server.getsockname()[1]}", token, {})
        thread.join()


@pytest.mark.parametrize(
    "sent, message",
    [
        (b"GET / HTTP/1.1\r\n\r\n", "something else"),
        (struct.pack("!4sI", b"mgrl", 1 << 30), "expected a message of at most"),
        (struct.pack("!4sI", b"mgrl", 3) + b"{x}", "not JSON"),
        (struct.pack("!4sI", b"mgrl", 2) + b"[]", "expected a JSON object"),
        (struct.pack("!4sI", b"mgrl", 9) + b"{}", "did not send a message within 0.2 s"),
    ],
)
def test_anything_but_a_message_is_refused(sent, message):
    ours, theirs = socket.socketpair()
    ours.sendall(sent)
    with pytest.raises(RolloutError, match="^generator 0 .*" + message):
        Channel(theirs, "generator 0").receive(0.2)
    ours.close()


def test_the_end_of_the_other_side_is_noticed():
    ours, theirs = socket.socketpair()
    channel = Channel(theirs, "generator 0")
    ours.close()
    assert channel.has_message()
    with pytest.raises(RolloutError, match="generator 0 is gone"):
        channel.receive(5)


def test_a_reader_that_does_not_read_holds_nobody_up_for_long():
    ours, theirs = socket.socketpair()
    start = time.perf_counter()
    with pytest.raises(RolloutError, match="generator 0 did not take a message within 0.2 s"):
        Channel(ours, "generator 0").send({"x": "y" * 10_000_000}, 0.2)
    assert time.perf_counter() - start < 5
    theirs.close()


def test_a_message_over_the_limit_is_not_sent():
    ours, theirs = socket.socketpair()
    with pytest.raises(RolloutError, match="over the limit of 100"):
        Channel(ours, "generator 0", max_bytes=100).send({"x": "y" * 100}, 1)
    theirs.close()


def test_an_address_where_nobody_listens(tmp_path):
    with pytest.raises(RolloutError, match="no trainer answers at unix:"):
        connect(f"unix:{tmp_path / 'nobody'}", new_token(), {})


def test_a_socket_is_for_its_owner_alone(tmp_path):
    before = os.umask(0)
    try:
        with Listener.unix(tmp_path / "control", new_token()):
            assert (tmp_path / "control").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


def test_a_path_that_is_too_long_for_a_socket(tmp_path):
    with pytest.raises(RolloutError, match="set TMPDIR to a shorter directory"):
        Listener.unix(tmp_path / ("x" * 120), new_token())


def test_a_token_file_is_for_its_owner_alone(tmp_path):
    path = tmp_path / "token"
    write_private(path, "secret")
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert read_private(path) == "secret"
    path.chmod(0o644)
    with pytest.raises(RolloutError, match="can be read or written by others"):
        read_private(path)
    with pytest.raises(RolloutError, match="cannot be read"):
        read_private(tmp_path / "nothing")
