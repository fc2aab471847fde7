"""Weights drawn at random, the same under every layout: each Hugging Face tensor from its own generator.

For small models and for new heads: every rank draws each tensor that it holds a part of whole, then keeps its box.
"""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from megarl.models.pieces import Box
from megarl.models.spec import STANDARD_DEVIATION, WeightTable


class RandomSource:
    """A `TensorSource` of a new model, a function of (seed, tensor name).

    Norms leave the scale alone, biases are zero, everything else is normal(0, `standard_deviation`).
    """

    def __init__(self, table: WeightTable, seed: int, standard_deviation: float = STANDARD_DEVIATION):
        self.shapes = table.hf_shapes
        self.new_norm = table.new_norm
        self.seed = seed
        self.standard_deviation = standard_deviation
        self.last: tuple[str, Tensor] = ("", torch.empty(0))  # pieces of one tensor are read one after the other

    def names(self) -> Iterable[str]:
        """Every tensor of the table."""
        return self.shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape in the table."""
        return self.shapes[name]

    def read(self, name: str, box: Box) -> Tensor:
        """The elements of `box` in float32."""
        if self.last[0] != name:
            self.last = (name, self._draw(name))
        return self.last[1][tuple(slice(offset, offset + size) for offset, size in box)]

    def _draw(self, name: str) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.full(self.shapes[name], self.new_norm)
        if name.endswith(".bias"):
            return torch.zeros(self.shapes[name])
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.randn(self.shapes[name], generator=generator) * self.standard_deviation
