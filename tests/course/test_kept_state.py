"""Whatever changes from step to step is in the checkpoint, or is named here with the reason why a resumed run does without it."""

import dataclasses
import enum
import hashlib
import re
from collections import deque
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType, ModuleType

import pytest

from tests.course.lesson_files import sft_run, write_files
from tests.course.test_ppo import ppo_run
from tests.ranks import run_ranks

KEPT = {
    r"\.pieces\.\d+\.view": "the weights; Adam's state lies beside them in Megatron's optimizer, and is stored as its pieces",
    r"\.learner\.num_(steps|updates)": "Learner.counts()",
    r"\.learner\.ema\._averages\.\d+": "stored as pieces of the slot ema",
    r"\.reference\.num_refreshes": "RefreshedReference.counts()",
    r"\.engine\.policy_version": "TrainState.policy_version, pushed again when the run starts",
}
FORGOTTEN = {
    ".checkpoints.": "what has been written, and how long that took",
    ".log.": "files that are appended to; a resumed run drops lines of steps that it does again",
    ".weight_sync.": "how many syncs were verified: the first ones of every process are",
    ".memory.": "where tensors wait between phases, not what they hold",
    ".judge.alarm.": "for how many steps a reward was constant, which is a warning; each process counts its own",
    ".parity.": "which samples were compared: each process compares its first step",
    ".guard._losses.": "the last losses, for a warning: each process gathers its own",
    ".movables.": "where tensors wait between phases, not what they hold",
    ".engine.": "the sampler's own buffers: its weights are pushed, its random numbers follow (seed, step, sample)",
}
STATELESS = (str, bytes, bool, type(None), enum.Enum, type, FunctionType, MethodType, ModuleType, Path)


def leaves(root: object) -> dict[str, str]:
    """Every number and tensor that can be reached through megarl's own objects and plain containers, each under its shortest path."""
    import random

    import numpy
    import torch

    found: dict[str, str] = {}
    seen: set[int] = set()
    waiting = deque([("", root)])
    while waiting:
        path, thing = waiting.popleft()
        if isinstance(thing, bool | int | float | numpy.generic):
            found[path] = repr(thing)
        elif isinstance(thing, torch.Tensor):
            data = thing.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy()
            found[path] = hashlib.sha256(data.tobytes()).hexdigest()
        elif isinstance(thing, numpy.ndarray):
            found[path] = hashlib.sha256(thing.tobytes()).hexdigest()
        elif isinstance(thing, random.Random):
            found[path] = repr(thing.getstate())
        elif isinstance(thing, torch.Generator):
            waiting.append((path, thing.get_state()))
        elif not isinstance(thing, (torch.nn.Module, *STATELESS)) and id(thing) not in seen:
            seen.add(id(thing))
            waiting.extend((f"{path}.{name}", value) for name, value in children(thing))
    return found


def children(thing: object) -> list[tuple[str, object]]:
    if isinstance(thing, Mapping):
        return [(str(key), value) for key, value in thing.items()]
    if isinstance(thing, list | tuple | set | deque):
        return [("len", len(thing)), *((str(index), value) for index, value in enumerate(thing))]
    if isinstance(thing, partial):
        return [("args", thing.args), ("keywords", thing.keywords)]
    if type(thing).__module__.startswith(("megarl", "tests")):
        names = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
        return list(vars(thing).items()) if hasattr(thing, "__dict__") else [(name, getattr(thing, name)) for name in names]
    return []


def is_accounted_for(path: str) -> bool:
    return any(re.search(pattern + "$", path) for pattern in KEPT) or any(name in path for name in FORGOTTEN)


@dataclasses.dataclass
class Counter:
    """A part that somebody forgot to keep."""

    count: int = 0


def changes(parts: object, train) -> list[str]:
    """Paths of what differs between the ends of steps, while `train` runs."""
    from megarl.checkpoint.store import Checkpoints

    found: list[dict[str, str]] = []
    original = Checkpoints.due

    def looking(self, state, *metrics):
        found.append(leaves(parts))
        return original(self, state, *metrics)

    Checkpoints.due = looking
    try:
        train()
    finally:
        Checkpoints.due = original
    assert len(found) == 3
    return sorted({path for a, b in zip(found, found[1:]) for path in a.keys() | b.keys() if a.get(path) != b.get(path)})


def lesson_changes(rank: int, world_size: int, root: Path) -> list[str]:
    from megarl.course.lesson import build_parts, teach
    from megarl.course.sft import HEADLINE, DemonstrationSet, Imitation
    from megarl.parallel import groups

    run = sft_run(root, "lesson", 3, checkpoint={"every_steps": 1})
    layout = groups.initialize(run.parallel, run.seed)
    parts = build_parts("sft", run, layout, "actor", DemonstrationSet, partial(Imitation, run.parallel.logits_bytes), HEADLINE)
    forgotten = Counter()
    original = parts.lesson.collate

    def counted(examples):
        forgotten.count += 1
        return original(examples)

    parts.lesson.collate = counted
    return changes([parts, forgotten], lambda: teach(run, layout, parts))


def ppo_changes(rank: int, world_size: int, root: Path) -> list[str]:
    from megarl.parallel import groups
    from megarl.ppo.assembly import build_parts
    from megarl.ppo.loop import train

    ppo = {"total_steps": 3, "minibatch_size": 16, "kl": {"coef": 0.01, "target": 1.0}}
    run = ppo_run(root, "ppo", ppo=ppo, checkpoint={"every_steps": 1})
    layout = groups.initialize(run.parallel, run.seed)
    parts = build_parts(run, layout)
    return changes(parts, lambda: train(run, layout, parts))


def test_a_lesson_keeps_all_that_changes(tmp_path):
    found = run_ranks(lesson_changes, 1, write_files(tmp_path))[0]
    assert ".0.student.learner.num_steps" in found and ".0.student.learner.num_updates" in found
    assert ".1.count" in found, "the search finds what nobody keeps"
    assert [path for path in found if not is_accounted_for(path)] == [".1.count"]


@pytest.mark.slow
def test_ppo_keeps_all_that_changes(tmp_path):
    from megarl.quickstart.make_data import make_data

    make_data(tmp_path / "data", seed=0)
    found = run_ranks(ppo_changes, 1, tmp_path)[0]
    assert {f".{role}.learner.{name}" for role in ("actor", "critic") for name in ("num_steps", "num_updates")} <= set(found)
    assert [path for path in found if not is_accounted_for(path)] == []


@pytest.mark.parametrize("path", [".actor.learner.ema", ".judge.running.count", ".0.prompts.position"])
def test_new_state_is_not_accounted_for_by_itself(path):
    assert not is_accounted_for(path)
