"""The alarm for a reward that gives every response the same score, step after step: nothing can be learned from it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from megarl.records import Trajectory

FIRST_WARNING = 5  # steps in a row; then 10, 20, 40, ...

Span = tuple[float, float, int, int, int]  # lowest score, highest score, number of responses, lowest and highest prompt_id


@dataclass
class ConstantAlarm:
    """Counts, for every part of the reward, the steps in a row in which all responses of all ranks got one and the same score."""

    steps: dict[str, int] = field(default_factory=dict)

    def spans(self, trajectories: Sequence[Trajectory]) -> dict[str, Span]:
        """What `after_step` needs of one rank's rows."""
        ids = [trajectory.prompt.prompt_id for trajectory in trajectories]
        columns: dict[str, list[float]] = {}
        for trajectory in trajectories:
            for name, score in trajectory.reward_parts.items():
                columns.setdefault(name, []).append(score)
        return {name: (min(scores), max(scores), len(scores), min(ids), max(ids)) for name, scores in columns.items()}

    def after_step(self, spans: Sequence[dict[str, Span]]) -> list[str]:
        """Warnings that are due now. `spans` of every data rank: equal arguments on all ranks keep their counts equal."""
        warnings = []
        for name in spans[0]:
            lows, highs, counts, first_ids, last_ids = zip(*(span[name] for span in spans))
            is_constant = min(lows) == max(highs) and sum(counts) > 1
            steps = self.steps[name] = self.steps.get(name, 0) + 1 if is_constant else 0
            if steps >= FIRST_WARNING and steps % FIRST_WARNING == 0 and (steps // FIRST_WARNING).bit_count() == 1:
                warnings.append(
                    f"reward {name} has been {min(lows):g} for every response of the last {steps} steps (this step: {sum(counts)} responses"
                    f" to prompts {min(first_ids)} to {max(last_ids)}); nothing is learned from it: look at samples.jsonl"
                )
        return warnings
