"""The README of an exported model: what it is, where it comes from, how to load it, what was proven about it."""

import hashlib
import json
from pathlib import PurePath

from megarl.checkpoint.manifest import Manifest
from megarl.checkpoint.sharded import WrittenFile
from megarl.models.spec import ModelSpec

LOAD_ACTOR = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(DIRECTORY)
tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)"""
LOAD_REWARD = """\
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained(DIRECTORY)
tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
ids = tokenizer.encode(prompt + response, return_tensors="pt")
with torch.no_grad():
    score = model(ids).logits[0, 0]  # of the whole text: the head at its last token"""
LOAD_CRITIC = """\
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained(DIRECTORY)
tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
ids = tokenizer.encode(prompt + response, return_tensors="pt")
with torch.no_grad():
    hidden = model.base_model(ids).last_hidden_state
    values = model.score(hidden)[0, :, 0]  # entry t: the value after tokens 0 to t"""


def model_card(
    manifest: Manifest,
    model: str,
    spec: ModelSpec,
    dtype: str,
    files: dict[str, WrittenFile],
    proofs: list[str],
    note: str,
    is_average: bool = False,
) -> str:
    """The text of the README. `files` are the weights files, `proofs` sentences about what was checked, `note` one about the tokenizer.

    `is_average`: they hold the moving average of the weights.

    Of the run it names models and data by their last path component: where they lay is nobody's business.
    """
    base, task = base_model(manifest, model), "text-generation" if model == "actor" else "text-classification"
    front = ["---", "library_name: transformers", f"pipeline_tag: {task}", *([f"base_model: {json.dumps(base)}"] if base else [])]
    facts = {
        "Model": f"`{model}` of a `{manifest.course}` run, {spec.family}, {spec.num_parameters(_role(model)):,} parameters, {dtype}",
        **({"Weights": _averaged(manifest)} if is_average else {}),
        "Base model": f"{base}, whose licence and limits it inherits" if base else "none: weights drawn at random",
        "Data": ", ".join(data_files(manifest)) or "none",
        "Steps": f"{manifest.state['step']} ({manifest.state['prompts_consumed']} prompts or examples)",
        "Run configuration": f"SHA-256 {run_digest(manifest)}" if manifest.run else "none",
        "Layout": str(manifest.layout),
        "Versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }
    sections = [
        "\n".join([*front, "tags: [megarl]", "---"]),
        f"# {spec.family} {model} trained with megarl" if manifest.state["step"] else f"# {spec.family} {model}",
        "| | |\n|---|---|\n" + "\n".join(f"| {name} | {_cell(fact)} |" for name, fact in facts.items()),
        "## Load\n\n```python\n" + load_snippet(model) + "\n```" + (f"\n\n{note}" if note else ""),
        "## Checked before this directory got its name\n\n" + "\n".join(f"* {proof}" for proof in proofs),
        "## Files\n\n```\n" + "\n".join(f"{file.digest}  {name}" for name, file in files.items()) + "\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _averaged(manifest: Manifest) -> str:
    decay = ((manifest.run.get("ppo") or {}).get("ema") or {}).get("decay")
    return f"exponential moving average over the policy's updates (EMA), decay {decay}, not the policy's own weights"


def load_snippet(model: str) -> str:
    """Python that loads the exported model, DIRECTORY standing for its place."""
    return {"actor": LOAD_ACTOR, "critic": LOAD_CRITIC}.get(model, LOAD_REWARD)


def base_model(manifest: Manifest, model: str) -> str:
    """The name of what the model was trained from; empty for random weights."""
    section = manifest.run.get(model) or manifest.run.get("model") or manifest.run.get("imported") or {}
    return "" if section.get("random_init") else _name(section.get("path", ""))


def data_files(manifest: Manifest) -> list[str]:
    """Names of the training data's files."""
    path = (manifest.run.get("data") or {}).get("path")
    return [_name(path)] if path else []


def run_digest(manifest: Manifest) -> str:
    """SHA-256 of the run's configuration as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(manifest.run, sort_keys=True).encode()).hexdigest()


def _name(path: str) -> str:
    return PurePath(path).name


def _role(model: str) -> str:
    return "actor" if model == "actor" else "critic"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
