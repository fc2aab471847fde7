"""What the loop asks of a sampler: token ids in, token ids and log-probabilities out.

A request carries its own seed, so the response to it does not depend on which generator samples it, nor on its batch mates.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Protocol

from megarl.config import RolloutConfig
from megarl.errors import RolloutError
from megarl.records import Completion, Prompt, RolloutRequest, Sampling

OnFinished = Callable[[RolloutRequest, Completion], None]
"""Hears of a response that is complete while others are still being sampled; must return at once and raise nothing."""


class Engine(Protocol):
    """A sampler living on the training ranks."""

    policy_version: int | None  # version of the weights it samples from; None before the first sync

    def generate(self, requests: Sequence[RolloutRequest], on_finished: OnFinished | None = None) -> list[Completion]:
        """Completions of this data rank's requests, in their order. Every rank of the rollout group calls it.

        Each rank's `on_finished` hears of some of the group's completions, together of each at most once, as soon as they are there.
        """
        ...

    def wake(self, part: str) -> None:
        """Make `weights` or `kv_cache` resident again after `sleep`. Every rank calls it; nothing to do where memory is not shared."""
        ...

    def sleep(self) -> None:
        """Give the accelerator's memory back; weights are forgotten. Every rank calls it."""
        ...


def request_seed(run_seed: int, step: int, position: int, sample_index: int, num_sampled: int = 0) -> int:
    """A seed in [0, 2**63) that is a function of these numbers alone."""
    text = f"rollout/{run_seed}/{step}/{position}/{sample_index}" + (f"/{num_sampled}" if num_sampled else "")
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def response_limit(rollout: RolloutConfig, step: int) -> int:
    """The most tokens a response may have in a step: `max_response_tokens`, or less where `length_schedule` says so."""
    schedule, most = rollout.length_schedule, rollout.max_response_tokens
    if schedule is None or step >= schedule.steps:
        return most
    return min(most, schedule.start + (most - schedule.start) * step // schedule.steps)


def sampling_of(rollout: RolloutConfig, stop_token_ids: Sequence[int], max_tokens: int) -> Sampling:
    """How a run draws at most `max_tokens` tokens."""
    ends = {"stop_token_ids": tuple(stop_token_ids), "stop_strings": rollout.stop_strings}
    return Sampling(max_tokens, rollout.temperature, **ends, min_tokens=rollout.min_response_tokens)


def make_requests(
    prompts: Sequence[Prompt],
    rollout: RolloutConfig,
    stop_token_ids: Sequence[int],
    seed: tuple[int, int],
    first_position: int = 0,
    with_greedy: bool = False,
) -> list[RolloutRequest]:
    """`samples_per_prompt` requests for each prompt, samples of one prompt side by side. `seed` is (run seed, step).

    `first_position` is where `prompts[0]` stands among the prompts of all data ranks. Seeds follow the position, not the prompt: where
    one epoch ends and the next begins, a prompt may stand twice in a step. `with_greedy`: behind the samples of each prompt, with the next
    index, the request for its likeliest response.
    """
    sampled = sampling_of(rollout, stop_token_ids, response_limit(rollout, seed[1]))
    kinds = [sampled] * rollout.samples_per_prompt + [replace(sampled, temperature=0.0)] * with_greedy
    return [
        RolloutRequest(prompt.prompt_id, index, prompt.token_ids, sampling, request_seed(*seed, position, index))
        for position, prompt in enumerate(prompts, first_position)
        for index, sampling in enumerate(kinds)
    ]


def make_greedy_requests(prompts: Sequence[Prompt], rollout: RolloutConfig, stop_token_ids: Sequence[int]) -> list[RolloutRequest]:
    """One request for each prompt that takes the likeliest token at every position, as evaluation does."""
    sampling = replace(sampling_of(rollout, stop_token_ids, rollout.max_response_tokens), temperature=0.0)
    return [RolloutRequest(prompt.prompt_id, 0, prompt.token_ids, sampling, 0) for prompt in prompts]


def check_requests(requests: Sequence[RolloutRequest], max_len: int) -> None:
    """Raises `RolloutError` for a request no sampler with `max_len` positions could serve."""
    for request in requests:
        if not request.token_ids:
            raise RolloutError(f"prompt {request.prompt_id} has no tokens; expected at least one")
        if request.sampling.max_tokens < 1:
            raise RolloutError(f"prompt {request.prompt_id} asks for {request.sampling.max_tokens} tokens; expected at least one")
        length = len(request.token_ids) + request.sampling.max_tokens
        if length > max_len:
            raise RolloutError(
                f"prompt {request.prompt_id} has {len(request.token_ids)} tokens and may get {request.sampling.max_tokens} more, in all"
                f" {length}; the sampler holds {max_len}: lower data.max_prompt_tokens or rollout.max_response_tokens"
            )


def check_completions(requests: Sequence[RolloutRequest], completions: Sequence[Completion], vocab_size: int) -> None:
    """Raises `RolloutError` naming the prompt when `completions` are not answers to `requests`, one each, in order."""
    if len(completions) != len(requests):
        raise RolloutError(f"the sampler returned {len(completions)} completions for {len(requests)} requests")
    for request, completion in zip(requests, completions):
        fault = _fault(request, completion, vocab_size)
        if fault:
            raise RolloutError(f"completion of prompt {request.prompt_id}, sample {request.sample_index}: {fault}")


def _fault(request: RolloutRequest, completion: Completion, vocab_size: int) -> str:
    tokens, logprobs, limit = completion.token_ids, completion.rollout_logprobs, request.sampling.max_tokens
    if (completion.prompt_id, completion.sample_index) != (request.prompt_id, request.sample_index):
        return f"found the answer to prompt {completion.prompt_id}, sample {completion.sample_index} in its place"
    if not 1 <= len(tokens) <= limit:
        return f"{len(tokens)} tokens; expected 1 to {limit}"
    if len(logprobs) != len(tokens):
        return f"{len(logprobs)} log-probabilities for {len(tokens)} tokens"
    outside = next((token for token in tokens if not 0 <= token < vocab_size), None)
    if outside is not None:
        return f"token {outside} is outside the vocabulary of {vocab_size}"
    wrong = next((value for value in logprobs if not math.isfinite(value) or value > 1e-3), None)
    if wrong is not None:
        return f"log-probability {wrong}; expected a finite number that is not positive"
    stops, is_stop = completion.token_ids[-1] in request.sampling.stop_token_ids, completion.finish_reason == "stop"
    by_text = is_stop and bool(request.sampling.stop_strings)  # which `text_stops` looks at
    if completion.finish_reason not in ("stop", "length") or (stops != is_stop and not by_text):
        return f"finish reason {completion.finish_reason!r} after last token {tokens[-1]} (stop tokens {request.sampling.stop_token_ids})"
    if is_stop and len(tokens) <= request.num_unending and not by_text:
        return f"ended after {len(tokens)} tokens; expected more than {request.num_unending}"
    if completion.finish_reason == "length" and len(tokens) != limit:
        return f"cut at {len(tokens)} tokens; the limit is {limit}"
    return ""
