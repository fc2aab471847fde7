"""Runs a batch through a model's pipeline stages, microbatch by microbatch, forward only or forward and backward (1F1B).

A thin executor over Megatron's schedules, and over ours where all stages share the head (`stage_loop`). A *head* turns the last
stage's hidden states into numbers about the rows; a *loss function* turns those into a loss already divided by a denominator
counted over the whole minibatch, so that losses and gradients of microbatches, stages and data-parallel ranks are added, never averaged,
and do not depend on how the minibatch was cut.

Axis letters: B rows of a data-parallel rank, M rows of a microbatch, Q sequences a row, T tokens, S = T padded for sequence and
context parallelism.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megarl.data.pack_size import TILE
from megarl.metrics import Metrics
from megarl.parallel import context, device
from megarl.parallel.microbatches import Microbatches, model_input
from megarl.parallel.stage_loop import StageLoop
from megarl.parallel.token_shards import DealingHead, Sharing
from megarl.records import TokenBatch

device.prepare()

from megatron.core.distributed import finalize_model_grads  # noqa: E402  (the host is prepared first)
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.utils import get_model_config  # noqa: E402

Head = Callable[[torch.nn.Module, Tensor, TokenBatch, Any], Any]  # (chunk, hidden [S, M Q, H], sequences, rows) -> stats
LossFunction = Callable[[Any, Any], tuple[Tensor, Metrics]]  # (stats, rows) -> (what the rows add to the loss, metrics)


def forward_only(chunks: Sequence[torch.nn.Module], microbatches: Microbatches, head: Head, sharing: Sharing | None = None) -> list[Any]:
    """What `head` says about each microbatch (detached), to be summed over the stages. Every rank of the replica calls.

    With `sharing` every stage says its share; without, the last stage says it all and the other lists are empty.
    """
    if sharing is not None:
        with torch.no_grad():
            return _share(chunks, microbatches, head, sharing).stats

    def keep(model: torch.nn.Module, rows: Any, hidden: Tensor, non_loss_data: bool) -> Any:
        return head(model, hidden, microbatches.sequences(rows), rows)

    with torch.no_grad():
        return _run(chunks, microbatches, keep, is_forward_only=True)


def forward_backward(
    chunks: Sequence[torch.nn.Module],
    microbatches: Microbatches,
    head: Head,
    loss_function: LossFunction,
    sharing: Sharing | None = None,
    is_last: bool = True,
) -> Metrics:
    """Adds the gradients of all microbatches and reduces them over data-parallel ranks; every rank of the world calls it.

    Not `is_last`: another pass of the same step follows, and its reduction is for both. `chunks` are wrapped in Megatron's DDP, whose
    buffers the first pass finds zeroed. Returns metrics whose sum over the stages is that of this replica's microbatches: with
    `sharing` every stage computes the loss of its share of the head, without, the last stage does it all.
    """
    for chunk in chunks:
        get_model_config(chunk).finalize_model_grads_func = finalize if is_last else _keep_unreduced
    if sharing is not None:
        return _share(chunks, microbatches, head, sharing, loss_function).metrics

    def learn(model: torch.nn.Module, rows: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Metrics]:
        loss, metrics = loss_function(head(model, hidden, microbatches.sequences(rows), rows), rows)
        # the middle value is Megatron's token count, by which it would divide: the loss is divided already
        return loss, torch.zeros((), dtype=torch.int, device=loss.device), metrics

    total = Metrics()
    for metrics in _run(chunks, microbatches, learn, is_forward_only=False):
        total = total + metrics
    return total


def finalize(model: list[torch.nn.Module], num_tokens: Tensor | None = None, **options: Any) -> None:
    """Megatron's reduction of gradients without its division by a token count: the `finalize_model_grads_func` of a model's config."""
    finalize_model_grads(model, None, **options)


def _keep_unreduced(model: list[torch.nn.Module], num_tokens: Tensor | None = None, **options: Any) -> None:
    """Leaves the gradients in their buffers, for the next pass to add to."""


def _share(
    chunks: Sequence[torch.nn.Module],
    microbatches: Microbatches,
    head: DealingHead,
    sharing: Sharing,
    loss_function: LossFunction | None = None,
) -> StageLoop:
    """One pass in which all stages share the head."""
    (model,) = chunks
    config = get_model_config(model)
    num_positions = _num_positions(microbatches, config)
    is_split = config.sequence_parallel
    num_held = num_positions // config.context_parallel_size
    hidden_shape = (num_held // (config.tensor_model_parallel_size if is_split else 1), microbatches.width)

    holders, num_stages = context.holders(num_positions, microbatches.width), sharing.layout.pipeline
    shares = [head.deal(rows, microbatches.sequences(rows), holders, num_stages, turn) for turn, rows in enumerate(microbatches)]
    forward = _layers(microbatches, num_positions)
    loop = StageLoop(model, microbatches, shares, head, sharing, forward, hidden_shape, loss_function)
    loop.run()
    return loop


def _layers(microbatches: Microbatches, num_positions: int) -> Callable[[torch.nn.Module, Any], Tensor]:
    """Runs a chunk's layers on rows of a microbatch: on those of their S = `num_positions` that this rank holds."""
    own = context.own_positions(num_positions)

    def forward(model: torch.nn.Module, rows: Any) -> Tensor:
        inputs = model_input(microbatches.sequences(rows), num_positions)
        token_ids, position_ids, sequence_of = (tensor[:, own] for tensor in (inputs.token_ids, inputs.position_ids, inputs.sequence_of))
        return model(token_ids, position_ids, sequence_of=sequence_of, packed_seq_params=inputs.packed)

    return forward


def _run(chunks: Sequence[torch.nn.Module], microbatches: Microbatches, finish: Callable, is_forward_only: bool) -> list[Any]:
    config = get_model_config(chunks[0])
    assert is_forward_only or config.calculate_per_token_loss, "Megatron would average the losses again"
    num_positions = _num_positions(microbatches, config)
    forward = _layers(microbatches, num_positions)

    def forward_step(iterator: Iterator[Any], model: torch.nn.Module) -> tuple[Tensor, Callable]:
        rows = next(iterator)
        return forward(model, rows), partial(finish, model, rows)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(microbatches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(microbatches),
        seq_length=num_positions,
        micro_batch_size=microbatches.width,
        forward_only=is_forward_only,
        collect_non_loss_data=is_forward_only,
    )


def _num_positions(microbatches: Microbatches, config: Any) -> int:
    """T or the largest pack, padded so that it divides where activations are split along tokens."""
    split_over_tensor = config.tensor_model_parallel_size if config.sequence_parallel else 1
    split_over_tensor *= TILE if microbatches.is_packed else 1
    return context.padded_length(microbatches.num_tokens, config.context_parallel_size, split_over_tensor)
