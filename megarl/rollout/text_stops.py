"""Responses that end with a text: found in what the tokenizer makes of the tokens, wherever the tokens were sampled."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace

from megarl.data.tokenizers import Tokenizer
from megarl.errors import RolloutError
from megarl.records import Completion, RolloutRequest
from megarl.rollout.engine import Engine, OnFinished


class TextStops:
    """A sampler whose responses end where `Sampling.stop_strings` say, whether or not the sampler within could tell.

    The token that completes a string is the last one of the response, and learned like all others; its finish reason is "stop".
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer):
        self.engine, self._tokenizer = engine, tokenizer

    @property
    def policy_version(self) -> int | None:
        return self.engine.policy_version

    def generate(self, requests: Sequence[RolloutRequest], on_finished: OnFinished | None = None) -> list[Completion]:
        """As `Engine.generate`. Raises `RolloutError` for a response that ended with neither a stop token nor a string."""

        def tell(request: RolloutRequest, completion: Completion) -> None:
            with contextlib.suppress(RolloutError):  # raised below, where it may be
                on_finished(request, _cut(request, completion, self._tokenizer))

        completions = self.engine.generate(requests, None if on_finished is None else tell)
        return [_cut(request, completion, self._tokenizer) for request, completion in zip(requests, completions, strict=True)]

    def wake(self, part: str) -> None:
        self.engine.wake(part)

    def sleep(self) -> None:
        self.engine.sleep()


def _cut(request: RolloutRequest, completion: Completion, tokenizer: Tokenizer) -> Completion:
    strings = request.sampling.stop_strings
    before = request.token_ids[len(request.token_ids) - request.num_sampled :]
    length = first_end((*before, *completion.token_ids), len(before), strings, tokenizer, request.sampling.min_tokens) - len(before)
    if length <= len(completion.token_ids):
        return _first(completion, length)
    if completion.finish_reason == "stop" and completion.token_ids[-1] not in request.sampling.stop_token_ids:
        who = f"completion of prompt {request.prompt_id}, sample {request.sample_index}"
        raise RolloutError(f"{who}: the sampler stopped it, but it ends with no stop token and holds none of rollout.stop_strings")
    return completion


def first_end(token_ids: Sequence[int], start: int, strings: Sequence[str], tokenizer: Tokenizer, min_tokens: int = 0) -> int:
    """How many of the tokens it takes until their text holds one of `strings`, more than `start`; len + 1 where all do not.

    Text is what `tokenizer.decode` says: special tokens stand for none. A string that the first `min_tokens` tokens hold does not count.
    """
    num_ignored = len(tokenizer.decode(token_ids[:min_tokens])) if strings and min_tokens else 0

    def ends(count: int) -> bool:
        text = tokenizer.decode(token_ids[:count])
        return any(text.find(string, max(0, num_ignored - len(string) + 1)) >= 0 for string in strings)

    low, high = max(start, min_tokens) + 1, len(token_ids)
    if not strings or low > high or not ends(high):
        return len(token_ids) + 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if ends(middle) else (middle + 1, high)
    return high


def _first(completion: Completion, length: int) -> Completion:
    """The first `length` tokens as a whole response."""
    return replace(
        completion,
        token_ids=completion.token_ids[:length],
        rollout_logprobs=completion.rollout_logprobs[:length],
        finish_reason="stop",
        later_versions=tuple((start, version) for start, version in completion.later_versions if start < length),
    )
