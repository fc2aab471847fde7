"""What the weights of a Hugging Face directory must be for a model to start from them: those of the family's table, in floating point."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch

from megarl.errors import WeightMapError
from megarl.models.decoder_table import SCALAR_HEAD, VOCABULARY_HEAD
from megarl.models.spec import ModelSpec, Role

# Tensors that some checkpoints carry beside the table's: a head that is the embedding or gives way to a scalar one, and rotary
# frequencies, which config.json determines.
SPARE = (VOCABULARY_HEAD, "rotary_emb.inv_freq")
SCALAR_BIAS = "score.bias"
STORED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Directory(Protocol):
    """A directory's tensors."""

    directory: Path

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...


def check_tensors(source: Directory, spec: ModelSpec, role: Role) -> None:
    """Raise `WeightMapError` for a tensor that the family's table of `role` does not list, or that holds no floating-point numbers."""
    listed = spec.table(role).hf_shapes
    if role == "critic":
        _check_scalar_head(source)
    unknown = sorted(name for name in source.names() if name not in listed and not name.endswith(SPARE))
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise WeightMapError(
            f"{source.directory}: the weights hold {unknown[0]}{more}, which the table of {spec.family} does not list:"
            " config.json does not describe these weights, or the table in megarl/models lacks a tensor"
        )
    for name in sorted(listed.keys() & source.names()):
        if source.dtype(name) not in STORED:
            raise WeightMapError(
                f"{source.directory}: tensor {name} is stored as {source.dtype(name)}; expected floating-point numbers of 16 bits or more:"
                " save the model without quantisation first"
            )


def _check_scalar_head(source: Directory) -> None:
    names = set(source.names())
    if SCALAR_HEAD in names and (labels := source.shape(SCALAR_HEAD)[0]) != 1:
        text = f"{SCALAR_HEAD} has {labels} rows, for {labels} labels"
        raise WeightMapError(f"{source.directory}: {text}; expected 1: a reward model gives a text one number (num_labels 1)")
    if SCALAR_BIAS in names:
        text = f"the weights hold {SCALAR_BIAS}; expected a head without one, as transformers' ForSequenceClassification has it"
        raise WeightMapError(f"{source.directory}: {text}: it adds the same number to every score, so the model can be saved without it")
