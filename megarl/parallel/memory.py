"""Phases of a step and what the accelerator's memory holds in each: the sampler's weights and KV cache, or the trainer's activations.

On a GPU host trainer and sampler share every GPU. The sampler keeps its memory through `generating` (so that an evaluation may
follow a rollout) and gives it back when `scoring` or `learning` begins; the next weight sync wakes its weights, the next
`generating` its KV cache. On a CPU host nothing moves.
"""

import contextlib
from collections.abc import Iterator
from typing import Protocol


class Sleeper(Protocol):
    """A sampler that can give its memory back: `rollout.engine.Engine`."""

    def wake(self, part: str) -> None: ...
    def sleep(self) -> None: ...


class Phases:
    """Contexts that the loop names its phases with. Every rank enters them together."""

    def __init__(self, engine: Sleeper):
        self._engine = engine

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """The sampler's weights and KV cache are resident."""
        self._engine.wake("kv_cache")
        yield

    @contextlib.contextmanager
    def scoring(self) -> Iterator[None]:
        """The sampler's memory is free for forward passes."""
        self._engine.sleep()
        yield

    @contextlib.contextmanager
    def learning(self) -> Iterator[None]:
        """The sampler's memory is free for forward and backward passes."""
        self._engine.sleep()
        yield
