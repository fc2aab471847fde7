"""Runs a batch through a model's pipeline stages, microbatch by microbatch, forward only or forward and backward (1F1B).

A thin executor over Megatron's schedules. A *head* turns the last stage's hidden states into numbers about the rows; a *loss
function* turns those into a loss already divided by a denominator counted over the whole minibatch, so that losses and gradients of
microbatches and data-parallel ranks are added, never averaged, and do not depend on how the minibatch was cut.

Axis letters: B rows of a data-parallel rank, M rows of a microbatch, Q sequences a row, T tokens, S = T padded for sequence parallelism.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from megarl.metrics import Metrics
from megarl.parallel import device
from megarl.records import TokenBatch

device.prepare()

from megatron.core.distributed import finalize_model_grads  # noqa: E402  (the host is prepared first)
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.utils import get_model_config  # noqa: E402

Rows = TypeVar("Rows")  # a record with rows and `sequences()`: TokenBatch and its kin, PreferenceBatch
Head = Callable[[torch.nn.Module, Tensor, TokenBatch, Any], Any]  # (chunk, hidden [S, M Q, H], sequences, rows) -> stats
LossFunction = Callable[[Any, Any], tuple[Tensor, Metrics]]  # (stats, rows) -> (what the rows add to the loss, metrics)


def cut(batch: Rows, microbatch_size: int) -> list[Rows]:
    """The batch as microbatches of equal size, at least one, of at most `microbatch_size` sequences (and at least one row).

    Sizes are balanced, so that few rows are dummies; dummies stand at the end and have length 0 and masks that are False.
    """
    most = max(1, microbatch_size // batch.sequences_per_row)
    count = max(1, -(-len(batch) // most))
    size = max(1, -(-len(batch) // count))
    batch = batch.padded(count * size)
    return [batch.rows(slice(start, start + size)) for start in range(0, count * size, size)]


def forward_only(chunks: Sequence[torch.nn.Module], microbatches: Sequence[Rows], head: Head) -> list[Any]:
    """What `head` says about each microbatch, on the last stage (detached); elsewhere an empty list. Every rank of the replica calls."""

    def keep(model: torch.nn.Module, rows: Rows, hidden: Tensor, non_loss_data: bool) -> Any:
        return head(model, hidden, rows.sequences(), rows)

    with torch.no_grad():
        return _run(chunks, microbatches, keep, is_forward_only=True)


def forward_backward(chunks: Sequence[torch.nn.Module], microbatches: Sequence[Rows], head: Head, loss_function: LossFunction) -> Metrics:
    """Adds the gradients of all microbatches and reduces them over data-parallel ranks; every rank of the world calls it.

    `chunks` are wrapped in Megatron's DDP with zeroed buffers. Returns the metrics of this replica's microbatches, added up, on the last
    stage; empty metrics elsewhere.
    """

    def learn(model: torch.nn.Module, rows: Rows, hidden: Tensor) -> tuple[Tensor, Tensor, Metrics]:
        loss, metrics = loss_function(head(model, hidden, rows.sequences(), rows), rows)
        # the middle value is Megatron's token count, by which it would divide: the loss is divided already
        return loss, torch.zeros((), dtype=torch.int, device=loss.device), metrics

    total = Metrics()
    for metrics in _run(chunks, microbatches, learn, is_forward_only=False):
        total = total + metrics
    return total


def finalize(model: list[torch.nn.Module], num_tokens: Tensor | None = None, **options: Any) -> None:
    """Megatron's reduction of gradients without its division by a token count: the `finalize_model_grads_func` of a model's config."""
    finalize_model_grads(model, None, **options)


def _run(chunks: Sequence[torch.nn.Module], microbatches: Sequence[Rows], finish: Callable, is_forward_only: bool) -> list[Any]:
    config = get_model_config(chunks[0])
    assert is_forward_only or config.calculate_per_token_loss, "Megatron would average the losses again"
    tokens = microbatches[0].sequences().token_ids
    num_positions = _num_positions(tokens.shape[1], config)
    positions = torch.arange(num_positions, device=tokens.device)[None].expand(len(tokens), -1)

    def forward_step(iterator: Iterator[Rows], model: torch.nn.Module) -> tuple[Tensor, Callable]:
        rows = next(iterator)
        token_ids = rows.sequences().token_ids
        token_ids = F.pad(token_ids, (0, num_positions - token_ids.shape[1]))
        return model(token_ids, positions, None), partial(finish, model, rows)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(microbatches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(microbatches),
        seq_length=num_positions,
        micro_batch_size=len(tokens),
        forward_only=is_forward_only,
        collect_non_loss_data=is_forward_only,
    )


def _num_positions(num_tokens: int, config: Any) -> int:
    """T, padded to a multiple of the tensor-parallel size where activations are split along tokens."""
    multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return -(-num_tokens // multiple) * multiple
