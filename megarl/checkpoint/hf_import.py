"""From a Hugging Face directory to a megarl checkpoint of weights, a block of rows at a time: `megarl import HF_DIR OUT`."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megarl.checkpoint.export_proof import LOGITS_PARAMETERS, Proof, compare_logits
from megarl.checkpoint.hf_directory import check_tensors
from megarl.checkpoint.manifest import FORMAT, ROLES, Manifest, StoredFile, StoredLayout, StoredModel, StoredTensor
from megarl.checkpoint.publish import publish, special_tokens, start_output, stored, versions, write_config, write_tokenizer
from megarl.checkpoint.sharded import DTYPE_NAMES, TensorEntry, whole, write_tensors
from megarl.checkpoint.sources import CheckpointSource, SafetensorsSource, check_shapes, generation_config
from megarl.checkpoint.streams import MAX_SHARD_BYTES, first_difference, plan_shards, row_blocks, wanted_dtype
from megarl.checkpoint.train_state import TrainState
from megarl.data.tokenizers import Tokenizer, check_vocabulary, load_tokenizer
from megarl.errors import CheckpointError, SetupError, WeightMapError
from megarl.models.decoder_table import SCALAR_HEAD
from megarl.models.family import ModelSpec, read_spec
from megarl.models.pieces import TensorSource


def import_hf(hf_dir: Path, out: Path, tokenizer: Path | None = None, dtype: str | None = None, proof: Proof = "auto") -> Path:
    """Write a checkpoint with the weights of a Hugging Face directory and return `out`.

    The model is called `actor`, or `reward` where the directory holds a scalar head. The tokenizer is the directory's own unless another
    is named; generation_config.json is kept; `dtype` as for the export (default: as they are). A tied head and rotary frequencies
    are left out; any other tensor that the family's table does not list is refused. A block of rows is in memory at a time, and every
    element is read back and compared. With `proof` `logits`, or `auto` and a small reward model, transformers' scores (of a language
    model: logits) of fixed texts are first compared with those of our layers on the same tensors; `elements` leaves that out.
    Raises `WeightMapError` (also for code and pickles), `DataError` or `SetupError` (`out` exists, no room), with nothing left behind.
    """
    hf_dir = Path(hf_dir)
    spec = read_spec(hf_dir)
    refuse_code(hf_dir)
    source = SafetensorsSource(hf_dir)
    model = "reward" if SCALAR_HEAD in set(source.names()) else "actor"
    check_tensors(source, spec, ROLES[model])
    check_shapes(hf_dir, spec.table(ROLES[model]).hf_shapes, source)
    is_small = spec.num_parameters(ROLES[model]) <= LOGITS_PARAMETERS
    if proof == "logits" or (proof == "auto" and model == "reward" and is_small):
        compare_logits(hf_dir, spec, ROLES[model], source)
    return write_imported(Path(out), spec, model, source, load_tokenizer(tokenizer or hf_dir), hf_dir, {"path": hf_dir.name}, dtype)


def write_imported(
    out: Path,
    spec: ModelSpec,
    model: str,
    source: TensorSource,
    texts: Tokenizer,
    configs: Path,
    provenance: Mapping[str, Any],
    dtype: str | None = None,
) -> Path:
    """Write the weights of `source` as a checkpoint of `model`, read it back, and return `out`.

    `source` also tells the `dtype` of a tensor; `configs` is the directory whose generation_config.json is kept; `provenance` goes into
    the manifest's `run`. Raises as `import_hf` does.
    """
    check_vocabulary(texts, spec.vocab_size, configs, "HF_DIR")
    shapes = {name: tuple(shape) for name, shape in spec.table(ROLES[model]).hf_shapes.items()}
    entries = [TensorEntry(name, wanted_dtype(dtype, source.dtype(name)), shape) for name, shape in shapes.items()]
    staging = start_output(out, sum(entry.num_bytes for entry in entries), "the import", "import")
    try:
        (staging / model).mkdir()
        files = _write_weights(staging, model, entries, source)
        files |= write_config(staging, model, spec.hf_config, generation_config(configs, model))
        files |= write_tokenizer(staging, texts)
        manifest = Manifest(
            format=FORMAT,
            course="import",
            state=TrainState().to_json(),
            layout=StoredLayout(precision="as imported"),
            models={model: StoredModel(shapes=shapes)},
            files=files,
            tokenizer=special_tokens(texts),
            versions=versions(),
            run={"imported": dict(provenance)},
        )
        if out.exists():
            os.rmdir(out)
        publish(staging, out, manifest)
        _read_back(out, model, entries, source)
    except OSError as error:
        raise SetupError(f"{error.filename or out}: {error.strerror}: the import was not written") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return out


def refuse_code(directory: Path) -> None:
    """Raise `WeightMapError` when a model directory brings code along, or a configuration that asks for some."""
    if found := sorted(directory.rglob("*.py")):
        raise WeightMapError(f"{found[0]} is code, which megarl never runs: look at it, remove it, and import again")
    for path in sorted(directory.glob("*.json")):
        if not path.name.endswith("config.json"):
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise WeightMapError(f"{path} is not JSON: {error}") from error
        if isinstance(values, dict) and "auto_map" in values:
            raise WeightMapError(f"{path}: auto_map asks for code from the model's directory, which megarl never runs")


def _read_back(out: Path, model: str, entries: list[TensorEntry], source: TensorSource) -> None:
    if fault := first_difference(source, CheckpointSource(out, model), entries):
        shutil.rmtree(out)
        raise CheckpointError(f"{out}: {fault}: what was written is not what was read; it was removed again")


def _write_weights(staging: Path, model: str, entries: list[TensorEntry], source: TensorSource) -> dict[str, StoredFile]:
    files = {}
    for number, held in enumerate(plan_shards(entries, MAX_SHARD_BYTES)):
        path = f"{model}/weights-{number:05d}.safetensors"
        written = write_tensors(staging / path, held, lambda entry: row_blocks(source, entry))
        tensors = tuple(StoredTensor(key=e.key, name=e.key, box=whole(e.shape), dtype=DTYPE_NAMES[e.dtype]) for e in held)
        files[path] = stored("weights", written, model=model, tensors=tensors)
    return files
