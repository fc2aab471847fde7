"""The groups of responses that one data rank holds in a step, and what the complete ones earned."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from megarl.config import RefillConfig
from megarl.ppo.refill import Entry, has_signal
from megarl.records import Trajectory
from megarl.rollout.response_group import ResponseGroup


class HeldGroups:
    """Groups by position in the stream of prompts. Of `num_samples` responses each, a further one is the greedy one."""

    def __init__(self, carried: Iterable[ResponseGroup], num_samples: int):
        self.groups = {group.position: group for group in carried}
        self._num_samples = num_samples
        self._judged: dict[int, list[Trajectory]] = {}  # every response of a group, the greedy one included

    def put(self, group: ResponseGroup) -> None:
        """Hold a group, instead of what was known of it."""
        self.groups[group.position] = group

    @property
    def unfinished(self) -> list[ResponseGroup]:
        """Groups of which more is to be sampled, oldest first."""
        return [group for _, group in sorted(self.groups.items()) if not group.is_complete]

    def unjudged(self, positions: Iterable[int]) -> list[ResponseGroup]:
        """Those of `positions` that are complete and have no rewards, oldest first."""
        waiting = [self.groups[position] for position in sorted(positions) if position not in self._judged]
        return [group for group in waiting if group.is_complete]

    def judge(self, complete: Sequence[ResponseGroup], trajectories: Sequence[Trajectory]) -> None:
        """Keep what these groups earned: one trajectory a response, group by group."""
        judged = iter(trajectories)
        for group in complete:
            self._judged[group.position] = [next(judged) for _ in group.responses]

    def samples(self, position: int) -> list[Trajectory]:
        """What a judged group's samples earned, each with the greedy response where there is one."""
        judged = self._judged[position]
        greedy = judged[self._num_samples] if len(judged) > self._num_samples else None
        return [replace(trajectory, greedy=greedy) for trajectory in judged[: self._num_samples]]

    def entries(self, owner: int, refill: RefillConfig | None) -> list[Entry]:
        """What others must know of these groups. `owner` is this data rank."""
        return [
            Entry(position, owner, group.is_complete, self._has_signal(position, refill)) for position, group in sorted(self.groups.items())
        ]

    def _has_signal(self, position: int, refill: RefillConfig | None) -> bool:
        return refill is None or (position in self._judged and has_signal(self.samples(position), refill))

    def to_json(self, positions: Iterable[int]) -> list:
        """The groups at `positions` that are held here, with their rewards, as `take` reads them."""
        held = [position for position in sorted(positions) if position in self.groups]
        return [[self.groups[p].to_json(), [[t.reward, t.reward_parts] for t in self._judged.get(p, ())]] for p in held]

    def take(self, told: list) -> None:
        """Hold the groups that another data rank's `to_json` told of."""
        for encoded, earned in told:
            group = ResponseGroup.from_json(encoded)
            self.put(group)
            if earned:
                pairs = zip(group.responses, earned, strict=True)
                self._judged[group.position] = [Trajectory(group.prompt, response, *reward) for response, reward in pairs]
