"""One prompt's responses on their way: asked for, perhaps in chunks and over several steps, until all are finished. Pure."""

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, replace

from megarl.config import RolloutConfig
from megarl.records import Completion, Prompt, RolloutRequest
from megarl.rollout.engine import make_requests, request_seed, response_limit, sampling_of

UNFINISHED = "chunk"  # finish reason of a response of which more is to be sampled


@dataclass(frozen=True)
class Asking:
    """What all requests of a step have in common. `first_position` is where the step's first prompt stands in the stream of prompts."""

    rollout: RolloutConfig
    stop_token_ids: tuple[int, ...]
    run_seed: int
    step: int
    first_position: int
    with_greedy: bool = False

    @property
    def limit(self) -> int:
        """The most tokens of a response."""
        return response_limit(self.rollout, self.step)

    @property
    def chunk(self) -> int:
        """The most tokens of a request."""
        return self.limit if self.rollout.partial is None else min(self.limit, self.rollout.partial.chunk_tokens)


@dataclass(frozen=True)
class ResponseGroup:
    """A prompt, where it stands in the run's stream of prompts, and its responses so far: none before the first request is answered.

    An unfinished response has the finish reason `UNFINISHED`.
    """

    position: int
    prompt: Prompt
    responses: tuple[Completion, ...] = ()

    @property
    def is_complete(self) -> bool:
        """True when no response is unfinished."""
        return bool(self.responses) and all(response.finish_reason != UNFINISHED for response in self.responses)

    def requests(self, asking: Asking) -> list[RolloutRequest]:
        """What to ask for next: all responses at first, then more of the unfinished ones."""
        if not self.responses:
            place = self.position - asking.first_position
            seed = (asking.run_seed, asking.step)
            first = make_requests([self.prompt], asking.rollout, asking.stop_token_ids, seed, place, asking.with_greedy)
            return [replace(request, sampling=replace(request.sampling, max_tokens=asking.chunk)) for request in first]
        return [self._more(response, asking) for response in self.responses if response.finish_reason == UNFINISHED]

    def _more(self, response: Completion, asking: Asking) -> RolloutRequest:
        done = len(response.token_ids)
        is_greedy = response.sample_index >= asking.rollout.samples_per_prompt
        sampling = sampling_of(asking.rollout, asking.stop_token_ids, min(asking.chunk, asking.limit - done))
        return RolloutRequest(
            response.prompt_id,
            response.sample_index,
            (*self.prompt.token_ids, *response.token_ids),
            replace(sampling, temperature=0.0) if is_greedy else sampling,
            request_seed(asking.run_seed, asking.step, self.position, response.sample_index, done),
            done,
        )

    def answered(self, completions: Sequence[Completion], asking: Asking) -> "ResponseGroup":
        """The group with the completions of its `requests`."""
        new = iter(completions)
        if not self.responses:
            return replace(self, responses=tuple(_ended(completion, asking.limit) for completion in new))
        responses = [
            _ended(_joined(response, next(new)), asking.limit) if response.finish_reason == UNFINISHED else response
            for response in self.responses
        ]
        return replace(self, responses=tuple(responses))

    def to_json(self) -> list:
        """What `from_json` reads."""
        return [self.position, asdict(self.prompt), [list(astuple(response)) for response in self.responses]]

    @classmethod
    def from_json(cls, value: list) -> "ResponseGroup":
        position, prompt, responses = value
        prompt = Prompt(**prompt | {name: tuple(prompt[name]) for name in ("token_ids", "messages")})
        return cls(position, prompt, tuple(Completion.from_list(response) for response in responses))


def _joined(first: Completion, more: Completion) -> Completion:
    """One response from its beginning and what was sampled behind it; who chose which token stays known."""
    start = len(first.token_ids)
    spans = [(0, first.policy_version), *first.later_versions]
    for offset, version in ((0, more.policy_version), *more.later_versions):
        if version != spans[-1][1]:
            spans.append((start + offset, version))
    return replace(
        first,
        token_ids=first.token_ids + more.token_ids,
        rollout_logprobs=first.rollout_logprobs + more.rollout_logprobs,
        finish_reason=more.finish_reason,
        later_versions=tuple(spans[1:]),
    )


def _ended(response: Completion, limit: int) -> Completion:
    """The response, marked as unfinished where only a chunk's length ended it."""
    is_cut = response.finish_reason == "length" and len(response.token_ids) < limit
    return replace(response, finish_reason=UNFINISHED) if is_cut else response
