"""The head's work shared by all pipeline stages: who does what of a microbatch.

Stock pipelines compute logits, log-probabilities, entropy and the loss on the last stage while the others wait. Here a head *deals* its
work: every stage gets a share of the selected tokens, runs the output layer (a replica of its weight) and the loss on them, and
returns the gradient of those hidden states. The stages agree without a message, because the rows of a microbatch are equal on all ranks of
a model replica.

Losses stay what they are. They are sums over tokens (or pairs) with denominators counted beforehand over the whole minibatch, and
they ignore what a mask leaves out; so a share is the same record in which everything dealt to others counts nothing, exactly like the
dummy rows that fill a microbatch up. The sum over stages is the loss, and no numbers about tokens travel between stages. A loss that
needs all tokens of a sequence at once (a mean over each sequence, a ratio of whole sequences) asks its head to deal whole rows;
heads that say one number about a sequence deal rows, and pairs stay together.

Axis letters: B rows of a microbatch, T tokens, S positions of the model, P stages, n rows of hidden states in a share, H hidden width.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from megarl.parallel.context import Holders
from megarl.parallel.layout import ParallelLayout
from megarl.parallel.schedule import StageCosts
from megarl.records import TokenBatch

Deal = Literal["tokens", "rows"]


@dataclass(frozen=True)
class Share:
    """One stage's part of the head's work on a microbatch.

    `rows` is the microbatch in which everything dealt to others counts nothing (masks False, lengths 0); `positions` i64[n] are the hidden
    states to look at, in the flattened [S B]; `targets` i64[n] are the entries of the result they speak about; `shape` is the result's.
    Under context parallelism every rank looks at those of a share's hidden states that it holds, and the results are summed.
    """

    rows: Any
    positions: Tensor
    targets: Tensor
    shape: tuple[int, ...]


class HeadReplica(Protocol):
    """The head's weight on one stage during one pass, with what a head must know to use it."""

    weight: Tensor

    def keep_gradient(self) -> None:
        """Called after every backward of the head."""
        ...

    def reduce_gradient(self) -> None:
        """Brings all stages' gradients to the stage that owns the weight. Called once a pass, by every stage."""
        ...


class DealingHead(Protocol):
    """A head whose work can be shared by stages."""

    def deal(self, rows: Any, sequences: TokenBatch, holders: Holders, num_shares: int, turn: int) -> list[Share]:
        """The shares of one microbatch; together they are the whole. `turn` is the microbatch's number: whole rows go round by it."""
        ...

    def of_share(self, replica: HeadReplica, hidden: Tensor, share: Share) -> Any:
        """What the head says about its share, as if about the whole microbatch, 0 elsewhere. `hidden` [n, H], the rows of the share.

        Entered by every tensor- and context-parallel rank of a stage, which get equal results.
        """
        ...


class Sharing(Protocol):
    """A model whose head is shared by its stages."""

    layout: ParallelLayout

    def replica(self, model: torch.nn.Module, is_learning: bool) -> HeadReplica:
        """The head for one pass, equal to its owner's weight. Called by every stage."""
        ...

    def costs(self, selected: float, is_learning: bool) -> StageCosts:
        """For planning; `selected` is the part of all positions that the head looks at."""
        ...


def owners_of_tokens(mask: Tensor, num_shares: int) -> Tensor:
    """The share of each token that `mask` bool[B, T] selects, i64[B, T]: contiguous runs in row order, sizes differ by at most one."""
    order = mask.flatten().cumsum(0) - 1
    return (order * num_shares).div(mask.sum().clamp(min=1), rounding_mode="floor").view_as(mask)


def owners_of_rows(sizes: Tensor, num_shares: int, turn: int) -> Tensor:
    """The share of each row of `sizes` i64[B] tokens, i64[B]: contiguous runs, as equal as whole rows allow.

    Shares go round by `turn`, so that stages which get nothing of one microbatch get something of the next.
    """
    middle = 2 * sizes.cumsum(0) - sizes  # twice the middle of each row, to stay in whole numbers
    owner = (middle * num_shares).div((2 * sizes.sum()).clamp(min=1), rounding_mode="floor").clamp(max=num_shares - 1)
    return (owner + turn) % num_shares


def gathered_by_owner(owner: Tensor, num_shares: int) -> tuple[Tensor, ...]:
    """For each share the entries of `owner` i64[n] that it owns, ascending; -1 owns nothing. Waits for the device once."""
    owned = owner >= 0
    sizes = (owner == torch.arange(num_shares, device=owner.device)[:, None]).sum(1).tolist()
    order = torch.where(owned, owner, num_shares).argsort(stable=True)
    return order[: sum(sizes)].split(sizes)
