"""Rewards over HTTP, the server's side of `rewards.remote`: a thread for each connection, all of which ask the one thread that computes.

    POST /score (or /get_reward)    {"query": [...], "prompts": [...], "labels": [...]} -> 200 {"rewards": [number, ...]}
    GET  /health                    200 {"status": "ready"}; 503 with "loading" or "stopping"

Anything else is a status and {"error": "one line"}. A connection carries one request, which has to be there within `READ_S`, and whose
size is known and limited before a byte of its body is read. The standard library's server is enough: the model is what takes the time.
"""

import contextlib
import hmac
import io
import ipaddress
import json
import socket
import sys
import threading
import time
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer

from megarl.errors import SetupError
from megarl.serving.jobs import Jobs
from megarl.serving.questions import Refusal, read_questions

PATHS = ("/score", "/get_reward")  # ours, and the one that OpenRLHF's examples use
HEALTH = "/health"
CONNECTIONS = 256  # at a time; a further one is told to come again
READ_S = 30.0  # for a request to arrive
WRITE_S = 10.0  # for a reply to be taken
LINGER_S = 2.0  # reading what a refused client still sends: closing before it is done would destroy the reply
GOODBYE_S = 5.0  # for the last replies when the server stops
RETRY_AFTER_S = 1
POLL_S = 0.1  # between looks at whether the server stops


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    max_body_bytes: int
    max_queries: int
    timeout_s: float  # from the request to its scores


class RewardServer(ThreadingHTTPServer):
    """Listens from the start; gives scores once `status` is "ready". `token`: what clients have to show, None: nothing.

    Raises `SetupError` where the address cannot be used.
    """

    daemon_threads = True
    request_queue_size = CONNECTIONS

    def __init__(self, address: str, port: int, jobs: Jobs, limits: Limits, token: str | None):
        self.jobs, self.limits, self.token, self.status = jobs, limits, token, "loading"
        self._change, self._open = threading.Condition(), 0
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            super().__init__((address, port), Handler)
        except OSError as error:
            raise SetupError(f"--host {address} --port {port}: cannot listen there ({error.strerror}); expected a free port") from None

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # http.server's would look the name of the address up
        self.server_name, self.server_port = self.server_address[:2]

    @property
    def url(self) -> str:
        """Where scores are to be had."""
        return f"http://{f'[{self.server_name}]' if ':' in self.server_name else self.server_name}:{self.server_port}{PATHS[0]}"

    def start(self) -> None:
        """Answer in threads of its own."""
        threading.Thread(target=self.serve_forever, args=(POLL_S,), name="reward server", daemon=True).start()

    def stop(self) -> None:
        """Accept nothing more, and return when the connections that are open have their reply, or after `GOODBYE_S`."""
        self.shutdown()
        self.socket.close()
        with self._change:
            self._change.wait_for(lambda: self._open == 0, GOODBYE_S)

    def process_request(self, request: socket.socket, client_address: tuple) -> None:
        with self._change:
            has_room = self._open < CONNECTIONS
            self._open += has_room
        if has_room:
            super().process_request(request, client_address)
            return
        line = json.dumps({"error": f"{CONNECTIONS} connections are open; come again"}).encode()
        with contextlib.suppress(OSError):  # its buffer is empty: this does not wait
            request.sendall(b"HTTP/1.1 503 Busy\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(line), line))
        self.shutdown_request(request)

    def process_request_thread(self, request: socket.socket, client_address: tuple) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._change:
                self._open -= 1
                self._change.notify_all()

    def handle_error(self, request: socket.socket, client_address: tuple) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that went away, or was too slow, is no fault of ours
            super().handle_error(request, client_address)


class Clocked(io.RawIOBase):
    """What a connection sends until a point in time: a client that drips cannot hold a thread longer."""

    def __init__(self, connection: socket.socket, seconds: float):
        self._connection, self._until = connection, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request did not arrive in time")
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: RewardServer
    protocol_version = "HTTP/1.1"  # clients may ask before they send a large body
    wbufsize = -1  # head and body of a reply leave together

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(Clocked(self.connection, READ_S))

    def do_POST(self) -> None:
        try:
            scores = self._scores()
        except Refusal as refusal:
            self._reply(refusal.status, {"error": str(refusal)})
        else:
            self._reply(200, {"rewards": scores})

    def do_GET(self) -> None:
        if self.path == HEALTH:
            self._reply(200 if self.server.status == "ready" else 503, {"status": self.server.status})
        elif self.path in PATHS:
            self._reply(405, {"error": f"found GET; expected POST {self.path}"}, {"Allow": "POST"})
        else:
            self.send_error(404)

    def _scores(self) -> list[float]:
        if self.path not in PATHS:
            raise Refusal(404, f"expected POST {' or '.join(PATHS)}, or GET {HEALTH}")
        self._check_token()
        if self.server.status != "ready":
            raise Refusal(503, f"the server is {self.server.status}")
        limits = self.server.limits
        return self.server.jobs.ask(read_questions(self._body(limits.max_body_bytes), limits.max_queries), limits.timeout_s)

    def _check_token(self) -> None:
        if self.server.token is None:
            return
        kind, _, shown = self.headers.get("Authorization", "").partition(" ")
        is_right = hmac.compare_digest(shown.strip().encode(), self.server.token.encode())
        if not is_right or kind.lower() != "bearer":
            raise Refusal(401, "expected the header Authorization: Bearer with the server's token")

    def _body(self, most: int) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()) or "Transfer-Encoding" in self.headers:
            raise Refusal(411, "expected a Content-Length and a body in one piece")
        if len(length) > 15 or int(length) > most:
            raise Refusal(413, f"the body has {length[:15]} bytes; expected at most {most} (--max-body)")
        try:
            content = self.rfile.read(int(length))
        except TimeoutError:
            raise Refusal(408, f"the body did not arrive within {READ_S:g} s") from None
        if len(content) < int(length):
            raise Refusal(400, f"the body ended after {len(content)} of {length} bytes")
        return content

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses by itself, in our form."""
        expected = f"expected POST {' or '.join(PATHS)}, or GET {HEALTH}"
        self._reply(code, {"error": f"{message or HTTPStatus(code).phrase}; {expected}"})

    def _reply(self, status: int, body: dict, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body, allow_nan=False).encode()
        self.connection.settimeout(WRITE_S)
        self.send_response(status)
        also = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": str(RETRY_AFTER_S)}}.get(status, {})
        named = {"Content-Type": "application/json", "Content-Length": str(len(content)), "Connection": "close"}
        for name, value in (named | also | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()
        self.close_connection = True
        if status >= 400:
            self._linger()

    def _linger(self) -> None:
        """Read on for a moment: bytes left unread would make the kernel reset the connection, reply included."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            rest = Clocked(self.connection, LINGER_S)
            while rest.read(1 << 16):
                pass

    def version_string(self) -> str:
        return "megarl"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing about single requests: a run sends thousands."""


def address_of(host: str) -> str:
    """The address that `host` stands for. Raises `SetupError` for one that nobody knows."""
    try:
        return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise SetupError(f"--host {host}: no address of this machine ({error.strerror}); expected one such as 127.0.0.1") from None


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach the address."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
