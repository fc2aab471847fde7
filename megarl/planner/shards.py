"""How many elements of a model each pipeline stage's ranks hold, for every layout. Pure.

`bridge.shapes` says which; the tests compare the two. Embedding and head have the padding that makes them divide.
"""

import math
from dataclasses import dataclass, replace

from megarl.bridge.shapes import SPLIT_BY_COLUMNS, SPLIT_BY_ROWS, layers_on
from megarl.config import ParallelConfig
from megarl.models.decoder_table import IN_LAYERS
from megarl.models.spec import ModelSpec, Role, padded_vocab

SPLIT_ENDINGS = (*SPLIT_BY_ROWS, *SPLIT_BY_COLUMNS, "mlp.linear_fc1.weight")


@dataclass(frozen=True)
class Layer:
    """Elements of one layer on one rank, and of its largest weight; `experts` are those of all its experts together."""

    split: int  # over tensor-parallel ranks, this rank's part
    copied: int  # norms and routers, whole on each of them
    experts: int
    largest: int

    @property
    def dense(self) -> int:
        return self.split + self.copied


@dataclass(frozen=True)
class Shard:
    """Elements that a rank of one stage holds: `dense` ones, equal on all data-parallel replicas, and its `experts`.

    `still` of its layers are frozen, and so is the embedding where any layer of the model is: their elements never learn.
    """

    num_layers: int
    dense: int
    experts: int
    largest: int  # of one weight in its layers that learns
    embedding: int = 0  # where it is held and learns
    still: int = 0
    still_dense: int = 0
    still_experts: int = 0

    @property
    def total(self) -> int:
        return self.dense + self.experts

    @property
    def learned(self) -> int:
        """Elements that have gradients."""
        return self.total - self.still_dense - self.still_experts


def layer_of(spec: ModelSpec, tensor: int) -> Layer:
    """What a rank of `tensor` holds of a layer."""
    table = replace(spec, num_layers=1, window=None).table("actor")  # all layers are alike
    split = copied = experts = largest = 0
    for key, rows in table.entries.items():
        if not key.startswith(IN_LAYERS):
            continue
        columns = table.hf_shapes[rows[0].hf_name.format(layer=0, expert=0)][1:]
        size = sum(part.num_rows for part in rows) * math.prod(columns)
        if ".experts." in key:
            assert spec.mixture is not None
            experts += size * spec.mixture.num_experts
        elif key.endswith(SPLIT_ENDINGS):
            size //= tensor
            split += size
        else:
            copied += size
        largest = max(largest, size)
    return Layer(split, copied, experts, largest)


def shards_of(spec: ModelSpec, role: Role, parallel: ParallelConfig, frozen_layers: int = 0) -> tuple[Shard, ...]:
    """The shard of a rank of every pipeline stage; with `frozen_layers` the embedding and so many lowest layers do not learn."""
    layer, last = layer_of(spec, parallel.tensor), parallel.pipeline - 1
    vocabulary = padded_vocab(spec.vocab_size, parallel.tensor) // parallel.tensor * spec.hidden_size
    shards = []
    for stage in range(parallel.pipeline):
        own = layers_on(spec, parallel.pipeline, stage, parallel.virtual_pipeline)
        layers, still = len(own), sum(number < frozen_layers for number in own)
        ends = [vocabulary] if stage == 0 else []
        still_ends = list(ends) if frozen_layers else []
        if stage == last:
            is_shared = role == "actor" and spec.tied
            if not (is_shared and stage == 0):
                ends.append(vocabulary if role == "actor" else spec.hidden_size)
            ends.append(spec.hidden_size)  # the last norm
        experts = layer.experts // parallel.expert
        shards.append(
            Shard(
                num_layers=layers,
                dense=layers * layer.dense + sum(ends),
                experts=layers * experts,
                largest=layer.largest if layers > still else 0,
                embedding=vocabulary if stage == 0 and not frozen_layers else 0,
                still=still,
                still_dense=still * layer.dense + sum(still_ends),
                still_experts=still * experts,
            )
        )
    return tuple(shards)


def sampler_elements(spec: ModelSpec, tensor: int) -> int:
    """Elements on each of `tensor` ranks of a generator: vLLM cuts experts, too."""
    layer = layer_of(spec, tensor)
    copied_heads = max(1, spec.num_kv_heads // tensor) * tensor - spec.num_kv_heads  # fewer key-value heads than ranks: copies
    copies = 2 * copied_heads * spec.head_dim * spec.hidden_size // tensor
    vocabulary = padded_vocab(spec.vocab_size, 1) // tensor * spec.hidden_size
    ends = vocabulary * (1 if spec.tied else 2) + spec.hidden_size
    return spec.num_layers * (layer.dense + layer.experts // tensor + copies) + ends
