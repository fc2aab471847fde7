"""A complete small run on disk, in files a test may spoil: model shapes, prompts, a tokenizer's vocabulary, and its YAML."""

import json
from pathlib import Path

PPO = """\
output_dir: {root}/runs/ppo
tokenizer: {root}/tokenizer
parallel:
  tensor: 2
  pipeline: 2
  microbatch_size: 4
actor:
  path: {root}/actor
  random_init: true
critic:
  path: {root}/critic
  random_init: true
rewards:
  - kind: exact
data:
  path: {root}/prompts.jsonl
  max_prompt_tokens: 16
rollout:
  tensor_parallel: 2
  prompts_per_step: 8
  samples_per_prompt: 4
  max_response_tokens: 16
ppo:
  total_steps: 3
  minibatch_size: 16
"""

SFT = """\
output_dir: {root}/runs/sft
tokenizer: {root}/tokenizer
parallel:
  microbatch_size: 4
model:
  path: {root}/actor
  random_init: true
data:
  path: {root}/prompts.jsonl
  max_tokens: 64
train:
  total_steps: 3
  batch_size: 16
"""


def write_shape(directory: Path, **changes: object) -> None:
    """A Hugging Face directory with nothing but its config.json."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 120,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config | changes))


def write_tokenizer(directory: Path, num_tokens: int) -> None:
    """As much of a Hugging Face tokenizer as says how many tokens it has."""
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = {f"t{i}": i for i in range(num_tokens)}
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": []}))


def write_run(root: Path, text: str = PPO) -> Path:
    """The run and everything it names below `root`; returns its YAML file."""
    write_shape(root / "actor")
    write_shape(root / "critic")
    write_tokenizer(root / "tokenizer", 100)
    (root / "prompts.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    root.mkdir(parents=True, exist_ok=True)
    path = root / "run.yaml"
    path.write_text(text.format(root=root))
    return path
