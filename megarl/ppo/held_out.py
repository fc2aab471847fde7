"""A held-out set on one data rank: what is asked about it, and what the scores of the answers amount to. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

from megarl.config import EvalSet
from megarl.metrics import Metric, Metrics
from megarl.ppo.eval_sets import metric_names, prefix_of, sampled_names
from megarl.records import Completion, Prompt, RolloutRequest
from megarl.rewards.pass_at_k import pass_at_k
from megarl.rewards.scorer import Term

PASSING_SCORE = 1.0


@dataclass(frozen=True)
class HeldOut:
    """One set as one data rank sees it. `requests` come prompt by prompt: the greedy one, then `config.samples` sampled ones."""

    config: EvalSet
    prompts: Sequence[Prompt]
    requests: Sequence[RolloutRequest]
    terms: tuple[Term, ...]

    @property
    def prefix(self) -> str:
        """What the names of its metrics start with."""
        return prefix_of(self.config)

    @property
    def rows(self) -> list[Prompt]:
        """The prompt of each request."""
        return [prompt for prompt in self.prompts for _ in range(1 + self.config.samples)]


def eval_requests(held_out: EvalSet, greedy: Sequence[RolloutRequest]) -> list[RolloutRequest]:
    """Each greedy request, followed by the sampled ones to the same prompt. Seeds are a function of set, prompt and sample alone."""
    asked = []
    for request in greedy:
        asked.append(request)
        for index in range(1, held_out.samples + 1):
            sampling = replace(request.sampling, temperature=held_out.temperature)
            seed = eval_seed(held_out.name, request.prompt_id, index)
            asked.append(replace(request, sample_index=index, sampling=sampling, seed=seed))
    return asked


def eval_seed(set_name: str, prompt_id: int, sample_index: int) -> int:
    """A seed in [0, 2**63) that neither step nor run changes: evaluations compare the same draws."""
    text = f"eval/{set_name}/{prompt_id}/{sample_index}"
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def facts_of(completions: Sequence[Completion], columns: Sequence[Sequence[float]]) -> list[list[float]]:
    """What `summary` needs of each response: its length, 1 when the length limit cut it, and its score by every metric."""
    return [
        [float(len(completion.token_ids)), float(completion.finish_reason == "length"), *scores]
        for completion, *scores in zip(completions, *columns, strict=True)
    ]


def summary(held_out: EvalSet, facts: Sequence[Sequence[float]]) -> Metrics:
    """The metrics of a set, from the facts of all its responses in the order of prompts: bitwise the same however they were spread.

    `<metric>`, `response_length` and `truncated_share` are means over greedy responses; `<metric>/mean@n` is the mean over the n sampled
    responses of all prompts, `<metric>/pass@k` the mean over prompts of the unbiased estimate; a response passes with a score of 1 or more.
    """
    width = 1 + held_out.samples
    greedy = facts[::width]
    found = {"response_length": [row[0] for row in greedy], "truncated_share": [row[1] for row in greedy]}
    for column, (name, part) in enumerate(zip(metric_names(held_out), held_out.metrics, strict=True), 2):
        found[name] = [row[column] for row in greedy]
        drawn = [[row[column] for row in facts[start + 1 : start + width]] for start in range(0, len(facts), width)]
        for sampled in sampled_names(name, part.kind, held_out.samples):
            kind, _, k = sampled.removeprefix(f"{name}/").partition("@")
            if kind == "mean":
                found[sampled] = [math.fsum(scores) / len(scores) for scores in drawn]
            else:
                found[sampled] = [pass_at_k(len(scores), sum(s >= PASSING_SCORE for s in scores), int(k)) for scores in drawn]
    prefix = prefix_of(held_out)
    return Metrics({prefix + name: Metric(math.fsum(values), float(len(values))) for name, values in found.items()})
