"""Prompts, how responses are sampled, and what leaves the accelerator meanwhile."""

import functools
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field

from megarl.config.data import Dataset
from megarl.config.section import Fraction, NotNegative, Positive, Section


def _whole_distribution(value: float, neutral: tuple[float, ...]) -> float:
    """Truncated sampling draws from another distribution than the one whose log-probabilities are trained."""
    if value not in neutral:
        raise ValueError(
            f"{' or '.join(map(str, neutral))}: the sampler's log-probabilities would speak of another distribution than the trainer's,"
            " which does not replay vLLM's sampling mask; sharpen with rollout.temperature"
        )
    return value


class PromptData(Dataset):
    """Prompts: rows with `prompt` (text or messages) or `messages`, and `answer` where a verifier needs one."""

    max_prompt_tokens: Positive = 512
    overlong: Literal["refuse", "skip", "truncate_left"] = "refuse"  # what happens to a longer prompt
    min_pass_rate: Fraction = 0.0  # prompts with a lower `pass_rate` (of `megarl sample`) are left out
    max_pass_rate: Fraction = 1.0  # so are those with a higher one

    def for_file(self, path: Path) -> Self:
        return super().for_file(path).model_copy(update={"min_pass_rate": 0.0, "max_pass_rate": 1.0})


class LengthSchedule(Section):
    """A length limit that grows in a line from `start` in the first step to `rollout.max_response_tokens` after `steps` steps."""

    start: Positive  # tokens
    steps: Positive


class RefillConfig(Section):
    """Groups without signal, whose responses all earned the same, give way to further prompts (DAPO's dynamic sampling)."""

    rounds: Positive = 4  # further rounds of sampling a step, at most
    when_short: Literal["go_on", "stop"] = "go_on"  # no full batch even then: fill it with groups without signal, or end the run
    by: str = "reward"  # what must differ within a group: the reward, or one of its parts by name (docs/rewards.md)
    low: float | None = None  # a group whose mean is below this gives way, too
    high: float | None = None  # and one whose mean is above this


class PartialConfig(Section):
    """Responses sampled in chunks; what is unfinished when enough groups are complete waits for the next step (docs/sampling.md)."""

    chunk_tokens: Positive  # tokens between two looks at how many groups are complete
    oversample: Annotated[float, Field(ge=1)] = 1.5  # groups under way at the start of a step, times rollout.prompts_per_step


class RolloutConfig(Section):
    """How responses are sampled by vLLM (docs/sampling.md)."""

    placement: Literal["colocated", "separate", "remote"] = "colocated"  # in the trainer's processes, beside them on its nodes, elsewhere
    replicas: NotNegative = 0  # generators: separate: on each node (0: one); remote: in all, brought by megarl.rollout.worker --join
    listen: Annotated[str, Field(min_length=1)] = "127.0.0.1"  # remote: address of the first node that generators connect to
    tensor_parallel: Positive = 1  # tensor-parallel ranks a generator replica
    prompts_per_step: Positive = 64
    samples_per_prompt: Positive = 1
    max_response_tokens: Positive = 128
    min_response_tokens: NotNegative = 0  # none of a response's first so many tokens ends it; the learner knows (docs/sampling.md)
    length_schedule: LengthSchedule | None = None  # a lower limit in early steps; evaluation keeps max_response_tokens
    stop_strings: tuple[Annotated[str, Field(min_length=1)], ...] = ()  # text that ends a response, and belongs to it
    stop_token_ids: tuple[NotNegative, ...] = ()  # tokens that end a response, beside the tokenizer's and the model's end-of-text
    refill: RefillConfig | None = None
    partial: PartialConfig | None = None
    temperature: Annotated[float, Field(ge=0.01, le=2)] = 1.0  # vLLM samples hotter than a lower one and refuses a higher one
    kv_cache_bytes: NotNegative = 0  # a rank, for vLLM's KV cache; 0: a part of the GPU (gpu_memory_fraction) or 256 MiB on a CPU
    gpu_memory_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    eager: bool = False  # True: no CUDA graphs
    top_p: Annotated[float, AfterValidator(functools.partial(_whole_distribution, neutral=(1.0,)))] = 1.0
    top_k: Annotated[int, AfterValidator(functools.partial(_whole_distribution, neutral=(0, -1)))] = 0
    parity_tolerance: Annotated[float, Field(gt=0)] | None = None  # largest mean |rollout - trainer log-prob|; null: by precision
    digest_every_syncs: NotNegative = 50  # every so many weight syncs each slice is compared at both ends, as in the first two; 0: never


class MemoryConfig(Section):
    """What leaves the accelerator between the phases of a step (docs/bridge.md, "Memory phases")."""

    # frozen: reference and reward models wait in host memory. all: so do weights, optimizer and gradients while a phase does without them.
    offload: Literal["auto", "none", "frozen", "all"] = "auto"  # auto: all on a GPU host (frozen: generators elsewhere), none on a CPU
