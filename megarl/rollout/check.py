"""What must fit together for sampling (docs/sampling.md), and what `--check` says of it. Pure: read on any machine."""

import math
from collections.abc import Iterator

from megarl.config import PpoRun, RolloutConfig
from megarl.config_file import Fault
from megarl.rewards.check import distinct_names

SUM = "reward"  # the name of the weighted sum among the parts of a reward


def num_under_way(rollout: RolloutConfig) -> int:
    """Groups of responses that a step begins with."""
    factor = 1.0 if rollout.partial is None else rollout.partial.oversample
    return math.ceil(rollout.prompts_per_step * factor)


def sampling_faults(run: PpoRun, vocab_size: int | None) -> Iterator[Fault]:
    """`vocab_size` of the actor; None where it is not known."""
    rollout = run.rollout
    yield from _refill_faults(run)
    schedule, knob = rollout.length_schedule, "rollout.length_schedule.start"
    if schedule is not None and schedule.start >= rollout.max_response_tokens:
        text = f"found {schedule.start}; expected less than rollout.max_response_tokens {rollout.max_response_tokens}, which it grows to"
        yield Fault((knob, "rollout.max_response_tokens"), f"{knob}: {text}")
    least, most = rollout.min_response_tokens, rollout.max_response_tokens if schedule is None else schedule.start
    if least > most:
        names = ("rollout.max_response_tokens",) if schedule is None else (knob, "rollout.length_schedule")
        text = f"found {least}; expected at most {names[0]} {most}"
        yield Fault(("rollout.min_response_tokens", *names), f"rollout.min_response_tokens: {text}")
    outside = [token for token in rollout.stop_token_ids if vocab_size is not None and token >= vocab_size]
    if outside:
        text = f"rollout.stop_token_ids: found {outside[0]}; expected less than the actor's vocabulary of {vocab_size}"
        yield Fault(("rollout.stop_token_ids", "actor.path", "actor.shape"), text)


def _refill_faults(run: PpoRun) -> Iterator[Fault]:
    refill, samples = run.rollout.refill, run.rollout.samples_per_prompt
    if refill is None:
        return
    if samples == 1:
        text = "found 1 with rollout.refill; expected at least 2: one response alone never differs, so that no prompt would be learned from"
        yield Fault(("rollout.samples_per_prompt", "rollout.refill"), f"rollout.samples_per_prompt: {text}")
    names = (SUM, *distinct_names([part.kind for part in run.rewards]))
    if refill.by not in names:
        text = f"rollout.refill.by: found {refill.by!r}; expected {' or '.join(names)}: the sum, or a part of the reward"
        yield Fault(("rollout.refill.by", "rewards"), text)
    if refill.low is not None and refill.high is not None and refill.low > refill.high:
        text = f"rollout.refill.low: found {refill.low:g} with rollout.refill.high {refill.high:g}; expected at most that"
        yield Fault(("rollout.refill.low", "rollout.refill.high"), text)


def sampling_notices(run: PpoRun) -> list[str]:
    """Settings that are worth a look."""
    found = []
    if run.rollout.partial is not None and run.ppo.correction.kind == "none":
        found.append(
            "rollout.partial lets tokens of older weights be learned from, and ppo.correction.kind is none: tis or mask weighs them"
        )
    return found


def sampling_rows(run: PpoRun, with_greedy: bool) -> list[tuple[str, str]]:
    """Names and sentences about what a step samples beside its batch. `with_greedy`: the advantage compares with greedy responses."""
    rollout, rows = run.rollout, []
    if with_greedy:
        rows.append(("greedy responses", f"{rollout.prompts_per_step} a step, one a prompt, judged and not learned from"))
    if rollout.refill is not None:
        rounds = rollout.refill.rounds
        rows.append(("refill", f"groups without signal give way to at most {rounds} x {rollout.prompts_per_step} further prompts a step"))
    if rollout.partial is not None:
        chunk, limit = rollout.partial.chunk_tokens, rollout.max_response_tokens
        steps = f"a response waits at most {-(-limit // min(chunk, limit)) - 1} steps for its end"
        rows.append(("partial responses", f"{num_under_way(rollout)} groups under way, in chunks of {chunk} tokens; {steps}"))
    if rollout.length_schedule is not None:
        schedule = rollout.length_schedule
        rows.append(("length limit", f"{schedule.start} tokens, growing to {rollout.max_response_tokens} after {schedule.steps} steps"))
    return rows
