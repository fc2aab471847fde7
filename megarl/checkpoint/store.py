"""A run's checkpoints: `output_dir/checkpoints/step-00000123/`, complete or not there at all.

Every rank writes what it owns into a staging directory; when all have, rank 0 writes the manifest last, renames the directory into place
and replaces the pointer `latest`. A process killed at any moment leaves the previous checkpoint as it was. Saving may go on behind the
training: then a step pays for a copy to host memory. `docs/checkpoints.md` describes the files.
"""

import contextlib
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from megarl.checkpoint import manifest as manifests
from megarl.checkpoint.attempts import Attempt, sweep
from megarl.checkpoint.carried import Carried, carried_file, read_carried
from megarl.checkpoint.files import Checkpointable, HostBuffers, num_bytes_saved, plan_files
from megarl.checkpoint.manifest import FORMAT, ROLES, STEP_NAME, Manifest, StoredLayout, StoredModel
from megarl.checkpoint.publication import Publication
from megarl.checkpoint.publish import check_room, special_tokens, tokenizer_files, versions
from megarl.checkpoint.restore import check_same_run, load, load_random_states, verify_share
from megarl.checkpoint.retention import BestSoFar
from megarl.checkpoint.saving import Background, SaveJob, disk_errors
from megarl.checkpoint.train_state import TrainState
from megarl.config import Run
from megarl.data.tokenizers import Tokenizer
from megarl.errors import CheckpointError, DamageError, FencedError, MegarlError
from megarl.metrics import Metrics
from megarl.operations import drain, heartbeat
from megarl.parallel import collectives, device, groups
from megarl.parallel.layout import ParallelLayout

__all__ = ["Checkpointable", "Checkpoints"]

Result = TypeVar("Result")
POLL_S = 0.05
NO_METRICS = Metrics()


class Checkpoints:
    """Saves and restores one run. Every method is entered by all ranks; a failure on one is raised on all of them.

    `stall_s` is what the last `save` cost the training, in seconds. `is_draining`: the run was asked to stop (`operations.drain`), and what
    is finished is saved: no further step should begin.
    """

    def __init__(
        self, course: str, run: Run, layout: ParallelLayout, tokenizer: Tokenizer, total_steps: int, carried: Carried | None = None
    ):
        self.course = course
        self.run = run
        self.layout = layout
        self.tokenizer = tokenizer
        self.total_steps = total_steps
        self.directory = Path(run.output_dir) / "checkpoints"
        self.stall_s = 0.0
        self._world = groups.group(layout, "world")
        self._attempt = Attempt(self.directory, 0)
        self._parent = ""
        self._texts: dict[str, bytes] = {}  # files of the tokenizer: they never change
        self._buffers = HostBuffers()
        self._pending: Background | None = None
        self._failures = 0  # in a row
        self.carried = carried  # what a step hands to the next one, beside models and TrainState
        self.is_draining = False
        self._best, self._is_best = BestSoFar(run.checkpoint.keep_best), False

    # ---------------------------------------------------------------- save
    def due(self, state: TrainState, metrics: Metrics = NO_METRICS) -> bool:
        """True every `checkpoint.every_steps` steps, after the last step (of the run, or before it stops because it was asked to), and when
        `metrics`, those of this step and equal on all ranks, hold a new best value of `checkpoint.keep_best`. Called by every rank after
        every step.

        This is where a save in the background reports: its failure is raised here, or warned of (`checkpoint.max_failures`).
        """
        if self._pending is not None and self._has_ended(self._pending):
            self._settle()
        every = self.run.checkpoint.every_steps
        self._is_best = self._best.take(metrics.values_by_name())
        self.is_draining = self._is_asked_to_stop()
        return self._is_best or self._is_last(state) or (every > 0 and state.step % every == 0)

    def save(self, state: TrainState, checkpointables: Mapping[str, Checkpointable], metrics: Metrics = NO_METRICS) -> None:
        """Write a checkpoint of `state`; `metrics` is what its step reported.

        Returns when it is published or, with `checkpoint.background`, when everything is copied; after the last step always the former.
        Raises `CheckpointError` or `SetupError` (no room) on every rank, unless `checkpoint.max_failures` allows to go on.
        """
        began = time.monotonic()
        is_last, config = self._is_last(state), self.run.checkpoint
        name = f"step-{state.step:08d}"
        if not is_last and (skipping := sorted(model for model, kept in checkpointables.items() if kept.learner.is_skipping)):
            self._say(
                f"{name} is left out: updates of {' and '.join(skipping)} are being skipped, and the one before is from before the first"
            )
            return
        if self._pending is not None:
            if config.background == "skip" and not is_last and not self._is_best:
                self._say(f"{name} is left out: {self._pending.job.staging.name} is still being written")
                return
            self.finish()
        try:
            with heartbeat.phase("save", state.step):
                job = self._start(self.directory / name, state, checkpointables, metrics)
                if config.background != "off" and not is_last:
                    job.plan = self._buffers.copy(job.plan)
                    self._pending = Background(job)
                else:
                    self._together(job.write)
                    self._together(job.conclude)
                    self._succeed(job)
        except MegarlError as error:
            self._fail(error, name, is_last)
        self.stall_s = time.monotonic() - began

    def _is_last(self, state: TrainState) -> bool:
        return state.step == self.total_steps or self.is_draining

    def _is_asked_to_stop(self) -> bool:
        """Every rank gets the same answer, so that all stop after the same step."""
        if not drain.is_listening():
            return False
        asked = torch.tensor(int(bool(drain.reason(self.layout.rank))), device=device.device())
        return bool(collectives.max_over(asked, self._world))

    def finish(self) -> None:
        """Wait for a save in the background, if there is one. Raises as `save` does."""
        if self._pending is not None:
            while not self._has_ended(self._pending):
                time.sleep(POLL_S)
            self._settle()

    def _has_ended(self, pending: Background) -> bool:
        """Whether every rank's part has ended, or somebody's has failed: then the others' is in vain."""
        answers = collectives.gather_json([pending.is_running, pending.has_failed], self._world)
        return any(failed for _, failed in answers) or not any(running for running, _ in answers)

    def _settle(self) -> None:
        """The end of a save in the background, on every rank."""
        pending, self._pending = self._pending, None
        assert pending is not None
        failed = collectives.gather_json(pending.has_failed, self._world)
        if any(failed):
            pending.job.is_given_up.set()
        pending.wait()
        is_in_vain = any(failed) and not failed[self.layout.rank]
        try:
            collectives.agree(None if is_in_vain else pending.error, self._world)
        except MegarlError as error:
            self._fail(error, pending.job.name, is_last=False)
        else:
            self._succeed(pending.job)

    def _succeed(self, job: SaveJob) -> None:
        self._parent, self._failures = job.name, 0

    def _fail(self, error: MegarlError, name: str, is_last: bool) -> None:
        """Called where an error is being handled, on every rank."""
        self._failures += 1
        allowed = self.run.checkpoint.max_failures
        if self.layout.rank == 0:
            shutil.rmtree(self._attempt.staging(name), ignore_errors=True)
        if is_last or isinstance(error, FencedError) or self._failures > allowed:
            raise error
        self._say(
            f"{name} was not saved: {error}; training goes on (failures in a row: {self._failures}, checkpoint.max_failures={allowed})"
        )

    def _start(self, final: Path, state: TrainState, checkpointables: Mapping[str, Checkpointable], metrics: Metrics) -> SaveJob:
        """This rank's part of a save, with live tensors, and an empty staging directory to write to."""
        plan = plan_files(self.layout.rank, checkpointables) + carried_file(self.layout.rank, self.carried)
        staging, timeout_s = self._attempt.staging(final.name), self.run.checkpoint.timeout_s
        job = SaveJob(final.name, staging, plan, self.layout.rank, self.layout.world_size, timeout_s)
        needed = sum(collectives.gather_json(job.num_bytes, self._world))
        if self.layout.rank == 0:
            self._texts = self._texts or tokenizer_files(self.tokenizer)
            specs = {model: kept.spec for model, kept in checkpointables.items()}
            manifest = self._manifest(state, checkpointables, metrics)
            job.publish = Publication(self._attempt, staging, final, manifest, specs, self.run, self._texts)
        self._together(lambda: self._make_staging(staging, checkpointables, needed) if self.layout.rank == 0 else None)
        return job

    def _make_staging(self, staging: Path, checkpointables: Mapping[str, Checkpointable], needed: int) -> None:
        self._attempt.check()
        sweep(self.directory)
        check_room(self.directory, needed, "a checkpoint needs", "lower checkpoint.keep_last, or move output_dir")
        staging.mkdir()
        for model in checkpointables:
            (staging / model).mkdir()

    def _manifest(self, state: TrainState, checkpointables: Mapping[str, Checkpointable], metrics: Metrics) -> Manifest:
        models = {
            model: StoredModel(shapes=kept.spec.table(ROLES[model]).hf_shapes, counts=kept.learner.counts())
            for model, kept in checkpointables.items()
        }
        best = self.run.checkpoint.keep_best
        if best is not None and not self._best.has_seen:
            self._say(f"no step has reported checkpoint.keep_best={best} so far; step {state.step} reported {', '.join(metrics)}")
        return Manifest(
            format=FORMAT,
            course=self.course,
            state=state.to_json(),
            layout=self._stored_layout(),
            models=models,
            files={},
            tokenizer=special_tokens(self.tokenizer),
            versions=versions(),
            run=self.run.model_dump(mode="json"),
            parent=self._parent,
            attempt=self._attempt.number,
            metrics={name: value for name, value in metrics.values_by_name().items() if math.isfinite(value)},
        )

    # ---------------------------------------------------------------- restore
    def restore_or_start(self, checkpointables: Mapping[str, Checkpointable], start: TrainState | None = None) -> TrainState:
        """Continue from the newest undamaged checkpoint of the output directory, or return `start` where there is none.

        Weights and optimizers are put back under any layout, this rank's random states under the one that wrote them. Raises
        `CheckpointError` on every rank when all checkpoints are damaged (with `checkpoint.strict` when the newest is) or belong to
        another model, precision or stage of the course, and `SetupError` when the disk has no room for the next checkpoint: hours of
        training must not end there.
        """
        owned = sum(map(num_bytes_saved, checkpointables.values()))
        needed = sum(collectives.gather_json(owned, self._world))
        begun = self._together(lambda: self._begin(needed) if self.layout.rank == 0 else None)
        number, names, reported = collectives.gather_json(begun, self._world)[0]
        self._attempt = Attempt(self.directory, number)
        for values in reported:
            self._best.take(values)
        self.is_draining = self._is_asked_to_stop()
        if not names:
            return start or TrainState()
        with heartbeat.phase("load"):
            name, manifest = self._newest_undamaged(names)
            self._together(lambda: self._read(self.directory / name, manifest, checkpointables))
        self._parent = name
        return TrainState.from_json(manifest.state)

    def _begin(self, needed: int) -> tuple[int, list[str], list[dict[str, float]]]:
        """Take over the directory: this start's number, the checkpoints to continue from, newest first, and what their steps reported.

        Rank 0 alone.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        steps = sorted((int(match[1]), path.name) for path in self.directory.iterdir() if (match := STEP_NAME.fullmatch(path.name)))
        if steps and not self.run.checkpoint.resume:
            raise CheckpointError(
                f"{self.directory} already holds {steps[-1][1]}, but checkpoint.resume is false: set it to true to continue that run, or"
                " choose another output_dir"
            )
        attempt = Attempt.take(self.directory)
        sweep(self.directory)
        check_room(self.directory, needed, "a checkpoint needs", "lower checkpoint.keep_last, or move output_dir")
        steps = sorted((int(match[1]), path.name) for path in self.directory.iterdir() if (match := STEP_NAME.fullmatch(path.name)))
        return attempt.number, [name for _, name in reversed(steps)], self._reported([name for _, name in steps])

    def _reported(self, names: list[str]) -> list[dict[str, float]]:
        """The metrics of every readable checkpoint, where the run wants to keep the best one."""
        if self.run.checkpoint.keep_best is None:
            return []
        found = []
        for name in names:
            with contextlib.suppress(CheckpointError):  # damaged: said where it is tried
                found.append(dict(manifests.read_manifest(self.directory / name).metrics))
        return found

    def _newest_undamaged(self, names: list[str]) -> tuple[str, Manifest]:
        """The first of `names` whose every byte is as written; those before it are set aside."""
        for tried, name in enumerate(names):
            try:
                manifest = self._together(partial(self._verified, self.directory / name))
            except DamageError as error:
                if self.run.checkpoint.strict:
                    raise CheckpointError(f"{error}; checkpoint.strict is true: set it to false to continue from an older one") from error
                self._say(f"{error}; {name} is left aside")
                continue
            self._set_aside(names[:tried], name)
            return name, manifest
        raise CheckpointError(
            f"{self.directory}: all {len(names)} checkpoints are damaged, see above: bring one back from a backup, or choose another"
            " output_dir"
        )

    def _verified(self, directory: Path) -> Manifest:
        manifest = manifests.read_manifest(directory)
        verify_share(directory, manifest, self.layout.rank, self.layout.world_size)
        return manifest

    def _set_aside(self, damaged: list[str], name: str) -> None:
        """Damaged checkpoints keep their files, under names that no run continues from."""

        def rename() -> None:
            for old in damaged:
                (self.directory / old).rename(self.directory / f"damaged-{self._attempt.number}-{old}")

        if damaged:
            self._say(f"continuing from {name}")
            self._together(lambda: rename() if self.layout.rank == 0 else None)

    def _read(self, directory: Path, manifest: Manifest, checkpointables: Mapping[str, Checkpointable]) -> None:
        layout = self._stored_layout()
        check_same_run(directory, manifest, self.course, layout.precision, {model: kept.spec for model, kept in checkpointables.items()})
        for notice in load(directory, manifest, checkpointables):
            self._say(notice)
        if self.carried is not None:
            self.carried.take_back(read_carried(directory, manifest))
        if manifest.layout == layout:
            load_random_states(directory, manifest, self.layout.rank)
        else:
            self._say(
                f"{directory.name} was written by the layout {manifest.layout}, this run has {layout}: random states start from the seed"
            )

    def _stored_layout(self) -> StoredLayout:
        axes = {axis: getattr(self.layout, axis) for axis in ("tensor", "pipeline", "context", "expert", "world_size")}
        parallel = self.run.parallel
        return StoredLayout(
            **axes,
            virtual_pipeline=parallel.virtual_pipeline,
            distributed_optimizer=parallel.distributed_optimizer,
            precision=self.run.precision,
        )

    def _say(self, what: str) -> None:
        if self.layout.rank == 0:
            print(f"megarl: warning: {what}", file=sys.stderr)

    def _together(self, work: Callable[[], Result]) -> Result:
        """Do this rank's part of something on disk; when any rank's part fails, every rank raises."""

        def on_disk() -> Result:
            with disk_errors(self.directory, 0):
                return work()

        return collectives.together(on_disk, self._world)
