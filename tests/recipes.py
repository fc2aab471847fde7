"""The runs in configs/: what starts each, a folder in which all of their paths exist at toy size, and overrides that make them short."""

import gzip
import json
import random
import re
from pathlib import Path

import numpy
from safetensors.numpy import save_file

from megarl.config import LessonRun, PpoRun, Run, SampleRun
from megarl.config_file import RUNS
from megarl.models.family import read_spec
from megarl.quickstart.make_data import MODEL_CONFIG, make_data
from tests.unit.text_files import character_tokenizer_directory, write_lines

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml"))

SHAPE = {  # fits every layout of the recipes: tensor 8, pipeline 4
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 104,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}


def kind_of(recipe: Path) -> str:
    """The command that its comment starts it with: a recipe without one is of no use."""
    kinds = re.findall(rf"\b({'|'.join(RUNS)}) {re.escape(recipe.as_posix())}", (ROOT / recipe).read_text(encoding="utf-8"))
    assert len(set(kinds)) == 1, f"{recipe} names no command such as: bash launch/torchrun.sh ppo {recipe}"
    return kinds[0]


# ---------------------------------------------------------------- stand-ins
def write_world(root: Path) -> Path:
    """What the recipes read from outside, below `root` under the names they use; what a recipe gets from another one is not there."""
    for name in ("llama3-8b", "llama3-8b-instruct", "llama3-70b"):
        write_model(root / "weights" / name, "actor")
        character_tokenizer_directory(root / "weights" / name)
        (root / "configs" / "models" / name).mkdir(parents=True)
        (root / "configs" / "models" / name / "config.json").write_text(json.dumps(SHAPE))
    for name in ("train", "test"):
        (root / "data" / "gsm8k").mkdir(parents=True, exist_ok=True)
        write_lines(root / "data" / "gsm8k" / f"{name}.jsonl", [word_problem(3 * i + len(name), i + 2) for i in range(12)])
        for topic in ("helpful-base", "harmless-base"):
            path = root / "data" / "hh-rlhf" / topic / f"{name}.jsonl.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress("".join(json.dumps(dialogue(topic, i)) + "\n" for i in range(12)).encode()))
    pairs = [{"prompt": f"Name {i}.", "chosen": f"It is {i}.", "rejected": "No."} for i in range(12)]
    chats = [{"messages": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": f"{i}!"}]} for i in range(12)]
    for name, rows in (("prompts", pairs), ("preferences", pairs), ("demonstrations", chats)):
        write_lines(root / "data" / f"{name}.jsonl", rows)
        write_lines(root / "data" / f"{name}_heldout.jsonl", rows)
    make_data(root / "runs" / "quickstart" / "data", seed=0)
    return root


def write_result(root: Path, kind: str, run: Run) -> None:
    """Something in the place of what `run` leaves behind, in Hugging Face's form."""
    output = root / run.output_dir
    if kind == "sample":
        output.mkdir(parents=True)
        write_lines(output / "samples.jsonl", [{"prompt": "1+1=", "responses": ["2", "3"], "scores": [1.0, 0.0]}])
        return
    write_model(output, "critic" if kind == "reward" else "actor", MODEL_CONFIG if run.tokenizer.suffix == ".model" else SHAPE)


def write_model(directory: Path, role: str, shape: dict = SHAPE) -> None:
    """A Hugging Face directory with random weights; `role` critic: a sequence classifier with one label."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(shape))
    draw = numpy.random.default_rng(len(directory.name))
    shapes = read_spec(directory).table(role).hf_shapes.items()
    tensors = {name: draw.normal(1.0 if "norm" in name else 0.0, 0.05, shape).astype(numpy.float32) for name, shape in shapes}
    save_file(tensors, directory / "model.safetensors")


def word_problem(boxes: int, eggs: int) -> dict[str, str]:
    """A row in the form of GSM8K: reasoning with calculator marks, and the answer behind ####."""
    total = boxes * eggs
    question = f"Ida packs {boxes} boxes with {eggs} eggs each. How many eggs?"
    return {"question": question, "answer": f"She packs {boxes}*{eggs} = <<{boxes}*{eggs}={total}>>{total} eggs.\n#### {total:,}"}


def dialogue(topic: str, number: int) -> dict[str, str]:
    """A row in the form of HH-RLHF: two dialogues that differ in their last answer."""
    draw = random.Random(f"{topic}/{number}")
    opening = f"\n\nHuman: Is {number} {topic[:7]}?" + f"\n\nAssistant: Perhaps.\n\nHuman: Say more about {number}." * draw.randint(0, 1)
    return {"chosen": f"{opening}\n\nAssistant: It is {draw.randint(2, 99)}.", "rejected": f"{opening}\n\nAssistant: Ask them."}


# ---------------------------------------------------------------- shorter runs
def shortened(run: Run, tensor: int, pipeline: int) -> list[str]:
    """Overrides that leave a recipe what it is and make it two steps of a few short sequences on tensor x pipeline ranks."""
    found = ["cluster=null", f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", f"parallel.sequence={str(tensor > 1).lower()}"]
    found += [f"parallel.microbatch_size={max(2, run.sequences_per_row) if isinstance(run, LessonRun) else 2}"]
    if run.parallel.max_tokens_per_microbatch:
        found.append("parallel.max_tokens_per_microbatch=1024")
    if isinstance(run, LessonRun):
        found += ["train.total_steps=2", "train.batch_size=4", f"data.max_tokens={min(run.data.max_tokens, 256)}"]
        return found + ["train.eval_every_steps=1"] * bool(run.train.eval_every_steps)
    assert isinstance(run, PpoRun | SampleRun)
    samples = min(run.rollout.samples_per_prompt, 2)
    found += ["rollout.tensor_parallel=1", "rollout.prompts_per_step=4", f"rollout.samples_per_prompt={samples}"]
    found += [f"data.max_prompt_tokens={min(run.data.max_prompt_tokens, 192)}", f"rollout.kv_cache_bytes={16 << 20}"]
    found += [f"rollout.max_response_tokens={min(run.rollout.max_response_tokens, 8)}"]
    if isinstance(run, SampleRun):
        return [*found, "sample.num_prompts=8"]
    found += ["ppo.total_steps=2", f"ppo.minibatch_size={2 * samples}", f"ppo.critic_warmup_steps={min(run.ppo.critic_warmup_steps, 1)}"]
    if run.eval is not None:
        found += ["eval.every_steps=1", "eval.num_prompts=3"]
        for i, held_out in enumerate(run.eval.sets):
            found += [f"eval.sets.{i}.num_prompts=3", f"eval.sets.{i}.samples={min(held_out.samples, 2)}"]
            found += [f"eval.sets.{i}.data.max_prompt_tokens={min(held_out.data.max_prompt_tokens, 192)}"]
    return found
