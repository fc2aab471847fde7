"""A tiny course on disk: sums as demonstrations and preference pairs, a tokenizer, a model shape, and runs that name them."""

import json
from pathlib import Path

from megarl.config import DpoRun, RewardRun, RrhfRun, SftRun
from tests.unit.text_files import sentencepiece_file, write_lines

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def write_files(root: Path, **shape: object) -> Path:
    """Everything the runs below read; returns `root`."""
    (root / "shape").mkdir(parents=True)
    (root / "shape" / "config.json").write_text(json.dumps(SHAPE | shape))
    sums = [(a, b) for a in range(10) for b in range(10)]
    sentencepiece_file(root / "sp.model", [f"{a}+{b}={a + b}" for a, b in sums], vocab_size=40, model_type="char")
    rows = [{"prompt": f"{a}+{b}=", "response": str(a + b), "chosen": str(a + b), "rejected": str(a * b + 1)} for a, b in sums]
    rows = [row for row in rows if row["chosen"] != row["rejected"]]
    write_lines(root / "train.jsonl", rows[::2])
    write_lines(root / "held_out.jsonl", rows[1::2])
    lists = [ranked(a, b) for a, b in sums]
    write_lines(root / "lists.jsonl", lists[::2])
    write_lines(root / "held_out_lists.jsonl", lists[1::2])
    return root


def ranked(a: int, b: int) -> dict:
    """Two to four answers, the better the nearer; two of them may be equally good."""
    guesses = [a + b, a * b + 1, a + b + 7, 3][: 2 + (a + b) % 3]
    return {"prompt": f"{a}+{b}=", "responses": [str(guess) for guess in guesses], "scores": [-abs(guess - a - b) for guess in guesses]}


def settings(root: Path, output: str, steps: int, **changes: object) -> dict:
    """The keys of a lesson's run in `root`/`output`."""
    return {
        "output_dir": root / output,
        "tokenizer": root / "sp.model",
        "precision": "fp32",
        "parallel": {"microbatch_size": 4},
        "model": {"path": root / "shape", "random_init": True, "optimizer": {"lr": 1e-2, "schedule": "cosine", "warmup_steps": 2}},
        "data": {"path": root / "train.jsonl", "eval_path": root / "held_out.jsonl", "max_tokens": 16},
        "train": {"total_steps": steps, "batch_size": 16, "eval_every_steps": 4},
    } | changes


def sft_run(root: Path, output: str, steps: int, **changes: object) -> SftRun:
    """Fine-tuning from random weights."""
    return SftRun.model_validate(settings(root, output, steps, **changes))


def reward_run(root: Path, output: str, steps: int, **changes: object) -> RewardRun:
    """A reward model; `model` says from what."""
    return RewardRun.model_validate(settings(root, output, steps, **changes))


def dpo_run(root: Path, output: str, steps: int, **changes: object) -> DpoRun:
    """A policy that learns pairs; `model` says from what."""
    return DpoRun.model_validate(settings(root, output, steps, **changes))


def rrhf_run(root: Path, output: str, steps: int, **changes: object) -> RrhfRun:
    """A policy that learns ranked lists, of two to four responses."""
    data = {"path": root / "lists.jsonl", "eval_path": root / "held_out_lists.jsonl", "max_tokens": 16}
    return RrhfRun.model_validate(settings(root, output, steps, **{"data": data, "rrhf": {"max_responses": 4}} | changes))


def read_metrics(root: Path, output: str) -> dict[int, dict[str, float]]:
    """Metrics by step, without the seconds."""
    lines = [json.loads(line) for line in (root / output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: {name: value for name, value in line.items() if not name.startswith(("seconds", "step"))} for line in lines}
