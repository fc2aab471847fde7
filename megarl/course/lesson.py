"""What the supervised lessons share: the loop, evaluation on held-out examples, and the parts they are made of.

A lesson is a kind of example, a number the model says about it, and a loss: `sft.py`, `reward_model.py`, `dpo.py`, `rrhf.py`.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from megarl.checkpoint.manifest import ROLES
from megarl.checkpoint.sources import open_start
from megarl.checkpoint.store import Checkpoints
from megarl.checkpoint.train_state import TrainState
from megarl.config import LessonRun
from megarl.data.packing import Cost
from megarl.data.tokenizers import check_vocabulary, load_tokenizer
from megarl.metrics import Metrics, RunLog, StepMetrics
from megarl.models.learner import Learner
from megarl.models.pieces import Piece
from megarl.models.spec import ModelSpec
from megarl.parallel import collectives, device, groups
from megarl.parallel.layout import ParallelLayout
from megarl.parallel.pipeline import Head, LossFunction
from megarl.ppo.roles import build_learner
from megarl.records import TensorRecord

TOKENS_MULTIPLE = 8  # T is a multiple of this: aligned for tensor cores
EVAL_MICROBATCHES = 8  # held-out examples are padded together in blocks of so many microbatches


class Examples(Protocol):
    """A dataset: `DemonstrationSet` and its kin. `examples` are all of them in the files' order, `notices` say what was left out."""

    examples: Sequence[Any]

    def notices(self) -> list[str]: ...
    def for_step(self, step: int, batch_size: int, seed: int, layout: ParallelLayout, cost: Cost | None = None) -> Sequence[Any]: ...
    def shard(self, layout: ParallelLayout) -> Sequence[Any]: ...


class Lesson(ABC):
    """What one lesson teaches. `head` says something about a batch, the loss judges it."""

    head: Head

    @abstractmethod
    def collate(self, examples: Sequence[Any]) -> TensorRecord:
        """Examples as one padded batch, with everything the loss needs. Called by every rank of a replica."""

    @abstractmethod
    def weight(self, batch: TensorRecord) -> Tensor:
        """How much of the loss' denominator this batch holds: a number of tokens or pairs, f64 scalar."""

    @abstractmethod
    def loss_function(self, denominator: float) -> LossFunction:
        """The loss of a part of a batch, divided by the `denominator` of the whole one, and metrics."""


@dataclass(frozen=True)
class Student:
    """The model that learns."""

    spec: ModelSpec
    learner: Learner
    pieces: Sequence[Piece]


@dataclass(frozen=True)
class LessonParts:
    """Everything a lesson's loop uses."""

    lesson: Lesson
    student: Student
    name: str  # of the student in checkpoints: "actor" or "reward"
    examples: Examples
    held_out: Examples | None
    checkpoints: Checkpoints
    log: RunLog


def teach(run: LessonRun, layout: ParallelLayout, parts: LessonParts) -> TrainState:
    """Train until `run.train.total_steps`, from the newest checkpoint if there is one. Called by every rank; returns the last state."""
    data_group = groups.group(layout, "dp")
    gather = partial(collectives.gather_json, group=data_group)
    lesson, learner, checkpointables = parts.lesson, parts.student.learner, {parts.name: parts.student}
    cost = None if learner.packing is None else learner.packing.cost
    state = parts.checkpoints.restore_or_start(checkpointables)
    parts.log.start(state.step)
    if state.step == 0:
        parts.log.write(0, evaluate(parts, run, layout).reduced(gather))
    while state.step < run.train.total_steps and not parts.checkpoints.is_draining:
        metrics = StepMetrics()
        with metrics.time("learn"):
            batch = lesson.collate(parts.examples.for_step(state.step, run.train.batch_size, run.seed, layout, cost))
            weight = collectives.sum_over(lesson.weight(batch).to(device.device()), data_group)
            metrics += learner.step(batch, lesson.head, lesson.loss_function(max(float(weight), 1.0)))
        state = state.advance(run.train.batch_size)
        if is_exam_due(run, state.step):
            with metrics.time("evaluate"):
                metrics += evaluate(parts, run, layout)
        report = metrics.reduced(gather)
        parts.log.write(state.step, report)
        if parts.checkpoints.due(state, report):
            parts.checkpoints.save(state, checkpointables, report)
    parts.log.close()
    return state


def is_exam_due(run: LessonRun, step: int) -> bool:
    """True every `train.eval_every_steps` steps, and after the last step."""
    every = run.train.eval_every_steps
    return step == run.train.total_steps or (every > 0 and step % every == 0)


def evaluate(parts: LessonParts, run: LessonRun, layout: ParallelLayout) -> Metrics:
    """This rank's share of the metrics on held-out examples, under `eval/`; empty without a held-out set. Called by every rank."""
    metrics = Metrics()
    if parts.held_out is None:
        return metrics
    lesson, shard, everybody = parts.lesson, parts.held_out.shard(layout), parts.held_out.examples
    size = run.parallel.microbatch_size * EVAL_MICROBATCHES
    for start in range(0, -(-len(everybody) // layout.data), size):
        # Data ranks may share experts: one that has nothing left reads another's example along, and says nothing of it.
        own = shard[start : start + size]
        batch = lesson.collate(own or everybody[:1]).to(device.device())
        stats = parts.student.learner.forward(batch, lesson.head)
        if own:
            with torch.no_grad():
                metrics = metrics + lesson.loss_function(1.0)(stats, batch)[1]
    return metrics.under("eval")


def build_parts(
    stage: str,
    run: LessonRun,
    layout: ParallelLayout,
    name: str,
    dataset: Callable[..., Examples],
    make_lesson: Callable[[int], Lesson],
    headline: Mapping[str, str],
) -> LessonParts:
    """The parts of a lesson, from the cheapest to the dearest. Called by every rank; a user's mistake on one rank is raised on all.

    `dataset(config, tokenizer, is_eval)` reads the examples; `make_lesson(pad_id)` makes the lesson of the student called `name`.
    """
    together = partial(collectives.together, group=groups.group(layout, "world"))
    role = ROLES[name]
    tokenizer = together(lambda: load_tokenizer(run.tokenizer))
    spec, source = together(lambda: open_start(run.model, role, run.seed))
    together(lambda: check_vocabulary(tokenizer, spec.vocab_size, run.model.path, "model.path"))
    examples = together(lambda: dataset(run.data, tokenizer))
    held_out = together(lambda: dataset(run.data, tokenizer, is_eval=True)) if run.data.eval_path is not None else None
    if layout.rank == 0:
        for notice in [*examples.notices(), *(held_out.notices() if held_out is not None else [])]:
            print(f"megarl: warning: {notice}", file=sys.stderr)
    run_json = run.model_dump(mode="json")
    log = together(lambda: RunLog.open(stage, run.output_dir, run.log, run.train.total_steps, headline, layout.rank == 0, run_json))
    learner, pieces = build_learner(spec, role, run.model, run, layout, source, run.train.total_steps)
    return LessonParts(
        lesson=make_lesson(tokenizer.pad_id),
        student=Student(spec, learner, pieces),
        name=name,
        examples=examples,
        held_out=held_out,
        checkpoints=Checkpoints(stage, run, layout, tokenizer, run.train.total_steps),
        log=log,
    )
