"""Freezing the embedding and the lowest layers of a model that learns: no gradients, no optimizer state, the start's weights for good.

What stands below the first layer that learns is computed without a graph. (trlx calls the rest `num_layers_unfrozen`.)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megarl.models.build import DecoderChunk


def freeze_lowest(chunks: Sequence[DecoderChunk], num_layers: int) -> None:
    """Freeze the embedding and layers 1 to `num_layers` of the whole model, as far as they lie in this rank's freshly built chunks.

    Called before `Learner` takes them. Nothing is frozen where `num_layers` is 0. The embedding must not be the head's weight, too.
    """
    if num_layers == 0:
        return
    for chunk in chunks:
        assert not chunk.share_embeddings_and_output_weights, "a tied head learns"
        if chunk.pre_process:
            chunk.embedding.requires_grad_(False)
        for layer in chunk.decoder.layers:
            if layer.layer_number <= num_layers:  # counted from 1 over all stages
                layer.requires_grad_(False)
        if chunk.pre_process and chunk.config.recompute_granularity == "full" and any(p.requires_grad for p in chunk.parameters()):
            # Megatron computes a layer again only where its input has a gradient to give to
            chunk.embedding.register_forward_hook(_with_gradient)


def num_frozen(chunks: Sequence[DecoderChunk]) -> int:
    """Parameters of this rank that do not learn."""
    return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters() if not parameter.requires_grad)


def _with_gradient(module: torch.nn.Module, inputs: tuple, embedded: Tensor) -> Tensor:
    return embedded.requires_grad_() if torch.is_grad_enabled() else embedded
