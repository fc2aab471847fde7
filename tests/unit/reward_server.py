"""A small HTTP server on loopback whose replies a test decides, down to the bytes on the wire."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass
class Seen:
    """What the server was asked, in order of arrival."""

    bodies: list[dict] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    url: str = ""


Answer = Callable[[int, dict, socket.socket], None]  # (number of the request from 0, its body, where to write)


def reply(content: bytes, status: str = "200 OK", headers: str = "", length: int | None = None) -> bytes:
    """A whole HTTP/1.1 reply; `length` lies about the content's."""
    size = len(content) if length is None else length
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {size}\r\nConnection: close\r\n{headers}\r\n".encode()
        + content
    )


def rewards(*scores: object) -> bytes:
    """A reply with these rewards; NaN and infinity as Python's JSON writes them."""
    return reply(json.dumps({"rewards": scores}).encode())


def answers_with(content: bytes) -> Answer:
    """The same reply to everything."""
    return lambda number, body, connection: connection.sendall(content)


@contextlib.contextmanager
def reward_server(answer: Answer) -> Iterator[Seen]:
    """Serves until the block is left; each request in a thread of its own."""
    seen, lock = Seen(), threading.Lock()

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            received = b""
            while b"\r\n\r\n" not in received:
                received += connection.recv(65536)
            head, _, content = received.partition(b"\r\n\r\n")
            size = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
            while len(content) < size:
                content += connection.recv(65536)
            body = json.loads(content)
            with lock:
                number = len(seen.bodies)
                seen.bodies.append(body)
                seen.headers.append(head.decode())
            answer(number, body, connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        seen.url = f"http://127.0.0.1:{listener.getsockname()[1]}/score"

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    threading.Thread(target=serve, args=(connection,), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield seen
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)
