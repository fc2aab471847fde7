"""`megarl serve-reward`: its arguments, what is refused before anything heavy is loaded, and the life of the server."""

import argparse
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from megarl.errors import ConfigError
from megarl.file_commands import positive, size_in_bytes
from megarl.parallel.torchrun import rank_from_environment
from megarl.rewards.check import LOOPBACK
from megarl.rewards.token import TOKEN_VARIABLE, read_token
from megarl.serving.jobs import Jobs
from megarl.serving.server import Limits, RewardServer, address_of, is_loopback

SUMMARY = "a server that answers with the scores of a reward model, for rewards of kind http"
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def add_serve(command: argparse.ArgumentParser) -> None:
    """Arguments of `megarl serve-reward`."""
    command.add_argument(
        "path",
        metavar="PATH",
        type=Path,
        help="a run of megarl reward, one of its checkpoints, or a Hugging Face *ForSequenceClassification directory with one label",
    )
    command.add_argument("--tokenizer", type=Path, metavar="PATH", help="sentencepiece .model file or Hugging Face directory [the model's]")
    command.add_argument("--chat-template", action="store_true", help="put prompts into the tokenizer's template, as a user's message")
    command.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="what the model computes in [bf16]")
    command.add_argument("--host", default="127.0.0.1", help="address to listen at; beyond loopback with --expose and a token [127.0.0.1]")
    command.add_argument("--port", type=port, default=5000, help="0: one that is free, which is printed [5000]")
    command.add_argument("--expose", action="store_true", help="let --host be an address that other machines reach")
    command.add_argument(
        "--token-file", type=Path, metavar="FILE", help=f"file of mode 600 with the token that clients show [{TOKEN_VARIABLE}, where set]"
    )
    command.add_argument("--timeout", type=positive, default=60, metavar="S", help="seconds from a request to its scores [60]")
    command.add_argument("--max-queries", type=positive, default=256, metavar="N", help="texts a request [256]")
    command.add_argument("--max-body", type=size_in_bytes, default="8MiB", metavar="SIZE", help="bytes a request [8MiB]")
    command.add_argument("--max-tokens", type=positive, metavar="N", help="tokens a text [the model's positions]")
    command.add_argument("--microbatch-size", type=positive, default=8, metavar="N", help="texts the model computes at a time [8]")
    command.epilog = "Tensor parallel over several ranks: NPROC=4 bash launch/torchrun.sh serve-reward PATH"


def run_serve(parsed: argparse.Namespace) -> int:
    """`megarl serve-reward`: 0 when it was asked to stop, by SIGTERM or SIGINT, and everybody who waited has an answer."""
    os.environ["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE") or "1"
    server = open_server(parsed) if rank_from_environment()[0] == 0 else None
    from megarl.serving.model import load

    what = (parsed.path, parsed.tokenizer, parsed.precision, parsed.microbatch_size, parsed.max_tokens, parsed.chat_template)
    model = load(*what)
    if server is None:
        for number in SIGNALS:  # rank 0 says when it is over
            signal.signal(number, signal.SIG_IGN)
        model.answer(None)
        return 0
    listen_to_signals(server)
    server.status = "ready"
    secret = "no token" if server.token is None else "with a token"
    print(f"megarl: reward model {parsed.path} at {server.url} ({secret})", flush=True)
    model.answer(server.jobs)
    server.stop()
    return 0


def open_server(parsed: argparse.Namespace) -> RewardServer:
    """The server, which listens already and says that it is loading. Raises `ConfigError` for an address that is not safe."""
    address, token = address_of(parsed.host), read_token(parsed.token_file)
    if not is_loopback(address):
        wanted = [] if parsed.expose else ["--expose"]
        wanted += [] if token else [f"a token in --token-file or {TOKEN_VARIABLE}"]
        if wanted:
            text = f"--host: found {parsed.host}, which other machines reach; expected {' and '.join(wanted)}"
            raise ConfigError(f"{text}, or an address of this machine alone ({', '.join(LOOPBACK)})")
    limits = Limits(parsed.max_body, parsed.max_queries, parsed.timeout)
    server = RewardServer(address, parsed.port, Jobs(), limits, token)
    server.start()
    print(f"megarl: listening at {server.url}, loading {parsed.path}", file=sys.stderr, flush=True)
    return server


def listen_to_signals(server: RewardServer) -> None:
    """The first SIGTERM or SIGINT ends the queue, a second one the process."""

    def stop(number: int, frame: FrameType | None) -> None:
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)
        server.status = "stopping"
        server.jobs.close()

    for number in SIGNALS:
        signal.signal(number, stop)


def port(text: str) -> int:
    """A port number, 0 included."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a port, 0 to 65535")
    return int(text)


COMMANDS = {"serve-reward": (SUMMARY, add_serve, run_serve)}
