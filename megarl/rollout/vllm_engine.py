"""vLLM inside the training ranks: one engine a rank, tensor-parallel groups of them form generator replicas.

Prompts are dealt and completions gathered inside a rollout group (`parallel.layout.RolloutLayout`), never across the world.
"""

import contextlib
import json
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megarl.bridge.plan import TargetBox
from megarl.config import RolloutConfig
from megarl.errors import ConfigError, RolloutError
from megarl.models.family import FAMILIES, ModelSpec
from megarl.parallel import device, groups
from megarl.parallel.collectives import Group, broadcast_json, gather_json
from megarl.parallel.layout import RolloutLayout
from megarl.records import Completion, RolloutRequest
from megarl.rollout import vllm_platform
from megarl.rollout.check import num_under_way
from megarl.rollout.dealing import Dealer
from megarl.rollout.engine import OnFinished, check_completions, check_requests

vllm_platform.import_vllm()

from vllm import LLM, RequestOutput, SamplingParams  # noqa: E402  (the process is prepared first)
from vllm.sampling_params import RequestOutputKind  # noqa: E402

from megarl.rollout.vllm_endpoint import Endpoint  # noqa: E402
from megarl.rollout.vllm_loader import LOAD_FORMAT  # noqa: E402

CPU_KV_CACHE_BYTES = 256 << 20
MIN_TEMPERATURE = 0.01  # vLLM raises smaller ones to this without a word; 0 means greedy


class VllmEngine:
    """A sampler that shares its processes with the trainer. Every rank of the world creates it, after `groups.initialize`.

    Args: `layout` says how replicas lie on the ranks, `max_len` is the longest prompt plus response, `precision` is "bf16" or "fp32".
    It starts without weights; `bridge.sync.WeightSync` brings them. Raises `ConfigError` for a length or a head width it cannot run,
    `WeightMapError` when vLLM's model and the family's table disagree.
    """

    def __init__(self, spec: ModelSpec, rollout: RolloutConfig, layout: RolloutLayout, precision: str, max_len: int):
        if max_len > spec.max_positions:
            raise ConfigError(
                f"prompt and response may have {max_len} tokens, the model holds {spec.max_positions}:"
                " lower data.max_prompt_tokens or rollout.max_response_tokens"
            )
        vllm_platform.check_head_dim(spec.head_dim)
        self.spec, self.layout, self.max_len = spec, layout, max_len
        self.policy_version: int | None = None
        self.has_sleep = device.is_cuda()
        self._asleep: set[str] = set()
        self._dealer = Dealer(layout, groups.new_group_of(layout.groups()))
        self._llm = self._start(rollout, precision)
        executor = self._llm.llm_engine.model_executor
        # vLLM's own shutdown would also destroy the default process group, which is the trainer's.
        self._llm.llm_engine.engine_core._finalizer.detach()
        weakref.finalize(self, executor.shutdown)
        worker = executor.driver_worker.worker
        self._endpoint = Endpoint(worker.model_runner.get_model())  # the model itself, not the CUDA graphs around it

    def _start(self, rollout: RolloutConfig, precision: str) -> LLM:
        rank, world_size, local_rank = groups.rank_from_environment()
        world = groups.group(self.layout.training, "world")
        job_key = broadcast_json(vllm_platform.new_job_key(), 0, world)
        with (
            tempfile.TemporaryDirectory(prefix="megarl-model-") as folder,
            device.preserved_random_state(),
            vllm_platform.launcher_environment(rank, world_size, local_rank),
            vllm_platform.private_shared_memory(job_key),
        ):
            self._write_config(Path(folder))
            llm = LLM(model=folder, **self._arguments(rollout, precision))
            gather_json(rank, world)  # shared memory loses its names now: everyone must have opened it
        return llm

    def _write_config(self, folder: Path) -> None:
        architecture = FAMILIES[self.spec.family].architectures[0]  # with a vocabulary head, whatever the directory was
        stated = {"architectures": [architecture], "tie_word_embeddings": self.spec.tied, "vocab_size": self.spec.vocab_size}
        stated["eos_token_id"] = None  # vLLM would bar it from the first `min_tokens`, whether it ends a response here or not
        (folder / "config.json").write_text(json.dumps(self.spec.hf_config | stated))

    def _arguments(self, rollout: RolloutConfig, precision: str) -> dict:
        requests = num_under_way(rollout) * rollout.samples_per_prompt
        max_num_seqs = min(1024 if device.is_cuda() else 256, max(16, -(-requests // self.layout.num_replicas)))
        arguments = {
            "load_format": LOAD_FORMAT,
            "model_loader_extra_config": {"hf_shapes": {name: list(shape) for name, shape in self.spec.table("actor").hf_shapes.items()}},
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "logprobs_mode": "processed_logprobs",  # of the tempered distribution, as the trainer computes them
            "dtype": {"bf16": "bfloat16", "fp32": "float32"}[precision],
            "tensor_parallel_size": self.layout.tensor,
            "distributed_executor_backend": "external_launcher",
            "max_model_len": self.max_len,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max(8192 if device.is_cuda() else 4096, self.max_len, max_num_seqs),
            # A prompt cut in two takes its seed's first draw back, which vLLM cannot do with a generator on a CPU.
            "enable_chunked_prefill": device.is_cuda(),
            "enforce_eager": rollout.eager or not device.is_cuda(),
            "enable_sleep_mode": self.has_sleep,
            "seed": 0,  # every request brings its own
        }
        if self.spec.mixture is not None and device.is_cuda():
            arguments["moe_backend"] = "triton"  # its experts stay as they were loaded, so that they can be written in place
        if rollout.kv_cache_bytes or not device.is_cuda():
            arguments["kv_cache_memory_bytes"] = rollout.kv_cache_bytes or CPU_KV_CACHE_BYTES
        if device.is_cuda():  # also with a KV cache of a given size: vLLM refuses to start when so much of the GPU is not free
            arguments["gpu_memory_utilization"] = rollout.gpu_memory_fraction
        return arguments

    # --- sampling ---

    @property
    def group(self) -> Group:
        """The ranks whose responses a rank may sample."""
        return self._dealer.group

    def generate(self, requests: Sequence[RolloutRequest], on_finished: OnFinished | None = None) -> list[Completion]:
        """Completions of this data rank's requests, in their order. Every rank of the rollout group calls it with its own.

        Ranks of one data-parallel replica pass equal requests. `on_finished` hears, on the first rank of a replica, of what the replica
        sampled. Raises `RolloutError` before the first sync, for a request that does
        not fit, and for an answer that is not a completion.
        """
        if self.policy_version is None:
            raise RolloutError("the sampler has no weights yet; push the actor's weights before generating")
        if self._asleep:
            raise RolloutError(f"the sampler sleeps ({', '.join(sorted(self._asleep))}); wake it before generating")
        everyone, own = self._dealer.gather(requests)
        check_requests(everyone, self.max_len)
        (hand,) = self._dealer.hands(everyone)
        sampled: list[Completion] = []
        fault = None
        try:
            with device.preserved_random_state():
                sampled = self._sample(hand, on_finished if self.layout.is_leader else None) if hand else []
            check_completions(hand, sampled, self.spec.vocab_size)
        except RolloutError as error:
            fault = error
        self._dealer.agree(fault)
        return self._dealer.collect([sampled], everyone)[own]

    def _sample(self, requests: Sequence[RolloutRequest], on_finished: OnFinished | None) -> list[Completion]:
        engine, outputs = self._llm.llm_engine, {}
        parameters = [_sampling_parameters(request) for request in requests]
        for index, (request, sampling) in enumerate(zip(requests, parameters, strict=True)):
            engine.add_request(str(index), {"prompt_token_ids": list(request.token_ids)}, sampling)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    index = int(output.request_id.partition("-")[0])
                    outputs[index] = output
                    if on_finished is not None:
                        with contextlib.suppress(RolloutError):  # raised below, when no request is left behind
                            on_finished(requests[index], self._completion(requests[index], output))
        if len(outputs) != len(requests):
            raise RolloutError(f"vLLM returned {len(outputs)} outputs for {len(requests)} requests")
        return [self._completion(request, outputs[index]) for index, request in enumerate(requests)]

    def _completion(self, request: RolloutRequest, output: RequestOutput) -> Completion:
        answer, logprobs = output.outputs[0], output.outputs[0].logprobs
        if list(logprobs.token_ids) != list(answer.token_ids):
            raise RolloutError(f"vLLM's log-probabilities for prompt {request.prompt_id} speak of other tokens than it returned")
        return Completion(
            prompt_id=request.prompt_id,
            sample_index=request.sample_index,
            token_ids=tuple(answer.token_ids),
            rollout_logprobs=tuple(logprobs.logprobs),
            finish_reason=str(answer.finish_reason),
            policy_version=self.policy_version,
        )

    # --- weights: the receiving side of bridge.sync.WeightSync ---

    @property
    def targets(self) -> Sequence[TargetBox]:
        """The boxes of Hugging Face tensors this rank's parameters are made of."""
        return self._endpoint.targets

    @property
    def dtype(self) -> torch.dtype:
        """The type of every parameter."""
        return self._endpoint.dtype

    def begin_update(self) -> None:
        """From here to `end_update` the weights are a mixture; generating is refused."""
        self.wake("weights")
        self.policy_version = None
        self._endpoint.begin()

    def target(self, parameter: str) -> Tensor:
        """The tensor to fill with `parameter`."""
        return self._endpoint.target(parameter)

    def is_live(self, parameter: str) -> bool:
        """True when `target` is the parameter itself: it may be written at any time, and needs no memory of its own."""
        return self._endpoint.is_live(parameter)

    def finish_parameters(self, parameters: Sequence[str]) -> None:
        """Every element of these parameters has been written."""
        self._endpoint.commit(parameters)

    def end_update(self, version: int) -> None:
        """All parameters are written: forget what was computed with the old ones, and stamp completions with `version`."""
        self._endpoint.finish()
        # Keys and values of the old weights would pass for those of the new ones.
        if not self._llm.reset_prefix_cache():
            raise RolloutError("vLLM did not drop its prefix cache after a weight update: requests are still running")
        self.policy_version = version

    # --- memory ---

    def sleep(self) -> None:
        """Hand the GPU memory of weights and KV cache to the trainer; the next sync brings the weights back. Nothing to do on a CPU."""
        if self.has_sleep and not self._asleep:
            self._llm.sleep(level=2)
            self._asleep = {"weights", "kv_cache"}
            self.policy_version = None

    def wake(self, part: str) -> None:
        """Make `weights` (with undefined contents) or `kv_cache` resident again."""
        if part in self._asleep:
            self._llm.wake_up(tags=[part])
            self._asleep.remove(part)


def _sampling_parameters(request: RolloutRequest) -> SamplingParams:
    sampling = request.sampling
    if 0 < sampling.temperature < MIN_TEMPERATURE:
        raise RolloutError(f"temperature is {sampling.temperature}; expected 0 (greedy) or at least {MIN_TEMPERATURE}")
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        min_tokens=request.num_unending,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=True,  # the run decides which tokens stop a response, not the model's config.json
        seed=request.seed,
        logprobs=0,  # of the sampled token alone
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
