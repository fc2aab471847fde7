"""`python -m megarl.rollout.worker`: a generator in processes of its own.

Two ways to start it. With `--join FILE` it brings generators on this node to a trainer elsewhere: FILE is the `generators.json` that the
trainer writes into its run folder, or a copy of it (mode 600). Without, it is one tensor-parallel rank of a replica, as
`rollout.children` starts it. It ends with its connection to the trainer.

A rank obeys the messages of its control channel, in order, and answers each. While it samples, it looks for a message before every
token; the first rank of a replica decides for all when one is taken, so that all of them do it at the same token.
"""

import argparse
import json
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import astuple, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megarl.config import ParallelConfig, RolloutConfig
from megarl.errors import MegarlError, RolloutError
from megarl.records import Completion, RolloutRequest, Sampling
from megarl.rollout.children import Children, Replica, devices_of
from megarl.rollout.control import Channel, connect, read_private, write_private

if TYPE_CHECKING:
    from megarl.rollout.vllm_generator import GeneratorEngine

REPLY_TIMEOUT_S = 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until the trainer leaves; the exit code."""
    parsed = _parser().parse_args(arguments)
    try:
        if parsed.join is not None:
            return join(parsed.join, parsed.replicas)
        return Rank(parsed).run()
    except MegarlError as error:
        print(f"megarl: error in a generator: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


class Rank:
    """One tensor-parallel rank of a replica."""

    def __init__(self, parsed: argparse.Namespace):
        self.number, self.rank, self.rendezvous = parsed.replica, parsed.rank, parsed.rendezvous
        token = bytes.fromhex(read_private(parsed.token_file).strip())
        greeting = {"kind": "rank", "replica": self.number, "rank": self.rank, "pid": os.getpid(), "host": socket.gethostname()}
        self.channel: Channel = connect(parsed.control, token, greeting)
        self.engine: GeneratorEngine | None = None
        self._batches: dict[int, int] = {}  # id of the message that asked for it -> number of the batch

    def run(self) -> int:
        """Obey until the trainer closes the channel or says `stop`."""
        while True:
            if self.engine is not None and self.engine.is_busy and not self._takes_message():
                self._step()
                continue
            try:
                message = self.channel.receive(None)
            except RolloutError:
                return 0  # the trainer has left, whatever the reason
            if message.get("do") == "stop":
                return 0
            self._obey(message)

    def _takes_message(self) -> bool:
        """Whether the replica obeys a message before the next token; the first rank decides."""
        if self.engine.layout.tensor == 1:
            return self.channel.has_message()
        import torch

        from megarl.parallel.collectives import broadcast
        from megarl.parallel.groups import group

        decision = torch.tensor([self.channel.has_message()])
        return bool(broadcast(decision, 0, group(self.engine.layout.training, "world")))

    def _obey(self, message: dict[str, Any]) -> None:
        try:
            work = {"start": self._start, "generate": self._generate, "connect": self._connect}
            work |= {"begin": self._begin, "receive": self._receive, "publish": self._publish}
            answer = work[message["do"]](
                **{name: value for name, value in message.items() if name not in ("do", "id")}, **self._id(message)
            )
        except MegarlError as error:
            self._reply(message["id"], error=[type(error).__name__, str(error)])
        except Exception as error:
            traceback.print_exc()
            self._reply(message["id"], error=["RolloutError", f"{type(error).__name__}: {error}"])
        else:
            if answer is not None:
                self._reply(message["id"], ok=answer)

    @staticmethod
    def _id(message: dict[str, Any]) -> dict[str, int]:
        return {"number": message["id"]} if message["do"] == "generate" else {}

    def _reply(self, number: int, **content: Any) -> None:
        self.channel.send({"id": number, **content}, REPLY_TIMEOUT_S)

    # --- messages ---

    def _start(self, model: dict, rollout: dict, precision: str, max_len: int, timeout_s: float) -> dict[str, Any]:
        """Build the engine; what this rank needs of the trainer."""
        import torch.distributed as dist

        from megarl.models.family import spec_from_hf_config
        from megarl.parallel import device, groups
        from megarl.parallel.layout import RolloutLayout

        tensor, patience = int(os.environ["WORLD_SIZE"]), timedelta(seconds=timeout_s)
        store = dist.HashStore() if tensor == 1 else dist.FileStore(str(self.rendezvous), tensor)
        dist.init_process_group(device.process_group_backend(), store=store, rank=self.rank, world_size=tensor, timeout=patience)
        layout = groups.initialize(ParallelConfig(tensor=tensor), seed=0)
        from megarl.rollout.vllm_generator import GeneratorEngine

        spec = spec_from_hf_config(model, "the trainer's model")
        self.engine = GeneratorEngine(spec, RolloutConfig(**rollout), RolloutLayout(layout, tensor), precision, max_len)
        return {
            "host": socket.gethostname(),
            "dtype": str(self.engine.dtype).removeprefix("torch."),
            "wanted": [[box.hf_name, box.hf_box, box.parameter, box.parameter_box] for box in self.engine.targets],
        }

    def _connect(self, delivery: dict, timeout_s: float) -> dict[str, Any]:
        self.engine.connect(delivery, timeout_s)
        return {}

    def _begin(self) -> dict[str, Any]:
        self.engine.begin_update()
        return {}

    def _receive(self, sync: int, is_verified: bool, timeout_s: float) -> dict[str, Any]:
        return {"digests": self.engine.receive(sync, is_verified, timeout_s)}

    def _publish(self, version: int) -> dict[str, Any]:
        self.engine.publish(version)
        return {"version": self.engine.policy_version}

    def _generate(self, requests: list, number: int, tells: bool) -> None:
        """Answered when the last response is complete; with `tells`, each is news before."""
        self.engine.submit(number, [request_from_json(item) for item in requests], tells and self.rank == 0)

    def _step(self) -> None:
        try:
            done = self.engine.step()
        except RolloutError as error:
            for number in list(self.engine.forget_batches()):
                self._reply(number, error=[type(error).__name__, str(error)])
            return
        for number, finished in self.engine.news().items():
            self._reply(number, news=[[place, _without_numbers(completion)] for place, completion in finished])
        for number, completions in done.items():
            told = [list(astuple(completion)) for completion in completions] if self.rank == 0 else []
            self._reply(number, ok={"completions": told})


def _without_numbers(completion: Completion) -> list:
    """A completion as text is judged by: what is wrong with its log-probabilities, the answer says."""
    return list(astuple(replace(completion, rollout_logprobs=())))


def request_to_json(request: RolloutRequest) -> list:
    """What `request_from_json` reads."""
    sampling = list(astuple(request.sampling))
    return [request.prompt_id, request.sample_index, request.token_ids, sampling, request.seed, request.num_sampled]


def request_from_json(item: list) -> RolloutRequest:
    """A request as a control message holds it."""
    prompt_id, sample_index, token_ids, sampling, seed, num_sampled = item
    return RolloutRequest(prompt_id, sample_index, tuple(token_ids), Sampling.from_list(sampling), seed, num_sampled)


# --- generators for a trainer elsewhere ---


def join(file: Path, num_replicas: int) -> int:
    """Start replicas on this node for the trainer that wrote `file`, and stay until it leaves. 0 replicas: as many as fit its GPUs."""
    import torch

    told = json.loads(read_private(file))
    token = bytes.fromhex(told["token"])
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    tensor = told["tensor_parallel"]
    fitting = num_devices // tensor if num_devices else 1
    if num_devices and (num_replicas or 1) > fitting:
        raise RolloutError(
            f"{num_replicas or 1} replicas of rollout.tensor_parallel {tensor} do not fit the {num_devices} GPUs of this node:"
            " lower --replicas or rollout.tensor_parallel"
        )
    wanted = num_replicas or fitting
    channel = connect(told["address"], token, {"kind": "node", "replicas": wanted, "host": socket.gethostname()})
    numbers = channel.receive(REPLY_TIMEOUT_S)["replicas"]
    if not numbers:
        print("megarl: the trainer has all the generators it asked for", file=sys.stderr)
        return 0
    with tempfile.TemporaryDirectory(prefix="megarl-generators-") as folder:
        token_path = Path(folder) / "token"
        write_private(token_path, token.hex())
        replicas = [
            Children(Replica(number, devices_of(index, tensor, 0, num_devices), told["address"], token_path, Path(folder)))
            for index, number in enumerate(numbers)
        ]
        try:
            channel.receive(None)
        except RolloutError:
            pass  # the trainer has left
        finally:
            for replica in replicas:
                replica.stop()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m megarl.rollout.worker", description="Generators in processes of their own.")
    parser.add_argument("--join", type=Path, metavar="FILE", help="bring generators on this node to the trainer that wrote FILE")
    parser.add_argument("--replicas", type=int, default=0, metavar="N", help="with --join: so many on this node [as many as fit its GPUs]")
    for name, kind in {"control": str, "token-file": Path, "replica": int, "rank": int, "rendezvous": Path}.items():
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without waiting for threads of vLLM
