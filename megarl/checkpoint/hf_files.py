"""What lies beside the weights of an exported model: config.json, generation_config.json, the index, the tokenizer."""

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer

from megarl.checkpoint import manifest as manifests
from megarl.checkpoint.manifest import Manifest, StoredTokenizer
from megarl.checkpoint.publish import GENERATION
from megarl.checkpoint.sharded import TensorEntry, sync, write_text
from megarl.checkpoint.sources import INDEX
from megarl.models.family import FAMILIES, ModelSpec

CONFIG_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float16: "float16"}
PROBES = ("12+3=15", "The quick brown fox, isn't it?", "  two  spaces\n", "caf\u00e9 \u4f60\u597d")


def hf_config(spec: ModelSpec, is_scalar_head: bool, dtype: torch.dtype, tokens: StoredTokenizer) -> dict:
    """The `config.json` of an exported model: what the model was read from, with the head, dtype and special tokens it has now."""
    config = {key: value for key, value in spec.hf_config.items() if key not in ("torch_dtype", "dtype", "num_labels", "_name_or_path")}
    causal, classifier = FAMILIES[spec.family].architectures
    config["architectures"] = [classifier if is_scalar_head else causal]
    config["dtype"] = CONFIG_NAMES[dtype]
    if is_scalar_head:
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    else:
        config = {key: value for key, value in config.items() if key not in ("id2label", "label2id")}
    return config | special_ids(tokens, config.get("eos_token_id"))


def special_ids(tokens: StoredTokenizer, ends: int | list[int] | None) -> dict[str, int | list[int]]:
    """The special tokens' ids of a configuration; a model with several end tokens keeps them all."""
    ids = {"bos_token_id": tokens.bos_id, "eos_token_id": tokens.eos_id, "pad_token_id": tokens.pad_id}
    if isinstance(ends, list) and tokens.eos_id in ends:
        ids["eos_token_id"] = ends
    return {name: value for name, value in ids.items() if value is not None}


def write_generation_config(staging: Path, stored: Path, config: dict) -> None:
    """Write generation_config.json: the one the model came with (`stored`, when it is there), with the special tokens of `config`."""
    values = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else {}
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(name) is not None}
    write_text(staging / GENERATION, json.dumps(values | ids, indent=2))


def write_index(staging: Path, shards: dict[str, list[TensorEntry]]) -> None:
    """Write the index of the weights: `shards` are the tensors of each file."""
    total = sum(entry.num_bytes for held in shards.values() for entry in held)
    weight_map = {entry.key: name for name, held in shards.items() for entry in held}
    write_text(staging / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True))


def copy_tokenizer(staging: Path, directory: Path, manifest: Manifest) -> str:
    """Copy the checkpoint's tokenizer, verified; returns `tokenizer_note` of the result."""
    files = manifest.files_of("tokenizer")
    for path, file in files.items():
        manifests.verify(directory, path, file)
        target = staging / Path(path).relative_to("tokenizer")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(directory / path, target)
        sync(target)
    return tokenizer_note(directory / "tokenizer", staging) if files else ""


def tokenizer_note(own: Path, exported: Path) -> str:
    """What a user must know when `AutoTokenizer` does not read the exported directory as the model was trained; empty when it does.

    transformers 5 ignores the tokenizer files' class for some model types (`MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS`, qwen2 among
    them) and lays its own rules over them, which changes the ids of a tokenizer of another kind.
    """
    ids = [AutoTokenizer.from_pretrained(path, local_files_only=True)(list(PROBES)).input_ids for path in (own, exported)]
    if ids[0] == ids[1]:
        return ""
    return (
        "AutoTokenizer reads this model type with rules of its own and gives other token ids than the model was trained with: load the"
        " tokenizer with transformers.PreTrainedTokenizerFast.from_pretrained(DIRECTORY) instead"
    )
