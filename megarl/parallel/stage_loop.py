"""Executes a schedule on one pipeline stage whose head is shared: a short loop that knows F, H, B and what they send and receive.

F and B are Megatron's own forward and backward steps. H runs this stage's share of the head and the loss on it, and returns the
gradient of its hidden states to the last stage. The order is `parallel.schedule`'s; nothing here waits for anything but the message
that the next operation needs.

Axis letters: S positions, W sequences side by side, H hidden width, n rows of hidden states in a share, N in all shares.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from megarl.metrics import Metrics
from megarl.parallel import device, groups
from megarl.parallel.schedule import Schedule, StageCosts, plan_schedule
from megarl.parallel.token_shards import DealingHead, Share, Sharing
from megarl.parallel.wires import Inbox, Outbox

device.prepare()

from megatron.core import parallel_state  # noqa: E402  (the host is prepared first)
from megatron.core.pipeline_parallel.schedules import backward_step, deallocate_output_tensor, forward_step  # noqa: E402
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region  # noqa: E402
from megatron.core.utils import get_model_config, get_model_type  # noqa: E402

ROUNDING = 16  # the part of all positions that the head looks at, for planning: few different plans, which are kept


class StageLoop:
    """One pass of a replica's microbatches through one stage. Built and run by every rank of the replica.

    Args: `shares` of every microbatch, one a stage; `forward(model, rows)` runs the stage's layers on its input; `hidden_shape` (S, W) of a
    rank's hidden states; `loss_function` None: a pass without gradients.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        microbatches: Sequence[Any],
        shares: list[list[Share]],
        head: DealingHead,
        sharing: Sharing,
        forward: Callable[[torch.nn.Module, Any], Tensor],
        hidden_shape: tuple[int, int],
        loss_function: Callable | None = None,
    ):
        layout = sharing.layout
        self._model, self._microbatches, self._shares, self._head, self._forward = model, microbatches, shares, head, forward
        self._config, self._loss_function = get_model_config(model), loss_function
        self._stage, self._ranks, self._is_last = layout.pp_rank, layout.ranks_along("pp"), layout.is_last_stage
        self._replica = sharing.replica(model, loss_function is not None)
        num_selected = sum(len(share.positions) for shares in self._shares for share in shares)
        num_positions = hidden_shape[0] * hidden_shape[1] * len(microbatches)
        selected = min(ROUNDING, -(-num_selected * ROUNDING // num_positions)) / ROUNDING
        if layout.expert > 1 or layout.context > 1:
            selected = 1.0  # pipelines meet in the layers' experts or attention: all must go in the same order, whatever their rows
        self._schedule = plan(sharing.costs(selected, loss_function is not None), len(microbatches))
        self._open_wires(layout, hidden_shape)
        self._held: dict[int, tuple[Tensor | None, Tensor]] = {}  # input and output of the microbatches in flight
        self._own_rows: dict[int, Tensor] = {}  # of the last stage: its own share's hidden states, then their gradient
        self.stats: list[Any] = []
        self.metrics = Metrics()

    def run(self) -> None:
        """Every microbatch through every operation; then, with gradients, the head's one sum and Megatron's reductions."""
        steps = {"F": self._forward_step, "H": self._head_step, "B": self._backward_step}
        for operation in self._schedule.orders[self._stage]:
            steps[operation.kind](operation.microbatch)
        self._outbox.wait()
        if self._loss_function is not None:
            self._replica.reduce_gradient()
            self._config.finalize_model_grads_func([self._model], None)

    def _open_wires(self, layout: Any, hidden_shape: tuple[int, int]) -> None:
        """Receives are posted in the order in which the operations want them: by microbatch, for each kind and source."""
        width, dtype = self._config.hidden_size, self._config.pipeline_dtype
        self._wires, self._outbox = groups.wires(layout), Outbox()
        layers = [(*hidden_shape, width)] * len(self._microbatches)
        previous, following, last = self._stage - 1, self._stage + 1, len(self._ranks) - 1
        has_backward = self._loss_function is not None

        def sizes(stage: int) -> list[tuple[int, ...]]:
            return [(len(shares[stage].positions), width) for shares in self._shares]

        def inbox(kind: str, stage: int, shapes: list[tuple[int, ...]]) -> Inbox:
            return Inbox(self._wires[kind], self._ranks[stage], shapes, dtype)

        self._inputs = inbox("activations", previous, layers) if self._stage > 0 else None
        if self._is_last:
            self._returned = [inbox("returned", stage, sizes(stage)) for stage in range(last)] if has_backward else []
        else:
            self._dealt = inbox("dealt", last, sizes(self._stage))
            self._gradients = inbox("gradients", following, layers) if has_backward else None

    def _send(self, tensor: Tensor, kind: str, stage: int) -> None:
        self._outbox.send(tensor.detach(), self._wires[kind], self._ranks[stage])

    def _forward_step(self, number: int) -> None:
        learns = self._loss_function is not None
        taken = self._inputs.take() if self._inputs is not None else None
        if taken is not None and learns:
            taken.requires_grad_()
        rows = self._microbatches[number]
        hidden, _ = forward_step(
            forward_step_func=lambda _, model: (self._forward(model, rows), None),
            data_iterator=None,
            model=self._model,
            num_microbatches=len(self._microbatches),
            input_tensor=taken,
            forward_data_store=[],
            config=self._config,
            cp_group_size=parallel_state.get_context_parallel_world_size(),
            is_first_microbatch=number == 0,
            current_microbatch=number,
            is_last_stage=False,  # Megatron would ask for a loss
        )
        if self._is_last:
            hidden = self._deal(hidden, self._shares[number], number)
        else:
            self._send(hidden, "activations", self._stage + 1)
        if learns:
            self._held[number] = (taken, hidden)
            deallocate_output_tensor(hidden, self._config.deallocate_pipeline_outputs)

    def _deal(self, hidden: Tensor, shares: list[Share], number: int) -> Tensor:
        """Sends each stage the hidden states of its share; returns them all, [N, H], to go backward from."""
        if self._config.sequence_parallel:
            # every tensor-parallel rank goes on with all positions and gets the same gradient, of which each takes its own part
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        dealt = hidden.flatten(0, 1).index_select(0, torch.cat([share.positions for share in shares]))
        for stage, part in enumerate(dealt.detach().split([len(share.positions) for share in shares])):
            if stage == self._stage:
                self._own_rows[number] = part
            else:
                self._send(part, "dealt", stage)
        return dealt

    def _head_step(self, number: int) -> None:
        share = self._shares[number][self._stage]
        hidden = self._own_rows.pop(number) if self._is_last else self._dealt.take()
        if self._loss_function is None:
            self.stats.append(self._head.of_share(self._replica, hidden, share))
            return
        hidden = hidden.detach().requires_grad_()
        loss, metrics = self._loss_function(self._head.of_share(self._replica, hidden, share), share.rows)
        self.metrics = self.metrics + metrics
        if len(hidden):
            scale = self._config.grad_scale_func
            (loss if scale is None else scale(loss)).backward()
            self._replica.keep_gradient()
        gradient = hidden.grad if hidden.grad is not None else torch.zeros_like(hidden)
        if self._is_last:
            self._own_rows[number] = gradient
        else:
            self._send(gradient, "returned", len(self._ranks) - 1)

    def _backward_step(self, number: int) -> None:
        taken, hidden = self._held.pop(number)
        if self._is_last:
            gradient = torch.cat([*(inbox.take() for inbox in self._returned), self._own_rows.pop(number)])
        else:
            gradient = self._gradients.take()
        to_previous = backward_step(taken, hidden, gradient, get_model_type(self._model), self._config)
        if self._stage > 0:
            self._send(to_previous, "gradients", self._stage - 1)


@lru_cache(maxsize=64)
def plan(costs: StageCosts, num_microbatches: int) -> Schedule:
    """The schedule of a pass; every stage plans for itself and gets the same."""
    return plan_schedule(costs, num_microbatches)
