"""Prompts, how responses are sampled, and what leaves the accelerator meanwhile."""

from functools import partial
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from megarl.config.section import NotNegative, Positive, Section, UserPath


def _whole_distribution(value: float, neutral: tuple[float, ...]) -> float:
    """Truncated sampling draws from another distribution than the one whose log-probabilities are trained."""
    if value not in neutral:
        raise ValueError(
            f"{' or '.join(map(str, neutral))}: the sampler's log-probabilities would speak of another distribution than the trainer's,"
            " which does not replay vLLM's sampling mask; sharpen with rollout.temperature"
        )
    return value


class PromptData(Section):
    """A JSONL file of prompts, one object a line, with `prompt` (text) or `messages`, and `answer` where a verifier needs one."""

    path: UserPath
    max_prompt_tokens: Positive = 512
    overlong: Literal["refuse", "skip", "truncate_left"] = "refuse"  # what happens to a longer prompt
    prompt_key: str = "prompt"
    answer_key: str = "answer"
    chat_template: bool = False  # render `messages` (or the prompt as a user turn) through the tokenizer's template


class RolloutConfig(Section):
    """How responses are sampled by vLLM."""

    placement: Literal["colocated", "separate", "remote"] = "colocated"  # in the trainer's processes, beside them on its nodes, elsewhere
    replicas: NotNegative = 0  # generators: separate: on each node (0: one); remote: in all, brought by megarl.rollout.worker --join
    listen: Annotated[str, Field(min_length=1)] = "127.0.0.1"  # remote: address of the first node that generators connect to
    tensor_parallel: Positive = 1  # tensor-parallel ranks a generator replica
    prompts_per_step: Positive = 64
    samples_per_prompt: Positive = 1
    max_response_tokens: Positive = 128
    temperature: Annotated[float, Field(ge=0.01, le=2)] = 1.0  # vLLM samples hotter than a lower one and refuses a higher one
    kv_cache_bytes: NotNegative = 0  # a rank, for vLLM's KV cache; 0: a part of the GPU (gpu_memory_fraction) or 256 MiB on a CPU
    gpu_memory_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    eager: bool = False  # True: no CUDA graphs
    top_p: Annotated[float, AfterValidator(partial(_whole_distribution, neutral=(1.0,)))] = 1.0
    top_k: Annotated[int, AfterValidator(partial(_whole_distribution, neutral=(0, -1)))] = 0
    parity_tolerance: Annotated[float, Field(gt=0)] | None = None  # largest mean |rollout - trainer log-prob|; null: by precision
    digest_every_syncs: NotNegative = 50  # every so many weight syncs each slice is compared at both ends, as in the first two; 0: never


class MemoryConfig(Section):
    """What leaves the accelerator between the phases of a step (docs/bridge.md, "Memory phases")."""

    # frozen: reference and reward models wait in host memory. all: so do weights, optimizer and gradients while a phase does without them.
    offload: Literal["auto", "none", "frozen", "all"] = "auto"  # auto: all on a GPU host (frozen: generators elsewhere), none on a CPU
