"""What a step learns from: responses of the current policy and their rewards, sampled and judged until there are enough.

A plain run asks once for all of them. `rollout.refill` replaces groups without signal by further prompts; `rollout.partial` samples in
chunks and carries what is not finished, or not needed yet, to the next step. All decisions are functions of token counts and rewards,
never of time, and equal on all ranks.
"""

import contextlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from itertools import chain

from megarl.checkpoint.train_state import TrainState
from megarl.config import PpoRun
from megarl.data.order import contiguous_share
from megarl.data.prompts import PromptSet
from megarl.errors import RolloutError
from megarl.metrics import Metric, Metrics, StepMetrics
from megarl.parallel import collectives, groups
from megarl.parallel.layout import ParallelLayout
from megarl.parallel.memory import Phases
from megarl.ppo.algorithms import ADVANTAGES
from megarl.ppo.held_groups import HeldGroups
from megarl.ppo.judge import Judge
from megarl.ppo.refill import Entry, chosen, learners, num_to_start, ready
from megarl.records import Trajectory
from megarl.rollout.engine import Engine
from megarl.rollout.response_group import Asking, ResponseGroup


@dataclass(frozen=True)
class Harvest:
    """What one data rank learns from in a step.

    `trajectories` lie prompt by prompt; `places` says where each of these prompts stands among those of all data ranks. `num_prompts` is
    how far the step went in the run's stream of prompts.
    """

    trajectories: list[Trajectory]
    places: list[int]
    num_prompts: int


class Harvester:
    """Asks, judges and chooses. `carried` are this data rank's groups that wait for the next step: a part of what a checkpoint keeps.

    `gather` is entered by every rank of the world.
    """

    def __init__(
        self, run: PpoRun, layout: ParallelLayout, prompts: PromptSet, stop_token_ids: Sequence[int], engine: Engine, memory: Phases
    ):
        self.carried: list[ResponseGroup] = []
        self._run, self._layout, self._prompts, self._engine, self._memory = run, layout, prompts, engine, memory
        self._stops, self._group = tuple(stop_token_ids), groups.group(layout, "dp")
        self._with_greedy = ADVANTAGES[run.ppo.advantage].greedy
        self._has_reward_model = any(part.kind == "model" for part in run.rewards)

    def gather(self, state: TrainState, judge: Judge, metrics: StepMetrics) -> Harvest:
        """Sample, judge and choose `rollout.prompts_per_step` groups.

        Raises `RolloutError` on all ranks when too few have signal and `rollout.refill.when_short` is stop.
        """
        rollout, first = self._run.rollout, state.prompts_consumed
        asking = Asking(rollout, self._stops, self._run.seed, state.step, first, self._with_greedy)
        held = HeldGroups(self.carried, rollout.samples_per_prompt)
        table, end, num_starts, num_requests = self._table(held), first, 0, 0
        while num_starts == 0 or len(ready(table)) < rollout.prompts_per_step:
            count = num_to_start(table, rollout, num_starts, self._layout.data)
            num_starts += num_starts == 0 or count > 0
            if not count and all(entry.is_complete for entry in table):
                break
            self._start(held, end, count)
            end, num_requests = end + count, num_requests + 1
            self._sample(held, asking, judge, metrics)
            if rollout.refill is not None:
                self._judge(held, held.unjudged(held.groups), judge, metrics)
            table = self._table(held)
        entries, num_idle = chosen(table, rollout.prompts_per_step)
        self._say_short(state.step, num_idle, num_starts)
        if rollout.partial is None and not num_idle:
            end = max(first, entries[-1].position + 1)  # prompts behind the last one used are as if nobody had asked
        metrics += self._metrics(table, num_starts, num_requests, num_idle)
        places = self._deal(held, entries)
        mine = [entries[place].position for place in places]
        self._judge(held, held.unjudged(mine), judge, metrics)
        trajectories = list(chain.from_iterable(held.samples(position) for position in mine))
        judge.watch(trajectories)
        self._carry(held, table, entries, end)
        return Harvest(trajectories, places, end - first)

    def _start(self, held: HeldGroups, first: int, count: int) -> None:
        if count:
            prompts = self._prompts.from_position(first, count, self._run.seed, self._layout)
            for position, prompt in enumerate(prompts, first + self._layout.data_offset(len(prompts))):
                held.put(ResponseGroup(position, prompt))

    def _sample(self, held: HeldGroups, asking: Asking, judge: Judge, metrics: StepMetrics) -> None:
        """One request for every response that is not finished."""
        unfinished = held.unfinished
        requests = [group.requests(asking) for group in unfinished]
        on_finished = judge.on_finished if self._run.rollout.partial is None else None  # a chunk is no response to score
        with self._memory.generating(), metrics.time("generate"):
            completions = iter(self._engine.generate(list(chain.from_iterable(requests)), on_finished))
        for group, own in zip(unfinished, requests, strict=True):
            held.put(group.answered([next(completions) for _ in own], asking))

    def _judge(self, held: HeldGroups, complete: Sequence[ResponseGroup], judge: Judge, metrics: StepMetrics) -> None:
        """Rewards for these groups, of which other data ranks may have more or fewer."""
        may_sample_more = self._run.rollout.refill is not None and not self._has_reward_model
        with contextlib.nullcontext() if may_sample_more else self._memory.scoring(), metrics.time("score"):
            responses = list(chain.from_iterable(group.responses for group in complete))
            held.judge(complete, judge.trajectories([group.prompt for group in complete for _ in group.responses], responses))

    def _table(self, held: HeldGroups) -> list[Entry]:
        """All groups of all data ranks."""
        mine = [list(astuple(entry)) for entry in held.entries(self._layout.dp_rank, self._run.rollout.refill)]
        return [Entry(*entry) for part in collectives.gather_json(mine, self._group) for entry in part]

    def _deal(self, held: HeldGroups, entries: Sequence[Entry]) -> list[int]:
        """The places of the groups that this data rank learns from, equally many on all; those it did not sample come to it."""
        dealt = learners([entry.owner for entry in entries], self._layout.data)
        moving = [entry.position for entry, learner in zip(entries, dealt, strict=True) if learner != entry.owner]
        if moving:
            for part in collectives.gather_json(held.to_json(moving), self._group):
                held.take(part)
        return [place for place, learner in enumerate(dealt) if learner == self._layout.dp_rank]

    def _carry(self, held: HeldGroups, table: Sequence[Entry], taken: Iterable[Entry], end: int) -> None:
        """What was sampled here, is not learned from now and may be later. Prompts from `end` on will be read again."""
        gone = {entry.position for entry in taken} | {e.position for e in table if e.is_complete and not e.has_signal}
        own = {entry.position for entry in table if entry.owner == self._layout.dp_rank and entry.position < end}
        self.carried = [held.groups[position] for position in sorted(own - gone)]

    def to_hand_on(self) -> bytes | None:
        """The groups that wait, as a checkpoint keeps them (`checkpoint.carried`). One rank of a replica tells for all."""
        if self._run.rollout.partial is None or self._layout.rank != self._layout.rank_at(dp=self._layout.dp_rank):
            return None
        return json.dumps([group.to_json() for group in self.carried]).encode()

    def take_back(self, parts: Sequence[bytes]) -> None:
        """Go on with what `to_hand_on` told on every data rank; other data ranks than there were share it anew."""
        told = [[ResponseGroup.from_json(group) for group in json.loads(part)] for part in parts]
        if len(told) == self._layout.data:
            self.carried = told[self._layout.dp_rank]
        else:
            everybody = sorted(chain.from_iterable(told), key=lambda group: group.position)
            self.carried = everybody[contiguous_share(len(everybody), self._layout)]

    def _say_short(self, step: int, num_idle: int, num_starts: int) -> None:
        if not num_idle:
            return
        count = self._run.rollout.prompts_per_step
        text = f"step {step + 1}: {count - num_idle} of {count} groups have a signal after {num_starts} rounds of sampling"
        if self._run.rollout.refill.when_short == "stop":
            raise RolloutError(
                f"{text}; expected all, as rollout.refill.when_short is stop: raise rollout.refill.rounds or rollout.samples_per_prompt, or"
                " choose prompts that are neither always nor never solved"
            )
        if self._layout.rank == 0:
            print(f"megarl: warning: {text}; the batch is filled with groups that teach nothing", file=sys.stderr)

    def _metrics(self, table: Sequence[Entry], num_starts: int, num_requests: int, num_idle: int) -> Metrics:
        """Equal on all data ranks, and after their reduction."""
        found = {}
        judged = [entry for entry in table if entry.is_complete]
        if self._run.rollout.refill is not None:
            found["refill/rounds"] = Metric(float(num_starts))
            found["refill/dropped_share"] = Metric(sum(not entry.has_signal for entry in judged) / len(judged))
            found["refill/idle_groups"] = Metric(float(num_idle))
        if self._run.rollout.partial is not None:
            found["partial/chunks"] = Metric(float(num_requests))
            found["partial/unfinished_groups"] = Metric(float(len(table) - len(judged)))
            found["partial/waiting_groups"] = Metric(float(len(ready(table)) - self._run.rollout.prompts_per_step + num_idle))
        return Metrics(found)
