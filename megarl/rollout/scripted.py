"""A sampler without a model, for tests of other rooms."""

from collections.abc import Callable, Sequence

from megarl.records import Completion, RolloutRequest
from megarl.rollout.engine import OnFinished


class ScriptedEngine:
    """A sampler for tests of other rooms: `script(request)` names the response tokens and their log-probabilities."""

    def __init__(self, script: Callable[[RolloutRequest], tuple[Sequence[int], Sequence[float]]]):
        self.script = script
        self.policy_version: int | None = 0

    def generate(self, requests: Sequence[RolloutRequest], on_finished: OnFinished | None = None) -> list[Completion]:
        completions = []
        for request in requests:
            completions.append(self._answer(request))
            if on_finished is not None:
                on_finished(request, completions[-1])
        return completions

    def _answer(self, request: RolloutRequest) -> Completion:
        tokens, logprobs = self.script(request)
        reason = "stop" if tokens[-1] in request.sampling.stop_token_ids else "length"
        return Completion(request.prompt_id, request.sample_index, tuple(tokens), tuple(logprobs), reason, self.policy_version)

    def wake(self, part: str) -> None:
        pass

    def sleep(self) -> None:
        pass
