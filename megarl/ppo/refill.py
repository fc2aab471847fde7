"""Which prompts a step learns from: how many to start, which groups carry signal, which are taken, and who learns from which. Pure.

A step's table has an entry for every group under way, on whatever data rank; all ranks hold the same one and decide alike.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megarl.config import RefillConfig, RolloutConfig
from megarl.records import Trajectory
from megarl.rollout.check import SUM, num_under_way


@dataclass(frozen=True)
class Entry:
    """A group: its position in the stream of prompts, the data rank that holds it, whether it is complete and may be learned from."""

    position: int
    owner: int
    is_complete: bool
    has_signal: bool  # always true where nobody asks


def has_signal(group: Sequence[Trajectory], refill: RefillConfig) -> bool:
    """Whether responses to one prompt differ in what they earned, with a mean within the bounds. Source: DAPO, Yu et al. (2025)."""
    earned = [t.reward if refill.by == SUM else t.reward_parts[refill.by] for t in group]
    mean = math.fsum(earned) / len(earned)
    is_inside = (refill.low is None or mean >= refill.low) and (refill.high is None or mean <= refill.high)
    return min(earned) < max(earned) and is_inside


def num_to_start(table: Sequence[Entry], rollout: RolloutConfig, num_starts: int, data: int) -> int:
    """Prompts to start now, a multiple of the `data` ranks: 0 when there are enough, or none may follow.

    `num_starts` counts the times that prompts were started in this step. Refilling asks for what is missing over the share of groups that
    had signal so far, at most `prompts_per_step` at once.
    """
    if num_starts == 0:
        return _rounded(max(0, num_under_way(rollout) - len(table)), data)
    if rollout.refill is None or num_starts > rollout.refill.rounds:
        return 0
    judged = [entry for entry in table if entry.is_complete]
    hopeful = [entry for entry in table if not entry.is_complete or entry.has_signal]
    missing = rollout.prompts_per_step - len(hopeful)
    if missing <= 0:
        return 0
    share = max(1, sum(entry.has_signal for entry in judged)) / max(1, len(judged))
    return _rounded(min(rollout.prompts_per_step, math.ceil(missing / share)), data)


def ready(table: Sequence[Entry]) -> list[Entry]:
    """What can be learned from, oldest first."""
    return sorted((entry for entry in table if entry.is_complete and entry.has_signal), key=lambda entry: entry.position)


def chosen(table: Sequence[Entry], count: int) -> tuple[list[Entry], int]:
    """The `count` groups that the step learns from, in the order of their prompts, and how many of them have no signal.

    The oldest with signal; where those do not suffice, the oldest of the others.
    """
    found = ready(table)[:count]
    idle = sorted((entry for entry in table if entry.is_complete and not entry.has_signal), key=lambda entry: entry.position)
    filled = idle[: count - len(found)]
    assert len(found) + len(filled) == count, (len(found), len(filled), count)
    return sorted(found + filled, key=lambda entry: entry.position), len(filled)


def learners(owners: Sequence[int], data: int) -> list[int]:
    """The data rank that learns from each of these groups, equally many each: its owner where it has room, else the first that has."""
    share = len(owners) // data
    room = [share] * data
    placed: list[int | None] = []
    for owner in owners:
        placed.append(owner if room[owner] else None)
        room[owner] -= bool(room[owner])
    free = iter([rank for rank in range(data) for _ in range(room[rank])])
    return [next(free) if rank is None else rank for rank in placed]


def _rounded(count: int, data: int) -> int:
    return -(-count // data) * data
