"""Which pipeline stages compute a model's head, and what the head costs. Pure: no torch."""

from typing import Literal

from megarl.config import ParallelConfig
from megarl.models.spec import ModelSpec, Role


def chosen_head(parallel: ParallelConfig, role: Role) -> Literal["last_stage", "sharded"]:
    """What `parallel.head` means for a model of this role.

    `auto` shares the vocabulary head of a pipeline. A scalar head stays: its one column costs less than moving hidden states does.
    """
    if parallel.head != "auto":
        return parallel.head
    can = parallel.pipeline > 1 and parallel.virtual_pipeline == 1
    return "sharded" if can and role == "actor" else "last_stage"


def layer_weights(spec: ModelSpec) -> int:
    """Weights of one layer that a token meets."""
    embedding = spec.vocab_size * spec.hidden_size
    return (spec.num_active_parameters("critic") - embedding) // spec.num_layers


def head_layers(spec: ModelSpec, role: Role) -> float:
    """The output layer's forward, in layers."""
    return (spec.vocab_size if role == "actor" else 1) * spec.hidden_size / layer_weights(spec)
