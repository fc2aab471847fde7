"""From a Megatron-LM checkpoint to a megarl one: `megarl import DIR OUT --from-megatron --hf-config HF_DIR`.

The family's weight table says where the rows of every Hugging Face tensor lie in Megatron's tensors; it is the table that training,
export and the bridge use. Megatron's names carry the layer in an axis, in the name, or in the name with gate and up projection apart.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megarl.bridge.boxes import Box
from megarl.checkpoint.hf_import import refuse_code, write_imported
from megarl.checkpoint.megatron_dist import DistCheckpoint
from megarl.data.tokenizers import load_tokenizer
from megarl.errors import CheckpointError, WeightMapError
from megarl.models.decoder_table import IN_LAYERS
from megarl.models.family import ModelSpec, read_spec

EMBEDDING = "embedding.word_embeddings.weight"
EXPERTS = "mlp.experts.experts."
PADDED = (EMBEDDING, "output_layer.weight")  # rows past the vocabulary mean nothing
OTHERS = ("optimizer", "chained_", "rng_state", "rerun_state", "opt_param_scheduler")  # what a checkpoint holds beside the model


@dataclass(frozen=True)
class Stretch:
    """Rows [hf_row, hf_row + num_rows) of a Hugging Face tensor are rows from `row` of Megatron's `key`, at `indices` of its axes."""

    hf_row: int
    num_rows: int
    key: str
    indices: tuple[int, ...]
    row: int


class MegatronSource:
    """A language model's tensors by Hugging Face name, read from a Megatron-LM checkpoint as they are asked for.

    Raises `WeightMapError` when the checkpoint is not of the model that `spec` describes: a tensor is missing, left over, or of another
    shape.
    """

    def __init__(self, directory: Path, spec: ModelSpec):
        self.checkpoint = DistCheckpoint(directory)
        self.directory, self.spec = self.checkpoint.directory, spec
        self.table = spec.table("actor")
        keys = [key for key in self.checkpoint.tensors if key.endswith(EMBEDDING) and not key.startswith(OTHERS)]
        if len(keys) != 1:
            raise WeightMapError(f"{self.directory} holds {len(keys)} tensors called {EMBEDDING}; expected a language model of Megatron")
        self.prefix = keys[0].removesuffix(EMBEDDING)
        self.used: set[str] = set()
        self.stretches: dict[str, list[Stretch]] = {name: [] for name in self.table.hf_shapes}
        for key in self.table.entries:
            for indices in self._positions(key):
                self._add(key, indices)
        self._refuse_the_rest()

    def names(self) -> Iterable[str]:
        """Every tensor of the family's table."""
        return self.stretches.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape."""
        return self.table.hf_shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """The stored type."""
        return self.checkpoint.tensors[self.stretches[name][0].key].dtype

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The elements of `box`, in the stored type, on the CPU."""
        out = torch.empty([size for _, size in box], dtype=self.dtype(name))
        (first, count), columns = box[0], box[1:]
        for stretch in self.stretches[name]:
            low, high = max(first, stretch.hf_row), min(first + count, stretch.hf_row + stretch.num_rows)
            if low < high:
                rows = (stretch.row + low - stretch.hf_row, high - low)
                part = self.checkpoint.read(stretch.key, (*((index, 1) for index in stretch.indices), rows, *columns))
                out[low - first : high - first] = part.view(high - low, *out.shape[1:])
        return out

    def _positions(self, key: str) -> Iterator[tuple[int, ...]]:
        """The (layer, expert) that the table's names of this Megatron tensor are filled with."""
        if not key.startswith(IN_LAYERS):
            yield ()
            return
        experts = self.spec.mixture.num_experts if EXPERTS in key and self.spec.mixture is not None else None
        for layer in range(self.spec.num_layers):
            if experts is None:
                yield (layer,)
            else:
                yield from ((layer, expert) for expert in range(experts))

    def _add(self, key: str, indices: tuple[int, ...]) -> None:
        segments = self.table.segments(key, indices)
        num_rows = max(rows.row + rows.num_rows for rows in segments)
        columns = self.table.hf_shapes[segments[0].hf_name][1:]
        parts = self._find(key, indices, num_rows, columns)
        for rows in segments:
            for start, size, name, axes in parts:
                low, high = max(rows.row, start), min(rows.row + rows.num_rows, start + size)
                if low < high:
                    stretch = Stretch(rows.hf_row + low - rows.row, high - low, name, axes, low - start)
                    self.stretches[rows.hf_name].append(stretch)

    def _find(
        self, key: str, indices: tuple[int, ...], num_rows: int, columns: tuple[int, ...]
    ) -> list[tuple[int, int, str, tuple[int, ...]]]:
        """(first row, rows, name, positions on its leading axes) of the stored tensors that make up one Megatron tensor."""
        counts = (self.spec.num_layers, self.spec.mixture.num_experts if self.spec.mixture else 0)[: len(indices)]
        for name, axes in self._spellings(key, indices):
            halves = [name + "_w", name + "_v"] if name + "_w" in self.checkpoint.tensors else [name]
            if not all(half in self.checkpoint.tensors for half in halves):
                continue
            parts, sizes = [], counts[len(counts) - len(axes) :]
            for number, half in enumerate(halves):
                shape, rows = self.checkpoint.tensors[half].shape, num_rows // len(halves)
                may_be_longer = key in PADDED and len(shape) == 1 + len(columns) and shape[0] >= rows
                expected = (*sizes, shape[0] if may_be_longer else rows, *columns)
                if shape != expected:
                    raise WeightMapError(
                        f"{self.directory}: {half} has shape {list(shape)}; the model of the config.json has {list(expected)}"
                    )
                parts.append((number * rows, rows, half, axes))
            self.used.update(halves)
            return parts
        raise WeightMapError(f"{self.directory} holds no {self.prefix}{key}, which the model of the config.json needs")

    def _spellings(self, key: str, indices: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names under which Megatron may have stored a tensor, and the positions that are axes then."""
        for same in (key, *(alias for alias, target in self.table.aliases.items() if target == key)):
            name = self.prefix + same
            yield name, indices
            if indices:
                named = name.replace(IN_LAYERS, f"{IN_LAYERS}{indices[0]}.", 1)
                yield named, indices[1:]
                if len(indices) == 2:
                    yield named.replace(EXPERTS, f"{EXPERTS}{indices[1]}.", 1), ()

    def _refuse_the_rest(self) -> None:
        """Weights that the family does not know would be lost silently: a bias, a norm, an untied head."""
        rest = [key for key in self.checkpoint.tensors if key not in self.used and not key.startswith(OTHERS)]
        rest = [key for key in rest if not key.rpartition(".")[2].startswith("_extra_state")]
        if rest:
            raise WeightMapError(
                f"{self.directory} holds {len(rest)} tensors that the model of the config.json has no place for: {', '.join(rest[:3])}"
            )


def import_megatron(directory: Path, hf_config: Path, out: Path, tokenizer: Path | None = None, dtype: str | None = None) -> Path:
    """Write a checkpoint with the weights of a Megatron-LM `torch_dist` checkpoint, and return `out`.

    Args: `directory` is an iteration, or the run's directory (its latest one); `hf_config` the Hugging Face directory whose config.json
    describes the model; the tokenizer is that directory's unless another is named. Optimizer and random states are left behind.
    Raises `CheckpointError` or `WeightMapError` for what cannot be read or is another model, as `import_hf` otherwise.
    """
    hf_config = Path(hf_config)
    hf_config = hf_config.parent if hf_config.is_file() else hf_config
    spec = read_spec(hf_config)
    refuse_code(hf_config)
    if not Path(directory).is_dir():
        raise CheckpointError(f"{directory} is no directory; expected a Megatron-LM checkpoint")
    source = MegatronSource(Path(directory), spec)
    texts = load_tokenizer(tokenizer or hf_config)
    provenance = {"path": Path(directory).resolve().name, "format": "Megatron-LM torch_dist", "iteration": source.directory.name}
    return write_imported(Path(out), spec, "actor", source, texts, hf_config, provenance, dtype)
