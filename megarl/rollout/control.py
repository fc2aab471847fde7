"""Messages between a trainer rank and a generator: JSON objects behind a length, over a Unix socket or TCP.

A connection begins with a proof in both directions that the other end knows the run's token (HMAC-SHA256 of a fresh nonce, compared in
constant time); the token itself never travels. Every read and write has a deadline, every message a largest size. What follows the
handshake is neither encrypted nor signed: use it on the loopback interface or inside a cluster's own network.
"""

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megarl.errors import RolloutError

MAX_MESSAGE_BYTES = 256 << 20  # the rounds of one worker, or the responses of one replica
MAX_GREETING_BYTES = 4 << 10  # before the other end has shown that it belongs to the run
GREETING_TIMEOUT_S = 20.0

_LENGTH = struct.Struct("!4sI")
_MAGIC = b"mgrl"


class Channel:
    """One end of a connection. `name` stands in messages for the other end. Every failure is a `RolloutError` naming it."""

    def __init__(self, connection: socket.socket, name: str, max_bytes: int = MAX_MESSAGE_BYTES):
        self.name, self.max_bytes = name, max_bytes
        self._socket = connection
        connection.setblocking(False)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def send(self, message: dict[str, Any], timeout_s: float) -> None:
        """Hand `message` to the kernel within `timeout_s`."""
        content = json.dumps(message, allow_nan=False, separators=(",", ":")).encode()
        if len(content) > self.max_bytes:
            raise RolloutError(f"a message of {len(content)} bytes to {self.name} is over the limit of {self.max_bytes}")
        waiting, deadline = memoryview(_LENGTH.pack(_MAGIC, len(content)) + content), time.monotonic() + timeout_s
        while waiting:
            self._wait(deadline, timeout_s, is_write=True)
            try:
                waiting = waiting[self._socket.send(waiting) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise RolloutError(f"{self.name} is gone ({error.strerror})") from None

    def receive(self, timeout_s: float | None) -> dict[str, Any]:
        """The next message, which must be complete within `timeout_s` (None: as long as it takes)."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        magic, length = _LENGTH.unpack(self._read(_LENGTH.size, deadline, timeout_s))
        if magic != _MAGIC or length > self.max_bytes:
            raise RolloutError(
                f"{self.name} sent {'something else' if magic != _MAGIC else f'{length} bytes'}; expected a message of at most"
                f" {self.max_bytes} bytes"
            )
        try:
            message = json.loads(self._read(length, deadline, timeout_s))
        except ValueError:
            raise RolloutError(f"{self.name} sent a message that is not JSON") from None
        if not isinstance(message, dict):
            raise RolloutError(f"{self.name} sent a {type(message).__name__}; expected a JSON object")
        return message

    def has_message(self) -> bool:
        """True when something can be read at once: a message, or the news that the other end is gone."""
        return bool(select.select([self._socket], [], [], 0)[0])

    def close(self) -> None:
        """Harmless when called twice."""
        self._socket.close()

    def fileno(self) -> int:
        """For `select`."""
        return self._socket.fileno()

    def _read(self, size: int, deadline: float | None, timeout_s: float | None) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            self._wait(deadline, timeout_s, is_write=False)
            try:
                part = self._socket.recv(min(size - len(parts), 1 << 20))
            except BlockingIOError:
                continue
            except OSError as error:
                raise RolloutError(f"{self.name} is gone ({error.strerror})") from None
            if not part:
                raise RolloutError(f"{self.name} is gone (it closed its connection)")
            parts += part
        return bytes(parts)

    def _wait(self, deadline: float | None, timeout_s: float | None, is_write: bool) -> None:
        left = None if deadline is None else deadline - time.monotonic()
        ends = [self._socket]
        if left is not None and left <= 0 or not any(select.select([] if is_write else ends, ends if is_write else [], [], left)):
            raise RolloutError(f"{self.name} did not {'take' if is_write else 'send'} a message within {timeout_s:g} s")


class Listener:
    """A socket that generators connect to. Use it as a context manager; its Unix path or TCP port exists while it is open."""

    def __init__(self, listening: socket.socket, address: str, token: bytes):
        self.address, self._socket, self._token = address, listening, token
        listening.listen(64)

    @classmethod
    def unix(cls, path: Path, token: bytes) -> "Listener":
        """On the same host; `path` lies in a directory of this user alone."""
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listening.bind(str(path))
        except OSError as error:  # most likely a path of more than some 100 bytes
            raise RolloutError(f"cannot listen at {path} ({error}); set TMPDIR to a shorter directory of this host") from None
        os.chmod(path, 0o600)
        return cls(listening, f"unix:{path}", token)

    @classmethod
    def tcp(cls, host: str, token: bytes) -> "Listener":
        """On the interface that `host` (an address or a name of this host) belongs to, at a free port."""
        try:
            family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
            listening = socket.socket(family, socket.SOCK_STREAM)
            listening.bind(address)
        except OSError as error:
            raise RolloutError(f"cannot listen on {host!r} ({error}); set rollout.listen to an address of this host") from None
        return cls(listening, f"tcp:{host}:{listening.getsockname()[1]}", token)

    def accept(self, timeout_s: float) -> tuple[Channel, dict[str, Any]] | None:
        """The next connection whose other end knows the token, and its greeting; None when nobody came within `timeout_s`.

        Strangers are turned away silently.
        """
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0 and select.select([self._socket], [], [], left)[0]:
            connection, _ = self._socket.accept()
            channel = Channel(connection, "a new connection", MAX_GREETING_BYTES)
            try:
                greeting = _welcome(channel, self._token)
            except RolloutError:
                channel.close()
                continue
            channel.max_bytes = MAX_MESSAGE_BYTES
            return channel, greeting
        return None

    def close(self) -> None:
        self._socket.close()
        if self.address.startswith("unix:"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.address.removeprefix("unix:"))

    def __enter__(self) -> "Listener":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def new_token() -> bytes:
    """256 random bits for one run."""
    return secrets.token_bytes(32)


def connect(address: str, token: bytes, greeting: dict[str, Any], timeout_s: float = GREETING_TIMEOUT_S) -> Channel:
    """A channel to the listener at `address`, which has proven that it knows the token. Raises `RolloutError`."""
    kind, _, where = address.partition(":")
    try:
        if kind == "unix":
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(timeout_s)
            connection.connect(where)
        else:
            host, _, port = where.rpartition(":")
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s)
    except (OSError, ValueError) as error:
        raise RolloutError(f"no trainer answers at {address} ({error})") from None
    channel = Channel(connection, f"the trainer at {address}")
    nonce = secrets.token_hex(16)
    challenge = channel.receive(timeout_s).get("nonce")
    channel.send({"proof": _proof(token, "generator", str(challenge)), "nonce": nonce, "greeting": greeting}, timeout_s)
    if not hmac.compare_digest(str(channel.receive(timeout_s).get("proof")).encode(), _proof(token, "trainer", nonce).encode()):
        channel.close()
        raise RolloutError(f"{channel.name} does not know this run's token; expected the trainer that wrote the token file")
    return channel


def _welcome(channel: Channel, token: bytes) -> dict[str, Any]:
    nonce = secrets.token_hex(16)
    channel.send({"nonce": nonce}, GREETING_TIMEOUT_S)
    answer = channel.receive(GREETING_TIMEOUT_S)
    if not hmac.compare_digest(str(answer.get("proof")).encode(), _proof(token, "generator", nonce).encode()):
        raise RolloutError("a stranger called")
    channel.send({"proof": _proof(token, "trainer", str(answer.get("nonce")))}, GREETING_TIMEOUT_S)
    greeting = answer.get("greeting")
    if not isinstance(greeting, dict):
        raise RolloutError("a greeting that is not a JSON object")
    return greeting


def _proof(token: bytes, who: str, nonce: str) -> str:
    return hmac.new(token, f"{who}/{nonce}".encode(), hashlib.sha256).hexdigest()


@contextlib.contextmanager
def token_file(folder: Path, token: bytes) -> Iterator[Path]:
    """A file that only this user can read, holding `token` in hexadecimal."""
    path = folder / "token"
    write_private(path, token.hex())
    yield path


def write_private(path: Path, text: str) -> None:
    """Write a file that only this user can read; it never exists with wider rights, nor half written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    os.replace(temporary, path)


def read_private(path: Path) -> str:
    """The text of a file that must belong to this user and be readable by nobody else. Raises `RolloutError`."""
    try:
        with open(path, encoding="utf-8") as file:
            status = os.fstat(file.fileno())
            if status.st_uid != os.getuid() or status.st_mode & 0o077:
                raise RolloutError(f"{path} can be read or written by others; expected a file of this user alone (chmod 600)")
            return file.read(1 << 16)
    except OSError as error:
        raise RolloutError(f"{path} cannot be read ({error.strerror}); expected the file a trainer writes for its generators") from None
