"""What scoring beside the sampler saves: whole PPO steps with responses scored as they finish, and scored after the last one has.

`python -m benchmarks.scoring_overlap [--quick] [--json PATH]`

One rank, a small Llama with random weights, real vLLM. One token in 64 ends a response, so that they end at different times, most of them
early. Two slow judges: a Python function that thinks about one response at a time, and an HTTP server on loopback that has four requests
to think about at a time. The two orders take turns on the same step: prompts, seeds and weights are equal, and so must the rewards be.
A step is all that the loop does in one: sampling, scoring, learning, publishing.
"""

import io
import json
import random
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any

import sentencepiece

from benchmarks.table import alternating, main
from megarl.checkpoint.train_state import TrainState
from megarl.config import PpoRun
from megarl.metrics import Metrics
from megarl.parallel import groups
from megarl.ppo.assembly import build_parts
from megarl.ppo.loop import train
from megarl.ppo.parts import Parts
from megarl.records import Completion, RolloutRequest
from megarl.rollout.engine import Engine, OnFinished

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ012345678"
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
PROMPTS, SAMPLES, LONGEST = 16, 4, 256
SECONDS_EACH = {"function": 0.05, "http": 0.2}  # of judging a response; the server judges those of four requests side by side

judged_at: list[float] = []  # when each score was there


def slow_function(prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str]) -> list[float]:
    """The share of a response's letters that are small, after a long thought about each."""
    scores = []
    for response in responses:
        time.sleep(SECONDS_EACH["function"])
        scores.append(sum(letter.islower() for letter in response) / LONGEST)
        judged_at.append(time.monotonic())
    return scores


class SlowJudge(BaseHTTPRequestHandler):
    """The same as a server, in the form of `rewards` of kind http."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        scores = []
        for whole, prompt in zip(body["query"], body["prompts"], strict=True):
            time.sleep(SECONDS_EACH["http"])
            scores.append(sum(letter.islower() for letter in whole.removeprefix(prompt)) / LONGEST)
            judged_at.append(time.monotonic())
        reply = json.dumps({"rewards": scores}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def judges() -> Iterator[dict[str, dict]]:
    """The reward parts of both judges."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), SlowJudge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield {
            "function": {"kind": "function", "function": f"{__name__}:slow_function", "overlap": True},
            "http": {"kind": "http", "urls": [f"http://127.0.0.1:{server.server_port}/"], "per_request": 2},
        }
    finally:
        server.shutdown()
        server.server_close()


def write_files(root: Path) -> None:
    """Model shape, tokenizer with a token a letter, prompts."""
    (root / "model").mkdir()
    (root / "model" / "config.json").write_text(json.dumps(MODEL))
    letters, model = random.Random(0), io.BytesIO()
    texts = ["".join(letters.choices(LETTERS, k=12)) for _ in range(400)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts, LETTERS]),
        model_writer=model,
        model_type="char",
        vocab_size=MODEL["vocab_size"],
        hard_vocab_limit=False,
        character_coverage=1.0,
        add_dummy_prefix=False,
        minloglevel=2,
    )
    (root / "letters.model").write_bytes(model.getvalue())
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))


def run_of(root: Path, part: Mapping[str, Any]) -> PpoRun:
    """One step on these files that changes nothing: its learning rate is too small for float32."""
    return PpoRun.model_validate(
        {
            "output_dir": root / "run",
            "precision": "fp32",
            "tokenizer": root / "letters.model",
            "parallel": {"microbatch_size": 16},
            "actor": {"path": root / "model", "random_init": True, "optimizer": {"lr": 1e-30}},
            "rewards": [part],
            "log": {"samples": PROMPTS * SAMPLES},
            "data": {"path": root / "prompts.jsonl", "max_prompt_tokens": 16},
            "rollout": {
                "prompts_per_step": PROMPTS,
                "samples_per_prompt": SAMPLES,
                "max_response_tokens": LONGEST,
                "kv_cache_bytes": 64 << 20,
            },
            "ppo": {"total_steps": 1, "minibatch_size": PROMPTS * SAMPLES, "advantage": "rloo", "kl": {"coef": 0.0}},
        }
    )


@dataclass
class Watch:
    """In the place of the run's log and checkpoints, and around its sampler: when things happened in the newest step, and nothing kept."""

    written_at: list[float] = field(default_factory=list)
    finished_at: list[float] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    is_draining = False

    def around(self, engine: Engine) -> None:
        generate = engine.generate

        def watched(requests: Sequence[RolloutRequest], on_finished: OnFinished | None = None) -> list[Completion]:
            def heard(request: RolloutRequest, completion: Completion) -> None:
                self.finished_at.append(time.monotonic())
                if on_finished is not None:
                    on_finished(request, completion)

            return generate(requests, heard)

        engine.generate = watched

    def start(self, step: int) -> None:
        """A run begins."""
        self.written_at.clear()

    def write(self, step: int, metrics: Metrics, *samples: list[dict]) -> None:
        """Called before the first step and after it; what came before the first one is forgotten."""
        self.written_at.append(time.monotonic())
        self.samples = samples[0] if samples else []
        if step == 0:
            self.finished_at.clear()
            judged_at.clear()

    def restore_or_start(self, checkpointables: object, state: TrainState) -> TrainState:
        """Always from the start."""
        return state

    def due(self, state: TrainState, report: Metrics) -> bool:
        """Never."""
        return False


def take_turns(root: Path, part: Mapping[str, Any], repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Steps of both orders, the first of each to warm up: seconds, how many responses were judged before the last was sampled, rewards."""
    run = run_of(root, part)
    layout, watch = groups.initialize(run.parallel, run.seed), Watch()
    parts = replace(build_parts(run, layout), log=watch, checkpoints=watch)
    watch.around(parts.engine)
    orders = {"after": replace(parts, judge=replace(parts.judge, ahead=None)), "overlapping": parts}
    found: dict[str, list[dict[str, Any]]] = {order: [] for order in orders}

    def step(order: str, own: Parts) -> None:
        train(run, layout, own)
        began, last = watch.written_at[0], max(watch.finished_at)
        seconds = {"sampling_s": last - began, "scoring_left_s": max(judged_at) - last, "step_s": watch.written_at[1] - began}
        found[order].append(seconds | {"scored_early": sum(at < last for at in judged_at), "samples": watch.samples})

    alternating({order: partial(step, order, own) for order, own in orders.items()}, repeats)
    return found


def compare(root: Path, name: str, part: Mapping[str, Any], repeats: int) -> list[dict[str, Any]]:
    """A row for each order, medians over its steps."""
    found = take_turns(root, part, repeats)
    samples = [step["samples"] for steps in found.values() for step in steps]
    assert all(len(told) == PROMPTS * SAMPLES and told == samples[0] for told in samples), "the orders' responses or rewards differ"
    rows: list[dict[str, Any]] = []
    for order, steps in found.items():
        middle = {key: median(step[key] for step in steps[1:]) for key in ("sampling_s", "scoring_left_s", "step_s", "scored_early")}
        early = f"{middle.pop('scored_early'):.0f} of {PROMPTS * SAMPLES}"
        rows.append({"judge": name, "scoring": order, **middle, "over_after": 1.0, "scored_early": early})
        rows[-1]["over_after"] = rows[-1]["step_s"] / rows[0]["step_s"]
    return rows


def measure(quick: bool) -> Mapping[str, Any]:
    """Rows of all judges and orders."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="megarl-overlap-") as scratch, judges() as parts:
        write_files(Path(scratch))
        for name, part in parts.items():
            rows += compare(Path(scratch), name, part, 1 if quick else 5)
    groups.shutdown()
    return {
        "steps": rows,
        "responses": f"{PROMPTS} prompts x {SAMPLES} samples of up to {LONGEST} tokens",
        "judges": ", ".join(f"{name} {seconds:g} s a response" for name, seconds in SECONDS_EACH.items()),
        "rewards": "equal in both orders, response by response",
    }


if __name__ == "__main__":
    main("scoring_overlap", __doc__.splitlines()[0], measure)
