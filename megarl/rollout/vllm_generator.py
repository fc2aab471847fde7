"""vLLM in a process of its own: requests come and go while it samples, and weights may change under way.

Weights arrive only while vLLM is paused in its `keep` mode: running requests stay, and nothing is sampled. Afterwards the keys and values
of all their tokens are computed again with the new weights, so that every token's log-probability is that of one policy: of the version
its span names. With several tensor-parallel ranks, all of them make the same calls in the same order.
"""

from collections.abc import Sequence
from dataclasses import replace

from megarl.config import RolloutConfig
from megarl.errors import RolloutError
from megarl.models.family import ModelSpec
from megarl.parallel import device
from megarl.parallel.layout import RolloutLayout
from megarl.records import Completion, RolloutRequest
from megarl.rollout import vllm_platform
from megarl.rollout.engine import check_completions, check_requests

vllm_platform.import_vllm()

from vllm import RequestOutput  # noqa: E402  (the process is prepared first)
from vllm.config import WeightTransferConfig  # noqa: E402

from megarl.rollout import vllm_transfer  # noqa: E402
from megarl.rollout.vllm_engine import VllmEngine, _sampling_parameters  # noqa: E402


class GeneratorEngine(VllmEngine):
    """One tensor-parallel rank of a generator replica. Arguments as for `VllmEngine`; the replica is the world."""

    def __init__(self, spec: ModelSpec, rollout: RolloutConfig, layout: RolloutLayout, precision: str, max_len: int):
        vllm_transfer.register()
        super().__init__(spec, rollout, layout, precision, max_len)
        self.has_sleep = False  # nobody shares this process's memory
        self._batches: dict[int, _Batch] = {}
        self._is_paused = False

    def _arguments(self, rollout: RolloutConfig, precision: str) -> dict:
        arguments = super()._arguments(rollout, precision)
        return arguments | {"enable_sleep_mode": False, "weight_transfer_config": WeightTransferConfig(backend=vllm_transfer.BACKEND)}

    @property
    def _core(self):
        return self._llm.llm_engine.engine_core.engine_core

    # --- sampling, step by step ---

    def submit(self, batch: int, requests: Sequence[RolloutRequest], tells: bool = False) -> None:
        """Queue requests; their completions come from `step` together, under the number `batch`, and before that one by one from `news`
        where it `tells`.

        Raises `RolloutError` before the first sync and for a request that does not fit.
        """
        if self.policy_version is None:
            raise RolloutError("the sampler has no weights yet; push the actor's weights before generating")
        check_requests(requests, self.max_len)
        parameters = [_sampling_parameters(request) for request in requests]
        self._batches[batch] = _Batch(list(requests), tells)
        for index, (request, sampling) in enumerate(zip(requests, parameters)):
            self._llm.llm_engine.add_request(f"{batch}/{index}", {"prompt_token_ids": list(request.token_ids)}, sampling)

    @property
    def is_busy(self) -> bool:
        """True while `step` has something to do."""
        return bool(self._batches) and not self._is_paused

    def step(self) -> dict[int, list[Completion]]:
        """One token for every running request; the batches that this completes, their completions in the order of their requests."""
        empty = [number for number, batch in self._batches.items() if not batch.requests]
        for output in () if len(empty) == len(self._batches) else self._llm.llm_engine.step():
            self._keep(output)
        done = {number: batch.completions() for number, batch in self._batches.items() if batch.is_complete}
        for number, completions in done.items():
            requests = self._batches.pop(number).requests
            check_completions(requests, completions, self.spec.vocab_size)
        return done

    def news(self) -> dict[int, list[tuple[int, Completion]]]:
        """What has been completed since the last call in batches that are not complete yet: position in the batch, and completion."""
        found = {number: [(place, batch.found[place]) for place in batch.untold] for number, batch in self._batches.items() if batch.untold}
        for number in found:
            self._batches[number].untold.clear()
        return found

    def forget_batches(self) -> list[int]:
        """Abort everything; the numbers of the batches that will not be answered."""
        numbers = list(self._batches)
        self._llm.llm_engine.abort_request([f"{number}/{i}" for number in numbers for i in range(len(self._batches[number].requests))])
        self._batches.clear()
        return numbers

    def _keep(self, output: RequestOutput) -> None:
        if output.finished:
            number, _, index = output.request_id.partition("/")
            batch, place = self._batches[int(number)], int(index.partition("-")[0])
            batch.found[place] = self._with_versions(self._completion(batch.requests[place], output), output)
            if batch.tells:
                batch.untold.append(place)

    @staticmethod
    def _with_versions(completion: Completion, output: RequestOutput) -> Completion:
        """Which weights sampled which tokens, as vLLM recorded it."""
        spans = [(span.start, int(span.version)) for span in output.outputs[0].weight_versions or ()]
        if not spans:
            raise RolloutError(f"vLLM does not say which weights answered prompt {completion.prompt_id}")
        return replace(completion, policy_version=spans[0][1], later_versions=tuple(spans[1:]))

    # --- weights ---

    def connect(self, delivery: dict, timeout_s: float) -> None:
        """Join the trainer ranks: `delivery` is what this rank receives in a sync, as JSON."""
        deliveries = [delivery if rank == self.layout.training.rank else {} for rank in range(self.layout.tensor)]
        info = {"deliveries": deliveries, "timeout_s": timeout_s}
        self._llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": info})

    def begin_update(self) -> None:
        """Pause, keeping what is running; from here to `publish` no token is sampled."""
        self._core.pause_scheduler(mode="keep", clear_cache=False)
        self._is_paused = True
        self.policy_version = None
        while self._has_step_under_way():  # its tokens were sampled with the old weights
            for output in self._llm.llm_engine.step():
                self._keep(output)

    def _has_step_under_way(self) -> bool:
        return any(output.total_num_scheduled_tokens > 0 for _, output, _ in self._core.batch_queue or ())

    def receive(self, sync: int, is_verified: bool, timeout_s: float) -> list[int]:
        """Take all weights of one sync; the digests of its slices when it is verified. Completions of the old weights stay valid."""
        info = {"sync": sync, "timeout_s": timeout_s, "is_verified": is_verified}
        with device.preserved_random_state():
            self._llm.collective_rpc("start_weight_update")
            self._llm.collective_rpc("update_weights", args=(info,))
            self._llm.collective_rpc("finish_weight_update")
            self._core.reset_prefix_cache(reset_running_requests=True)
        return self._worker.weight_transfer_engine.digests

    def publish(self, version: int) -> None:
        """Every rank of every replica has all its weights: sample with them."""
        self._llm.llm_engine.set_weight_version(str(version))
        self.policy_version = version
        self._core.resume_scheduler()
        self._is_paused = False

    @property
    def _worker(self):
        return self._llm.llm_engine.model_executor.driver_worker.worker


class _Batch:
    """Requests that came together, and the completions found so far, by position."""

    def __init__(self, requests: list[RolloutRequest], tells: bool):
        self.requests, self.tells = requests, tells
        self.untold: list[int] = []
        self.found: dict[int, Completion] = {}

    @property
    def is_complete(self) -> bool:
        return len(self.found) == len(self.requests)

    def completions(self) -> list[Completion]:
        return [self.found[index] for index in range(len(self.requests))]
