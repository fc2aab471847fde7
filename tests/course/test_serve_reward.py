"""`megarl serve-reward` as users start it: what a PPO step gets from it over HTTP is what the reward model itself gives inside training."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import torch

from tests.faults.started import listening
from tests.ranks import run_ranks
from tests.tiny_hf import save_tiny
from tests.unit.text_files import character_tokenizer_directory

ROOT = Path(__file__).parents[2]
TEXTS = [("1+1=", "2"), ("12+30=", "42"), ("What is it? ", ""), ("", "no prompt"), ("two\nlines ", "of text, and more of it")]
TOLERANCE = 1e-5


@dataclass
class Process:
    """A server and what it has said so far."""

    process: subprocess.Popen
    said: list[str] = field(default_factory=list)

    def url(self, word: str = "reward model", timeout_s: float = 120) -> str:
        """Its address, once it has said `word`."""
        deadline = time.monotonic() + timeout_s
        while not (found := re.search(rf"megarl: {word}.*(http://\S+/score)", "".join(self.said))):
            assert self.process.poll() is None and time.monotonic() < deadline, "".join(self.said)
            time.sleep(0.05)
        return found[1]

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@contextlib.contextmanager
def server(*arguments: object, command: tuple[str, ...] = (sys.executable, "-m", "megarl"), **environment: str) -> Iterator[Process]:
    """`megarl serve-reward ARGUMENTS --port 0`; gone afterwards."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MEGARL_", "RANK", "WORLD_SIZE"))}
    process = subprocess.Popen(
        [*command, "serve-reward", *map(str, arguments), "--port", "0"],
        cwd=ROOT,
        env=kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    state = Process(process)
    reader = threading.Thread(target=lambda: state.said.extend(iter(process.stdout.readline, "")), daemon=True)
    reader.start()
    try:
        yield state
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(10)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A Hugging Face reward model with its tokenizer."""
    return character_tokenizer_directory(save_tiny("llama-critic", tmp_path_factory.mktemp("served")))


def by_transformers(path: Path) -> list[float]:
    from transformers import AutoModelForSequenceClassification

    from megarl.data.tokenizers import load_tokenizer

    scorer = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    texts = load_tokenizer(path)
    rows = [[*texts.encode(prompt + response), texts.eos_id] for prompt, response in TEXTS]
    with torch.no_grad():
        return [float(scorer(torch.tensor([row])).logits) for row in rows]


def judged(rank: int, world_size: int, path: Path, urls: list[str], token_file: Path) -> dict[str, list[float]]:
    """A PPO step's rewards: each response judged by the model itself and by its servers, as a run's configuration asks for them."""
    from megarl.config import PpoRun
    from megarl.data.tokenizers import load_tokenizer
    from megarl.parallel import groups
    from megarl.parallel.memory import Phases
    from megarl.parallel.phases import offload_of
    from megarl.ppo.judge import Judge
    from megarl.ppo.terms import TermBuilder
    from megarl.records import Completion, Prompt
    from megarl.rewards.scorer import WeightedSum
    from megarl.rollout.scripted import ScriptedEngine

    servers = [{"kind": "http", "urls": [url], "per_request": 2, "token_file": token_file, "timeout_s": 60} for url in urls]
    values = {
        "output_dir": path / "out",
        "tokenizer": path,
        "precision": "fp32",
        "actor": {"path": path},
        "data": {"path": path},
        "rollout": {"prompts_per_step": 1, "max_response_tokens": 40},
        "ppo": {"total_steps": 1, "minibatch_size": 1},
        "rewards": [{"kind": "model", "path": path}, *servers],
    }
    run = PpoRun.model_validate(values)
    layout = groups.initialize(run.parallel, run.seed)
    texts = load_tokenizer(path)
    memory = Phases(ScriptedEngine(lambda request: ((), ())), offload_of(run, False), lambda: None)
    judge = Judge(WeightedSum(TermBuilder(run, layout, texts, memory).terms("rewards", run.rewards)), texts, layout)
    prompts = [Prompt(i, tuple(texts.encode_prompt(prompt)), text=prompt) for i, (prompt, _) in enumerate(TEXTS)]
    ids = [(*texts.encode(response), texts.eos_id) for _, response in TEXTS]
    completions = [Completion(i, 0, row, (0.0,) * len(row), "stop", 0) for i, row in enumerate(ids)]
    found = judge.trajectories(prompts, completions)
    return {name: [trajectory.reward_parts[name] for trajectory in found] for name in found[0].reward_parts}


def same(found: list[float], expected: list[float]) -> bool:
    return found == pytest.approx(expected, abs=TOLERANCE) and max(expected) - min(expected) > 1000 * TOLERANCE


def test_a_ppo_step_gets_over_http_what_the_model_gives_it(model, tmp_path):
    token = tmp_path / "token"
    token.write_text("canary-123")
    token.chmod(0o600)
    with server(model, "--precision", "fp32", "--token-file", token) as running:
        url = running.url("listening")  # the model is still loading: clients come again
        (found,) = run_ranks(judged, 1, model, [url], token)
        assert same(found["http"], found["model"]) and same(found["model"], by_transformers(model))
        assert httpx.get(url.replace("/score", "/health"), trust_env=False).json() == {"status": "ready"}
        assert httpx.post(url, json={"query": ["1+1=2"]}, trust_env=False).status_code == 401
        assert {address for _, address in listening([running.process.pid])} == {"127.0.0.1"}
        assert b"canary" not in Path(f"/proc/{running.process.pid}/cmdline").read_bytes()
        assert running.stop() == 0
    said = "".join(running.said)
    assert said.count("\n") == 2 and f"megarl: reward model {model} at {url} (with a token)\n" in said and "canary" not in said


@pytest.mark.slow
def test_own_checkpoints_and_tensor_parallel_servers_give_the_same(model, tmp_path):
    from megarl.checkpoint.hf_export import export
    from megarl.checkpoint.hf_import import import_hf

    token = tmp_path / "token"
    token.write_text("canary-123")
    token.chmod(0o600)
    checkpoint = import_hf(model, tmp_path / "own")
    exported = export(checkpoint, tmp_path / "exported")
    options = ("--precision", "fp32", "--token-file", token)
    launched, ranks = ("bash", str(ROOT / "launch/torchrun.sh")), {"NPROC": "2", "MEGARL_VENV": "none", "MEGARL_PYTHON": sys.executable}
    with (
        server(checkpoint, *options) as one,
        server(exported, *options) as two,
        server(checkpoint, *options, command=launched, MEGARL_HOST_GPUS="0", **ranks) as spread,
    ):
        (found,) = run_ranks(judged, 1, model, [each.url() for each in (one, two, spread)], token)
        assert all(same(found[name], found["model"]) for name in ("http", "http_2", "http_3"))
        assert one.stop() == 0 and two.stop(signal.SIGINT) == 0
        spread.stop()
        assert "Traceback" not in "".join(spread.said)


@pytest.mark.slow
def test_mistakes_about_the_model_are_one_line(model, tmp_path):
    from tests.tiny_hf import save_tiny

    language_model = character_tokenizer_directory(save_tiny("llama", tmp_path))
    bare = save_tiny("llama-critic", tmp_path)
    template = character_tokenizer_directory(save_tiny("qwen3-critic", tmp_path), template=None)
    for arguments, code, words in (
        ((tmp_path / "nothing",), 2, "does not exist; expected a Hugging Face directory or a megarl checkpoint"),
        ((language_model,), 2, "holds no score.weight; expected a trained reward model"),
        ((bare,), 65, "holds no tokenizer.json"),
        ((template, "--chat-template"), 65, "no chat_template"),
        ((template, "--max-tokens", "65"), 78, "--max-tokens: found 65; expected at most 64, the positions of"),
    ):
        with server(*arguments) as running:
            assert running.process.wait(60) == code
        assert words in "".join(running.said) and "Traceback" not in "".join(running.said)
