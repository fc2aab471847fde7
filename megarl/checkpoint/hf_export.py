"""From a checkpoint to a Hugging Face directory, one tensor at a time: `megarl export CHECKPOINT OUT`."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoTokenizer

from megarl.checkpoint import manifest as manifests
from megarl.checkpoint.manifest import Manifest, StoredTokenizer
from megarl.checkpoint.publish import start_output
from megarl.checkpoint.sharded import TensorEntry, cover_faults, sync, whole, write_tensors, write_text
from megarl.checkpoint.sources import INDEX, CheckpointSource
from megarl.errors import CheckpointError, SetupError
from megarl.models.family import FAMILIES, ModelSpec, read_spec

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
CONFIG_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES.values()}
PROBES = ("12+3=15", "The quick brown fox, isn't it?", "  two  spaces\n", "caf\u00e9 \u4f60\u597d")
MAX_SHARD_BYTES = 5_000_000_000


def export(checkpoint: Path, out: Path, model: str | None = None, dtype: str | None = None, max_shard_bytes: int = MAX_SHARD_BYTES) -> Path:
    """Write the model of a checkpoint as `transformers` and vLLM read it, and return `out`.

    Args: `checkpoint` is a checkpoint or a run's output directory (its newest one); `model` a name in it (default: `actor`, else the only
    one); `dtype` `bf16`, `fp32` or `fp16` (default: as stored). At no time is more than one tensor in memory.
    Raises `CheckpointError` (missing, damaged, incomplete) or `SetupError` (`out` exists, no room), with nothing left behind.
    """
    directory = manifests.find_checkpoint(Path(checkpoint))
    if directory is None:
        raise CheckpointError(
            f"{checkpoint} is no checkpoint and holds none (checkpoints/step-*): expected a directory with {manifests.MANIFEST}"
        )
    manifest = manifests.read_manifest(directory)
    model = _choose(directory, manifest, model)
    spec, source = read_spec(directory / model), CheckpointSource(directory, model)
    shapes = manifest.models[model].shapes
    _check_complete(directory, manifest, model, spec)
    entries = [TensorEntry(name, _dtype(dtype, source.dtype(name)), tuple(shape)) for name, shape in shapes.items()]
    out = Path(out)
    staging = start_output(out, sum(entry.num_bytes for entry in entries), "the export", "export")
    try:
        write_shards(staging, entries, lambda entry: source.read(entry.key, whole(entry.shape)), max_shard_bytes)
        _write_configs(staging, directory, manifest, model, spec, _common_dtype(entries))
        sync(staging)
        os.replace(staging, out)  # an empty directory may be replaced
        sync(out.parent)
    except OSError as error:
        raise SetupError(f"{error.filename or out}: {error.strerror}: the export was not written") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return out


def plan_shards(entries: list[TensorEntry], max_shard_bytes: int) -> list[list[TensorEntry]]:
    """Consecutive tensors in files of at most `max_shard_bytes`; a larger tensor gets its own file."""
    shards: list[list[TensorEntry]] = [[]]
    room = max_shard_bytes
    for entry in entries:
        if entry.num_bytes > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(entry)
        room -= entry.num_bytes
    return shards


def write_shards(directory: Path, entries: list[TensorEntry], produce: Callable[[TensorEntry], torch.Tensor], max_shard_bytes: int) -> None:
    """Write `model-00001-of-0000N.safetensors` files and their index."""
    shards = plan_shards(entries, max_shard_bytes)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(directory / name, shard, produce, metadata={"format": "pt"})
        weight_map |= {entry.key: name for entry in shard}
    total = sum(entry.num_bytes for entry in entries)
    write_text(directory / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True))


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
    ends = config.get("eos_token_id")
    ids = {name: value for name, value in _token_ids(tokens).items() if value is not None}
    if isinstance(ends, list) and tokens.eos_id in ends:
        ids["eos_token_id"] = ends  # a model with several end tokens keeps them all
    return config | ids


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


def _write_configs(staging: Path, directory: Path, manifest: Manifest, model: str, spec: ModelSpec, dtype: torch.dtype) -> None:
    is_scalar_head = manifests.ROLES[model] == "critic"
    config = hf_config(spec, is_scalar_head, dtype, manifest.tokenizer)
    write_text(staging / "config.json", json.dumps(config, indent=2))
    if not is_scalar_head:
        tokens = {name: config[name] for name in _token_ids(manifest.tokenizer) if config.get(name) is not None}
        write_text(staging / "generation_config.json", json.dumps(tokens, indent=2))
    for path, file in manifest.files_of("tokenizer").items():
        manifests.verify(directory, path, file)
        target = staging / Path(path).relative_to("tokenizer")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(directory / path, target)
        sync(target)
    note = tokenizer_note(directory / "tokenizer", staging) if manifest.files_of("tokenizer") else ""
    if note:
        print(f"megarl: warning: {note}", file=sys.stderr)
    made = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    write_text(
        staging / "README.md",
        f"# {spec.family} model trained with megarl\n\nModel `{model}` of a `{manifest.course}` run after {manifest.state['step']} steps"
        f" ({CONFIG_NAMES[dtype]}). Written by {made}.\n" + (f"\n{note}\n" if note else ""),
    )


def _choose(directory: Path, manifest: Manifest, model: str | None) -> str:
    names = sorted(manifest.models)
    if model is None:
        model = "actor" if "actor" in names or len(names) != 1 else names[0]
    if model not in names:
        raise CheckpointError(f"{directory} holds the models {names}; expected {model!r}")
    return model


def _check_complete(directory: Path, manifest: Manifest, model: str, spec: ModelSpec) -> None:
    """Every tensor of the family's table, each element exactly once."""
    stored = manifest.models[model]
    shapes = {name: tuple(shape) for name, shape in spec.table(manifests.ROLES[model]).hf_shapes.items()}
    boxes = [(tensor.name, tensor.box) for file in manifest.files_of("weights", model).values() for tensor in file.tensors]
    faults = cover_faults(shapes, boxes)
    if shapes != {name: tuple(shape) for name, shape in stored.shapes.items()}:
        faults.insert(0, "its tensor shapes are not those of its config.json")
    if faults:
        raise CheckpointError(f"{directory}: model {model} is not complete: {'; '.join(faults[:3])}")


def _dtype(wanted: str | None, stored: torch.dtype) -> torch.dtype:
    if wanted is None:
        return stored
    if wanted not in DTYPES:
        raise SetupError(f"export dtype is {wanted!r}; expected one of {sorted(DTYPES)}")
    return DTYPES[wanted]


def _common_dtype(entries: list[TensorEntry]) -> torch.dtype:
    """The dtype that config.json names: of most bytes."""
    totals: dict[torch.dtype, int] = {}
    for entry in entries:
        totals[entry.dtype] = totals.get(entry.dtype, 0) + entry.num_bytes
    return max(totals, key=totals.__getitem__)


def _token_ids(tokens: StoredTokenizer) -> dict[str, int | None]:
    return {"bos_token_id": tokens.bos_id, "eos_token_id": tokens.eos_id, "pad_token_id": tokens.pad_id}
