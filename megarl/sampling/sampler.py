"""Sample responses to prompts, score them, write them down. `megarl sample CONFIG`

Seeds are a function of the run's seed, the prompt and the sample, so neither the layout nor an interruption shows in what is drawn.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megarl.config import SampleRun
from megarl.data.order import contiguous_share
from megarl.data.tokenizers import Tokenizer
from megarl.operations import drain, heartbeat
from megarl.parallel import collectives, groups
from megarl.parallel.layout import ParallelLayout
from megarl.parallel.memory import Phases
from megarl.ppo.scoring import SharedScoring
from megarl.records import Completion, Prompt, RolloutRequest, Trajectory
from megarl.rewards.scorer import WeightedSum
from megarl.rollout.engine import Engine, make_requests
from megarl.sampling.part_files import SampleFiles
from megarl.sampling.rows import row_of


@dataclass(frozen=True)
class SamplingParts:
    """Everything `sample` uses. `scores` None: responses are written without."""

    prompts: Sequence[Prompt]
    stop_token_ids: tuple[int, ...]
    tokenizer: Tokenizer
    engine: Engine
    memory: Phases
    scores: WeightedSum | None
    files: SampleFiles


@dataclass(frozen=True)
class Answered:
    """How far a run got: `step` prompts of `total`."""

    step: int
    total: int


def sample(run: SampleRun, layout: ParallelLayout, parts: SamplingParts) -> Answered:
    """Answer every prompt that is not answered yet, a block of `rollout.prompts_per_step` at a time, and merge the lines.

    Called by every rank; a data-parallel replica answers its share of every block. Stops after a block where it is asked to
    (`operations.drain`).
    """
    world, settings = groups.group(layout, "world"), settings_of(run)
    done = collectives.together(lambda: parts.files.start(settings) if layout.rank == 0 else set(), world)
    done = set(collectives.broadcast_json(sorted(done), 0, world))
    waiting = [prompt for prompt in parts.prompts if prompt.prompt_id not in done]
    size = run.rollout.prompts_per_step
    answered, total = len(parts.prompts) - len(waiting), len(parts.prompts)
    for start in range(0, len(waiting), size):
        block = waiting[start : start + size]
        rows = answers(block, run, layout, parts)
        collectives.together(lambda rows=rows: parts.files.append(rows) if rows and is_writer(layout) else None, world)
        answered += len(block)
        if layout.rank == 0:
            print(f"megarl: {answered} of {total} prompts answered", file=sys.stderr)
        if any(collectives.gather_json(drain.reason(layout.rank), world)):
            break
    if answered == total:
        collectives.together(lambda: parts.files.merge() if layout.rank == 0 else 0, world)
        if layout.rank == 0:
            print(f"megarl: written to {parts.files.merged}", file=sys.stderr)
    return Answered(answered, total)


def answers(block: Sequence[Prompt], run: SampleRun, layout: ParallelLayout, parts: SamplingParts) -> list[dict[str, Any]]:
    """The lines of this data-parallel replica's share of a block. Called by every rank."""
    share = block[contiguous_share(len(block), layout)]
    asked = share or block[:1]  # a rank without a share works along: ranks meet while sampling and scoring
    with parts.memory.generating(), heartbeat.phase("generate", block[0].prompt_id):
        completions = parts.engine.generate(requests_for(asked, run, parts.stop_token_ids))
    with heartbeat.phase("score", block[0].prompt_id):
        trajectories = judged(asked, completions, layout, parts)
    each = len(trajectories) // len(asked)
    return [
        row_of(prompt, trajectories[i * each : (i + 1) * each], run.sample, parts.scores is not None, parts.tokenizer)
        for i, prompt in enumerate(share)
    ]


def requests_for(prompts: Sequence[Prompt], run: SampleRun, stop_token_ids: Sequence[int]) -> list[RolloutRequest]:
    """`rollout.samples_per_prompt` requests for each prompt, side by side."""
    cut = {"top_p": run.sample.top_p, "top_k": run.sample.top_k} | ({"temperature": 0.0} if run.sample.greedy else {})
    asked = [r for p in prompts for r in make_requests([p], run.rollout, stop_token_ids, (run.seed, 0), p.prompt_id)]
    return [replace(request, sampling=replace(request.sampling, **cut)) for request in asked]


def judged(prompts: Sequence[Prompt], completions: Sequence[Completion], layout: ParallelLayout, parts: SamplingParts) -> list[Trajectory]:
    """A trajectory for each completion, with a score where there are any. Called by every rank."""
    repeated = [prompt for prompt in prompts for _ in range(len(completions) // len(prompts))]
    if parts.scores is None:
        return [Trajectory(prompt, completion, 0.0) for prompt, completion in zip(repeated, completions, strict=True)]
    with parts.memory.scoring():
        return parts.scores.judge(repeated, completions, parts.tokenizer, SharedScoring(layout))


def is_writer(layout: ParallelLayout) -> bool:
    """True on the rank that speaks for its data-parallel replica."""
    return layout.rank == layout.rank_at(dp=layout.dp_rank)


def settings_of(run: SampleRun) -> dict:
    """What decides which lines are right: a run that goes on must have the same."""
    names = ("seed", "precision", "tokenizer", "actor", "rewards", "reward_hook", "data", "sample")
    tree = run.model_dump(mode="json")
    of_responses = ("samples_per_prompt", "min_response_tokens", "max_response_tokens", "temperature", "stop_strings", "stop_token_ids")
    rollout = {name: tree["rollout"][name] for name in of_responses}
    return {name: tree[name] for name in names} | {"rollout": rollout}
