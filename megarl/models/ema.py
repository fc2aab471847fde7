"""The exponential moving average of a learner's weights: float32, held where the optimizer holds its state, sharded like it.

After each policy step the average becomes b average + (1 - b) weights (semantics section 3; DeepSpeed-Chat: b = 0.992).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megarl.models.optimizer_pieces import Held, Master

BLOCK_ELEMENTS = 16 << 20  # exchanged at once: what a rank needs beside the average


class Ema:
    """The average of what `masters` update, of this rank's share of it. Starts as the weights are at `restart`.

    Args: `decay` is b; `share_weights()` gives every rank the weights that others of its data-parallel group have written, with the
    distributed optimizer, and does nothing without.
    """

    def __init__(self, masters: Iterable[Master], decay: float, share_weights: Callable[[], None]):
        self.decay = decay
        self.is_exchanged = False
        self._masters, self._share_weights = list(masters), share_weights
        self._averages = [torch.zeros_like(master.values) for master in self._masters]
        self.restart()

    def averages(self) -> list[Tensor]:
        """The tensors that hold it, flat, f32."""
        return self._averages

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew from the weights."""
        for average, master in zip(self._averages, self._masters, strict=True):
            average.copy_(master.values)

    @torch.no_grad()
    def update(self) -> None:
        """One step towards the weights."""
        assert not self.is_exchanged
        for average, master in zip(self._averages, self._masters, strict=True):
            average.lerp_(master.values, 1.0 - self.decay)

    @torch.no_grad()
    def exchange(self) -> None:
        """The model computes with the average in the weights' place, from the next call on with the weights again, bit for bit.

        Called by every rank of the world; no second copy of either is made. In between the learner must not learn.
        """
        for average, master in zip(self._averages, self._masters, strict=True):
            if master.is_copy:
                master.weights.copy_(master.values if self.is_exchanged else average)
            else:
                _swap(average, master.values)
        self._share_weights()
        self.is_exchanged = not self.is_exchanged

    def with_averages(self, held: Sequence[Held]) -> list[Held]:
        """What the optimizer holds, and the average of the same elements in the slot `ema`."""
        assert not self.is_exchanged
        return [replace(item, tensors=item.tensors | {"ema": average}) for item, average in zip(held, self._averages, strict=True)]


def _swap(a: Tensor, b: Tensor) -> None:
    for x, y in zip(a.split(BLOCK_ELEMENTS), b.split(BLOCK_ELEMENTS), strict=True):
        kept = x.clone()
        x.copy_(y)
        y.copy_(kept)
