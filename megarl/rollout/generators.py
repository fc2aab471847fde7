"""The generators that one trainer rank speaks for: their processes, their control channels, questions and answers."""

import contextlib
import json
import select
import socket
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megarl.bridge.joint import process_name
from megarl.errors import MegarlError, RolloutError, error_kinds
from megarl.rollout.children import Children, Replica
from megarl.rollout.control import Channel, Listener, new_token, write_private

START_TIMEOUT_S = 900.0  # for an engine to be built: CUDA graphs of a large model take minutes
SEND_TIMEOUT_S = 60.0
JOIN_FILE = "generators.json"


class Peer:
    """One process of a replica as the trainer sees it."""

    def __init__(self, channel: Channel, name: str, pid: int, ending: Callable[[], str]):
        self.name, self.pid, self._channel, self._ending = name, pid, channel, ending
        channel.name = name
        self._next, self._answers = 0, {}
        self.on_news: dict[int, Callable[[list], None]] = {}  # by question: hears what the process says before it answers
        self._fault: MegarlError | None = None

    def ask(self, do: str, **fields: Any) -> int:
        """Send a message; the number under which `answer` finds its answer."""
        self._next += 1
        with self._explained():
            self._channel.send({"id": self._next, "do": do, **fields}, SEND_TIMEOUT_S)
        return self._next

    def answer(self, number: int, timeout_s: float) -> dict[str, Any]:
        """The answer to question `number`. Raises what the process raised, or `RolloutError` when it is gone or late; both name it."""
        deadline = time.monotonic() + timeout_s
        while number not in self._answers:
            if self._fault is not None:
                raise self._fault
            self.take(max(0.01, deadline - time.monotonic()))
        message = self._answers.pop(number)
        self.on_news.pop(number, None)
        if "error" in message:
            kind, text = message["error"]
            raise error_kinds().get(kind, RolloutError)(f"{self.name}: {text}")
        return message["ok"]

    def has_answer(self, number: int) -> bool:
        """Whether the answer to question `number` has been taken."""
        return number in self._answers

    def fileno(self) -> int:
        """For `select`."""
        return self._channel.fileno()

    def take(self, timeout_s: float) -> None:
        """Take the next message, an answer or news. Raises as `answer` does, which raises it again."""
        try:
            with self._explained():
                message = self._channel.receive(timeout_s)
        except MegarlError as error:
            self._fault = error
            raise
        if "news" not in message:
            self._answers[message["id"]] = message
        elif message["id"] in self.on_news:
            self.on_news[message["id"]](message["news"])

    def give_up(self, waited_s: float) -> None:
        """Whoever waits for an answer is told that it did not come."""
        self._fault = self._fault or RolloutError(f"{self.name} did not answer within {waited_s:g} s")

    @contextlib.contextmanager
    def _explained(self):
        try:
            yield
        except RolloutError as error:
            ending = self._ending() if "gone" in str(error) else ""
            raise RolloutError(f"{self.name} {ending}: see its message" if ending else str(error)) from None

    def close(self) -> None:
        self._channel.close()


class Generators:
    """The processes of some replicas, in the order of replicas and their ranks."""

    def __init__(self, peers: Sequence[Peer], tensor: int, stop: Callable[[], None] = lambda: None):
        assert len(peers) % tensor == 0
        self.peers, self.tensor, self._stop = list(peers), tensor, stop
        weakref.finalize(self, stop)

    def of(self, replica: int) -> list[Peer]:
        """The processes of the `replica`-th replica here."""
        return self.peers[replica * self.tensor : (replica + 1) * self.tensor]

    def ask_all(self, patience_s: float, do: str, **fields: Any) -> list[dict[str, Any]]:
        """The answers of all of them to one question. Raises the first failure once all have answered or failed."""
        return wait_for([(peer, peer.ask(do, **fields)) for peer in self.peers], patience_s)

    def close(self) -> None:
        """Dismiss them and wait until those on this host are gone. Harmless when called twice."""
        for peer in self.peers:
            peer.close()
        self._stop()


def wait_for(questions: Sequence[tuple[Peer, int]], timeout_s: float) -> list[dict[str, Any]]:
    """The answers, in order. Raises the first failure, having heard the others out."""
    deadline, answers, fault = time.monotonic() + timeout_s, [], None
    for peer in _hear(questions, deadline):
        peer.give_up(timeout_s)
    for peer, number in questions:
        try:
            answers.append(peer.answer(number, 1.0 if fault else max(0.01, deadline - time.monotonic())))
        except MegarlError as error:
            fault = fault or error
    if fault is not None:
        raise fault
    return answers


def _hear(questions: Sequence[tuple[Peer, int]], deadline: float) -> list[Peer]:
    """Take messages as they come, so that nobody's news wait behind the answer of another; until all have answered, or one fails.

    Returns those that have not answered in time.
    """
    while waiting := dict.fromkeys(peer for peer, number in questions if not peer.has_answer(number)):
        ready, _, _ = select.select(waiting, [], [], max(0.0, deadline - time.monotonic()))
        for peer in ready:
            try:
                peer.take(max(0.01, deadline - time.monotonic()))
            except MegarlError:
                return []
        if not ready:
            return list(waiting)
    return []


def start_here(first_replica: int, devices: Sequence[tuple[int, ...]]) -> Generators:
    """Start one replica for each item of `devices` on this host, numbered from `first_replica`. Raises `RolloutError`."""
    folder = tempfile.TemporaryDirectory(prefix="megarl-generators-")
    token, tensor = new_token(), len(devices[0])
    token_path = Path(folder.name) / "token"
    write_private(token_path, token.hex())
    replicas: list[Children] = []
    channels: dict[tuple[int, int], tuple[Channel, dict[str, Any]]] = {}
    try:
        with Listener.unix(Path(folder.name) / "control", token) as listener:
            for index, own in enumerate(devices):
                replicas.append(Children(Replica(first_replica + index, own, listener.address, token_path, Path(folder.name))))
            while len(channels) < tensor * len(devices):
                _accept(listener, channels, START_TIMEOUT_S, replicas)
        token_path.unlink()  # everybody has read it
        if tensor == 1:
            folder.cleanup()  # nobody has anybody to meet there
    except BaseException:
        for replica in replicas:
            replica.stop()
        raise
    peers = []
    for (number, rank), (channel, greeting) in sorted(channels.items()):
        ending = partial(replicas[number - first_replica].wait_a_moment, rank)
        peers.append(Peer(channel, _name(number, rank, tensor), greeting["pid"], ending))

    def stop() -> None:
        for replica in replicas:
            replica.stop()
        folder.cleanup()

    return Generators(peers, tensor, stop)


def _accept(
    listener: Listener, channels: dict[tuple[int, int], tuple[Channel, dict[str, Any]]], timeout_s: float, replicas: Sequence[Children]
) -> None:
    """Take one more rank's call."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for replica in replicas:
            for rank in range(len(replica.processes)):
                if ending := replica.ending(rank):
                    raise RolloutError(f"{_name(replica.replica.number, rank, len(replica.processes))} {ending} before it was ready")
        called = listener.accept(1.0)
        if called is not None:
            channels[called[1]["replica"], called[1]["rank"]] = called
            return
    raise RolloutError(f"the generators of this node did not report within {timeout_s:g} s")


def wait_for_joining(file: Path, host: str, num_replicas: int, tensor: int, timeout_s: float) -> Generators:
    """Write `file`, with which generators on other nodes find this process, and wait until all replicas have come.

    The file holds the run's token: mode 600, gone again on return. Raises `RolloutError` naming how many came.
    """
    token = new_token()
    channels: dict[tuple[int, int], tuple[Channel, dict[str, Any]]] = {}
    nodes: list[Channel] = []
    promised = 0
    with Listener.tcp(host, token) as listener:
        write_private(file, json.dumps({"address": listener.address, "token": token.hex(), "tensor_parallel": tensor}))
        deadline = time.monotonic() + timeout_s
        try:
            while len(channels) < num_replicas * tensor:
                called = listener.accept(max(0.0, deadline - time.monotonic()))
                if called is None:
                    raise RolloutError(
                        f"{len(channels) // tensor} of {num_replicas} generator replicas joined within {timeout_s:g} s; start"
                        f" python -m megarl.rollout.worker --join {file} on the generators' nodes (rollout.replicas says how many)"
                    )
                channel, greeting = called
                if greeting["kind"] == "node":
                    numbers = list(range(promised, min(num_replicas, promised + greeting["replicas"])))
                    promised += len(numbers)
                    channel.send({"replicas": numbers}, SEND_TIMEOUT_S)
                    nodes.append(channel)
                else:
                    channels[greeting["replica"], greeting["rank"]] = called
        finally:
            file.unlink(missing_ok=True)
    peers = [
        Peer(channel, f"{_name(*place, tensor)} on {greeting['host']}", greeting["pid"], lambda: "")
        for place, (channel, greeting) in sorted(channels.items())
    ]

    def stop() -> None:
        for node in nodes:
            node.close()

    return Generators(peers, tensor, stop)


def _name(replica: int, rank: int, tensor: int) -> str:
    return process_name(replica * tensor + rank, tensor)


def this_host() -> str:
    """The name that processes of one host share."""
    return socket.gethostname()
