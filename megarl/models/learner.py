"""A replica that learns: Megatron's DDP and Adam around the chunks, one optimizer step at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megarl.config import OptimizerConfig, ParallelConfig
from megarl.metrics import Largest, Metric, Metrics, Total
from megarl.models import mixture
from megarl.models.ema import Ema
from megarl.models.guard import UpdateGuard
from megarl.models.head_sharing import sharing_of
from megarl.models.learning_rate import lr_at
from megarl.models.optimizer_pieces import Slot, held_by, masters_of, optimizer_pieces
from megarl.models.pieces import Piece
from megarl.models.replica import Replica, packing_of
from megarl.parallel import device, groups, pipeline
from megarl.parallel.collectives import gather_json, sum_over
from megarl.parallel.layout import ParallelLayout
from megarl.parallel.memory import Movable, storages_of

device.prepare()

from megatron.core import optimizer as megatron_optimizer  # noqa: E402  (the host is prepared first)
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32  # noqa: E402
from megatron.core.utils import get_model_config  # noqa: E402


@dataclass(frozen=True)
class Pass:
    """A batch that goes through the model forward and backward: a data rank's share of it, and what `Learner.step` says of the rest."""

    batch: Any
    head: pipeline.Head
    loss_function: pipeline.LossFunction


class Learner(Replica):
    """A replica with gradients and an optimizer. Built by every rank of the world, from freshly built chunks.

    Weights are views into the optimizer's buffers from here on: take pieces from `chunks` of the learner, never from before, and call
    `refresh_main_params` after writing weights. `total_steps` is the number of optimizer steps that the schedule spans. With an
    `ema_decay` a moving average of the weights follows each update. `guard` decides which updates are made; by default one that writes
    no batches.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        optimizer: OptimizerConfig,
        parallel: ParallelConfig,
        precision: str,
        layout: ParallelLayout,
        total_steps: int,
        ema_decay: float | None = None,
        guard: UpdateGuard | None = None,
    ):
        spec, role = chunks[0].spec, chunks[0].role
        packing, sharing = packing_of(spec, parallel), sharing_of(spec, role, parallel, layout)
        super().__init__(_wrapped(chunks, parallel), layout, parallel.microbatch_size, packing, sharing)
        self.config, self.total_steps = optimizer, total_steps
        self.guard = guard or UpdateGuard(role, optimizer, layout, None)
        self.num_steps = 0  # optimizer steps tried, skipped ones included: the schedule's clock
        self.num_updates = 0  # optimizer steps made: Adam's clock
        self._optimizer = megatron_optimizer.get_megatron_optimizer(
            _megatron_config(optimizer, parallel, precision), self.chunks, use_gloo_process_groups=False
        )
        self.movables = {
            "weights": Movable(self.weights),
            "gradients": Movable(self.gradients, "scratch"),
            "optimizer": Movable(self.optimizer_state),
        }
        self.ema: Ema | None = None
        if ema_decay is not None:
            masters = [master for chained in self._optimizer.chained_optimizers for master in masters_of(chained)]
            self.ema = Ema(masters, ema_decay, partial(_share_weights, self.chunks, parallel.distributed_optimizer))
            self.movables["ema"] = Movable(self.ema.averages)

    def step(self, batch: Any, head: pipeline.Head, loss_function: pipeline.LossFunction, *more: Pass) -> Metrics:
        """One optimizer step on `batch`, this data-parallel rank's share of the minibatch; every rank of the world calls.

        `loss_function(stats, rows) -> (loss, metrics)` runs for each microbatch with `stats` from `head`, on the last stage or, where the
        stages share the head, on each of them with its share; its losses are divided by global denominators already and are summed.
        Rows may be dummies or dealt to another stage (length 0, masks False): they must add nothing. The gradients of `more` batches,
        each with its own head and loss, are added to those of the first; every rank gives equally many.
        A loss or a gradient norm that is not finite, or a norm above `skip_above`, skips the update on all ranks alike. Raises
        `LearningError` after `max_skipped_updates` in a row.

        Returns the metrics of this replica's rows on every rank of the replica, with `grad_norm` (of the update, before clipping),
        `lr`, `skipped_updates` and, of a mixture that is balanced, `router_balance` added: reduce them over data-parallel ranks.
        """
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        passes = (Pass(batch, head, loss_function), *more)
        is_balanced = self.config.router_balance > 0
        num_sequences = sum((one.batch.sequences().lengths > 0).sum() for one in passes)
        if is_balanced:
            everywhere = sum_over(num_sequences.to(device.device()), groups.group(self.layout, "dp"))
            mixture.balance(self.chunks, self.config.router_balance / max(1, int(everywhere)))
        metrics, losses = Metrics(), []
        for number, one in enumerate(passes, 1):
            watched, is_last = partial(_watched, losses, one.loss_function), number == len(passes)
            microbatches = self.microbatches(one.batch)
            metrics = metrics + pipeline.forward_backward(self.chunks, microbatches, one.head, watched, self.sharing, is_last)
        if is_balanced:
            metrics = metrics + mixture.balance_metrics(self.chunks, int(num_sequences), self.layout)
        lr = lr_at(self.config, self.num_steps, self.total_steps)
        grad_norm = self._prepared_grad_norm()
        is_updated = self.guard.allows(self._whole_loss(losses), grad_norm, self.num_steps, batch)
        if is_updated:
            self._update(lr, grad_norm)
        self.num_steps += 1
        total = self._step_metrics(grad_norm, lr, is_updated)
        for part in gather_json(metrics.to_json(), groups.group(self.layout, "pp")):
            total = total + Metrics.from_json(part)
        return total

    @property
    def is_skipping(self) -> bool:
        """True while updates are being skipped: what is saved now would not be from before the first."""
        return self.guard.num_skipped > 0

    def refresh_main_params(self) -> None:
        """Copies the weights into the optimizer's float32 copies, after they were written from outside; their average starts anew."""
        self._optimizer.reload_model_params()
        self.restart_ema()

    def restart_ema(self) -> bool:
        """Lets the moving average, where one is kept, begin anew from the weights; True where one is."""
        if self.ema is not None:
            self.ema.restart()
        return self.ema is not None

    def gradients(self) -> list[Tensor]:
        """The buffers that gradients are summed up in; every `step` begins by zeroing them."""
        return [buffer.grad_data for chunk in self.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]

    def optimizer_state(self) -> list[Tensor]:
        """Adam's moments where they exist already, and float32 copies of weights that the model keeps in another dtype."""
        weights = set(storages_of(self.weights()))
        found = []
        for _, group, inner in self._groups():
            for param in group["params"]:
                found += [param.data, *(state for key in ("exp_avg", "exp_avg_sq") if (state := inner.state[param].get(key)) is not None)]
        return [tensor for tensor in found if not weights & storages_of([tensor]).keys()]

    def optimizer_pieces(self, weights: Sequence[Piece]) -> dict[Slot, list[Piece]]:
        """This rank's optimizer state in Hugging Face coordinates, given the pieces of this learner's weights: live float32 views by slot.

        They exist before the first step too. Load a state by writing into them, after the weights, and then call `load_counts`.
        """
        self._start_state()
        held = [held for chained in self._optimizer.chained_optimizers for held in held_by(chained)]
        if self.ema is not None:
            held = self.ema.with_averages(held)
        return optimizer_pieces(held, weights)

    def state_bytes(self, weights: Tensor) -> int:
        """Bytes of what belongs to `weights`: Adam's two moments, a float32 copy of what is narrower, and the average."""
        return weights.numel() * (8 + (0 if weights.itemsize >= 4 else 4) + (0 if self.ema is None else 4))

    def counts(self) -> dict[str, int]:
        """What the learner counts, equal on all ranks: steps tried, and updates made (a skipped one does not count)."""
        return {"num_steps": self.num_steps, "num_updates": self.num_updates}

    def load_counts(self, counts: dict[str, int]) -> None:
        """Puts back what `counts` gave; Adam's bias correction follows it."""
        self.num_steps, self.num_updates = counts["num_steps"], counts["num_updates"]
        self._start_state()
        for _, group, inner in self._groups():
            _set_adam_step(group, inner, self.num_updates)

    @torch.no_grad()
    def _prepared_grad_norm(self) -> float:
        """The global norm of the reduced gradients, equal on all ranks, which may be infinite or nan."""
        self._optimizer.prepare_grads()
        return float(self._optimizer.get_grad_norm())

    def _whole_loss(self, losses: Sequence[Tensor]) -> float:
        """The minibatch's loss, equal on all ranks, from what this rank computed of it."""
        mine = sum(losses, torch.zeros((), dtype=torch.float64, device=device.device()))
        copies = self.layout.tensor * self.layout.context  # ranks that compute the same
        return float(sum_over(mine, groups.group(self.layout, "world"))) / copies

    @torch.no_grad()
    def _update(self, lr: float, grad_norm: float) -> None:
        """Clips and applies the gradients."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
            group["weight_decay"] = self.config.weight_decay * group["wd_mult"]
        if self.config.clip_grad > 0:
            for inner in self._optimizer.chained_optimizers:
                clip_grad_by_total_norm_fp32(inner.get_parameters(), self.config.clip_grad, grad_norm)
        self._optimizer.step_with_ready_grads()
        self.num_updates += 1
        if self.ema is not None:
            self.ema.update()

    def _step_metrics(self, grad_norm: float, lr: float, is_updated: bool) -> Metrics:
        is_first_replica = self.layout.dp_rank == 0  # all replicas skip together: count it once
        metrics = Metrics({"lr": Largest(lr), "skipped_updates": Total(float(not is_updated and is_first_replica))})
        return metrics + Metrics({"grad_norm": Metric(grad_norm)}) if is_updated else metrics

    def _groups(self):
        """(name, parameter group, torch optimizer) of every parameter group of this rank that is not empty."""
        for i, chained in enumerate(self._optimizer.chained_optimizers):
            for g, group in enumerate(chained.param_groups):
                if group["params"]:
                    yield f"{i}.{g}", group, chained.optimizer

    def _start_state(self) -> None:
        """Makes what Adam would make in its first step."""
        for _, group, inner in self._groups():
            for param in group["params"]:
                if not inner.state[param]:
                    _start_adam_state(param, inner)


def _watched(losses: list[Tensor], loss_function: pipeline.LossFunction, stats: Any, rows: Any) -> tuple[Tensor, Metrics]:
    """The loss function, which leaves its loss in `losses`, too."""
    loss, metrics = loss_function(stats, rows)
    losses.append(loss.detach().double())
    return loss, metrics


def _wrapped(chunks: Sequence[torch.nn.Module], parallel: ParallelConfig) -> list[torch.nn.Module]:
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=parallel.distributed_optimizer, overlap_grad_reduce=False
    )
    wrapped = []
    for chunk in chunks:
        config = get_model_config(chunk)
        config.finalize_model_grads_func = pipeline.finalize
        wrapped.append(DistributedDataParallel(config, ddp_config, chunk))
    return wrapped


def _share_weights(chunks: Sequence[torch.nn.Module], is_distributed: bool) -> None:
    """Every rank gets the weights that its data-parallel group has written, each rank its range. Called by every rank of the world."""
    if is_distributed:
        for chunk in chunks:
            chunk.start_param_sync()


def _megatron_config(config: OptimizerConfig, parallel: ParallelConfig, precision: str) -> megatron_optimizer.OptimizerConfig:
    is_bf16 = precision == "bf16"
    return megatron_optimizer.OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=0.0,
        weight_decay=config.weight_decay,
        decoupled_weight_decay=True,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        bf16=is_bf16,
        params_dtype=torch.bfloat16 if is_bf16 else torch.float32,
        use_distributed_optimizer=parallel.distributed_optimizer,
    )


def _start_adam_state(param: Tensor, inner: torch.optim.Optimizer) -> None:
    """What torch's Adam (or a fused one, which keeps its step in the group) makes in its first step."""
    inner.state[param]["exp_avg"] = torch.zeros_like(param.data)
    inner.state[param]["exp_avg_sq"] = torch.zeros_like(param.data)
    if isinstance(inner, torch.optim.Adam):
        inner.state[param]["step"] = torch.tensor(0.0, dtype=torch.float32)


def _set_adam_step(group: dict[str, Any], inner: torch.optim.Optimizer, step: int) -> None:
    if isinstance(inner, torch.optim.Adam):
        for param in group["params"]:
            inner.state[param]["step"].fill_(step)
    else:
        group["step"] = step
