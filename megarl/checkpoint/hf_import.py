"""From a Hugging Face directory to a megarl checkpoint of weights, one tensor at a time: `megarl import HF_DIR OUT`."""

import os
import shutil
from pathlib import Path

from megarl.checkpoint.manifest import FORMAT, ROLES, Manifest, StoredFile, StoredLayout, StoredModel, StoredTensor
from megarl.checkpoint.publish import (
    publish,
    special_tokens,
    start_output,
    stored,
    versions,
    write_config,
    write_tokenizer,
)
from megarl.checkpoint.sharded import DTYPE_NAMES, TensorEntry, whole, write_tensors
from megarl.checkpoint.sources import SafetensorsSource, check_shapes
from megarl.checkpoint.train_state import TrainState
from megarl.data.tokenizers import check_vocabulary, load_tokenizer
from megarl.errors import SetupError
from megarl.models.decoder_table import SCALAR_HEAD
from megarl.models.family import read_spec


def import_hf(hf_dir: Path, out: Path, tokenizer: Path | None = None) -> Path:
    """Write a checkpoint with the weights of a Hugging Face directory, dtypes kept, and return `out`.

    The model is called `actor`, or `reward` where the directory holds a scalar head. The tokenizer is the directory's own unless another
    is named. Tensors that the family's table does not name (rotary caches, a tied head) are left out.
    Raises `WeightMapError`, `DataError` or `SetupError` (`out` exists, no room), with nothing left behind.
    """
    hf_dir, out = Path(hf_dir), Path(out)
    spec, source = read_spec(hf_dir), SafetensorsSource(hf_dir)
    model = "reward" if SCALAR_HEAD in set(source.names()) else "actor"
    shapes = {name: tuple(shape) for name, shape in spec.table(ROLES[model]).hf_shapes.items()}
    check_shapes(hf_dir, shapes, source)
    texts = load_tokenizer(tokenizer or hf_dir)
    check_vocabulary(texts, spec.vocab_size, hf_dir, "HF_DIR")
    entries = [TensorEntry(name, source.dtype(name), shape) for name, shape in shapes.items()]
    staging = start_output(out, sum(entry.num_bytes for entry in entries), "the import", "import")
    try:
        (staging / model).mkdir()
        files = _write_weights(staging, model, entries, source)
        files |= write_config(staging, model, spec.hf_config)
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
        )
        if out.exists():
            os.rmdir(out)
        publish(staging, out, manifest)
    except OSError as error:
        raise SetupError(f"{error.filename or out}: {error.strerror}: the import was not written") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return out


def _write_weights(staging: Path, model: str, entries: list[TensorEntry], source: SafetensorsSource) -> dict[str, StoredFile]:
    """One weights file for each file of the Hugging Face directory."""
    by_file: dict[str, list[TensorEntry]] = {}
    for entry in entries:
        by_file.setdefault(source.file_of(entry.key), []).append(entry)
    files = {}
    for number, held in enumerate(by_file.values()):
        path = f"{model}/weights-{number:05d}.safetensors"
        written = write_tensors(staging / path, held, lambda entry: source.read(entry.key, whole(entry.shape)))
        tensors = tuple(StoredTensor(key=e.key, name=e.key, box=whole(e.shape), dtype=DTYPE_NAMES[e.dtype]) for e in held)
        files[path] = stored("weights", written, model=model, tensors=tensors)
    return files
