"""Real training steps on this host's ranks, with the bytes they allocate and send, to compare plans with."""

import ctypes
import gc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megarl.config import PpoRun
from megarl.models.family import spec_from_hf_config
from megarl.models.random_weights import RandomSource
from megarl.models.spec import ModelSpec
from megarl.parallel import groups
from megarl.parallel.memory import Phases
from megarl.parallel.phases import FROZEN
from megarl.ppo.roles import Actor, Critic, Reference
from megarl.records import Experience

RANKS = 2
PROMPT, RESPONSE = 32, 96
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "max_position_embeddings": 256}
MIXTURE = LLAMA | {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2},
    "small": {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4},
    "medium": {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8},
    "large": {"vocab_size": 16384, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12},
}
MINIBATCH = {"tiny": 16, "small": 16, "medium": 8, "large": 4}  # sequences an optimizer step, in four microbatches: large models take long


@dataclass(frozen=True)
class Case:
    """One run: a size, a layout of two ranks, what leaves memory between phases."""

    size: str
    parallel: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    offload: str = "none"
    is_mixture: bool = False
    frozen_layers: int = 0  # of the actor and the critic

    @property
    def spec(self) -> ModelSpec:
        sizes = SIZES[self.size] | {"num_key_value_heads": SIZES[self.size]["num_attention_heads"] // 2}
        if self.is_mixture:
            sizes |= {"moe_intermediate_size": sizes["intermediate_size"] // 4, "head_dim": 64}
        return spec_from_hf_config((MIXTURE if self.is_mixture else LLAMA) | sizes)

    @property
    def run(self) -> PpoRun:
        model = {"path": "model", "frozen_layers": self.frozen_layers}
        return PpoRun.model_validate(
            {
                "output_dir": "out",
                "tokenizer": "tokenizer",
                "precision": self.precision,
                "parallel": {"microbatch_size": MINIBATCH[self.size] // 4} | self.parallel,
                "actor": model,
                "critic": model,
                "rewards": [{"kind": "exact"}],
                "data": {"path": "prompts.jsonl", "max_prompt_tokens": PROMPT},
                "rollout": {"prompts_per_step": 32, "max_response_tokens": RESPONSE, "kv_cache_bytes": 8 << 20},
                "ppo": {"total_steps": 10, "minibatch_size": MINIBATCH[self.size]},
                "memory": {"offload": self.offload},
                "checkpoint": {"background": "off"},
            }
        )

    def __str__(self) -> str:
        words = [f"{name}={value}" for name, value in self.parallel.items()] or ["data"]
        words += [self.precision] if self.precision != "fp32" else []
        words += [f"offload={self.offload}"] if self.offload != "none" else []
        words += [f"frozen_layers={self.frozen_layers}"] if self.frozen_layers else []
        return " ".join([*(["mixture"] if self.is_mixture else []), *words])


class Sleeper:
    """No sampler: what is measured is the trainer's."""

    policy_version = 0

    def wake(self, part: str) -> None:
        pass

    def sleep(self) -> None:
        pass


def step(rank: int, world_size: int, case: Case) -> dict[str, Any]:
    """One step's scoring and learning, the second after one to warm up.

    Returns by phase the bytes of `Phases.resident_bytes`; those and the most that was allocated at once beyond what there was when the
    phase began; what else there was then (buffers that torch's libraries make once); the bytes handed to collectives by kind.
    """
    run, spec = case.run, case.spec
    layout = groups.initialize(run.parallel, seed=0)
    gc.collect()  # a case before this one
    before = bytes_in_use()
    phases = Phases(Sleeper(), case.offload)
    actor = Actor(spec, run, layout, RandomSource(spec.table("actor"), 0))
    phases.admit("actor", actor.movables)
    reference = Reference(spec, run, layout, RandomSource(spec.table("actor"), 0))
    phases.admit(FROZEN, reference.movables)
    critic = Critic(spec, run, layout, RandomSource(spec.table("critic"), 1))
    phases.admit("critic", critic.movables)
    rows = run.ppo.minibatch_size // layout.data
    batch = experience(spec.vocab_size, rows)
    found: dict[str, Any] = {"resident": {}, "peak": {}, "other": {}, "sent": {}}

    def measured(phase: str, *passes: Callable[[], Any]) -> None:
        gc.collect()
        resident, start = sum(phases.resident_bytes().values()), bytes_in_use()
        with Ledger() as ledger:
            for one in passes:
                one()
        found["resident"][phase], found["peak"][phase] = resident, resident + ledger.peak - start
        found["other"][phase], found["sent"][phase] = start - before - resident, dict(ledger.sent)

    for _ in range(2):
        with phases.scoring():
            measured("scoring", partial(actor.logprobs, batch), partial(reference.logprobs, batch), partial(critic.values, batch))
        with phases.learning():
            measured("learning", partial(critic.update, batch), partial(actor.update, batch))
    return found


def steps(rank: int, world_size: int, cases: list[Case]) -> list[dict[str, Any]]:
    """The cases in turn."""
    return [step(rank, world_size, case) for case in cases]


def sync(rank: int, world_size: int, case: Case, generator: int) -> dict[str, int]:
    """Bytes of one weight sync into vLLM's own parameters, generators of `generator` ranks: handed to sends and received by this rank."""
    from megarl.bridge.sync import WeightSync
    from megarl.models.build import build_model
    from megarl.models.pieces import load_pieces, source_pieces
    from megarl.parallel.layout import RolloutLayout
    from megarl.rollout.vllm_engine import VllmEngine

    run, spec = case.run, case.spec
    layout = groups.initialize(run.parallel, seed=0)
    engine = VllmEngine(spec, run.rollout, RolloutLayout(layout, generator), case.precision, PROMPT + RESPONSE)
    owner = Owner(source_pieces(build_model(spec, "actor", run.parallel, case.precision, layout), spec.table("actor")))
    load_pieces(owner.pieces, RandomSource(spec.table("actor"), seed=0))
    pusher = WeightSync(engine, layout, verify_first=0)
    pusher.push(owner, 1)  # makes the plan
    with Ledger() as ledger:
        report = pusher.push(owner, 2)
    return {"sent": ledger.sent["send"], "received": report.received_bytes}


@dataclass(frozen=True)
class Owner:
    """The trainer's side of a sync."""

    pieces: Sequence[Any]


def experience(vocab_size: int, rows: int) -> Experience:
    """Sequences that are all as long as they may be."""
    tokens = PROMPT + RESPONSE
    shape = (rows, tokens)
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[:, PROMPT:] = True
    zeros = torch.zeros(shape)
    return Experience(
        token_ids=torch.randint(1, vocab_size, shape, generator=torch.Generator().manual_seed(0)),
        lengths=torch.full((rows,), tokens),
        response_mask=mask,
        rollout_logprobs=zeros,
        rewards=torch.zeros(rows),
        truncated=torch.zeros(rows, dtype=torch.bool),
        group_ids=torch.arange(rows),
        sample_ids=torch.arange(rows),
        baselines=torch.zeros(rows),
        baseline_truncated=torch.zeros(rows, dtype=torch.bool),
        ages=torch.zeros(shape, dtype=torch.int64),
        must_go_on=torch.zeros(shape, dtype=torch.bool),
        old_logprobs=zeros - 8.0 * mask,
        ref_logprobs=zeros,
        values=zeros,
        token_rewards=zeros,
        advantages=mask.float(),
        returns=mask.float(),
    )


# ---------------------------------------------------------------- bytes allocated and sent
COLLECTIVES = {
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "reduce_scatter_": "reduce-scatter",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "alltoall_": "all-to-all",
    "alltoall_base_": "all-to-all",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "send": "send",
}


class Ledger(TorchDispatchMode):
    """Asked after every operation of torch: the most that the process had allocated, and the bytes handed to collectives.

    `sent` holds buffers by kind as `megarl.planner.messages` counts them: whole ones, of groups of several ranks. Everything that
    communicates passes here, from wherever it is called, as torch.distributed dispatches it.
    """

    def __init__(self):
        super().__init__()
        self.peak, self.sent = bytes_in_use(), Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function.namespace == "c10d":
            self._take(function.__name__.partition(".")[0], args)
        result = function(*args, **(kwargs or {}))
        self.peak = max(self.peak, bytes_in_use())
        return result

    def _take(self, name: str, args: tuple) -> None:
        if name not in COLLECTIVES or group_of(args).size() == 1:
            return
        sizes = [sum(tensor.nbytes for tensor in tensors_in(argument)) for argument in args[:2]]
        kind = COLLECTIVES[name]
        self.sent[kind] += sizes[1] if kind == "all-to-all" else max(sizes)


def tensors_in(argument: Any) -> list[torch.Tensor]:
    """A tensor, or those of a list, or of lists in a list."""
    if isinstance(argument, torch.Tensor):
        return [argument]
    return [tensor for one in argument for tensor in tensors_in(one)] if isinstance(argument, list | tuple) else []


def group_of(args: tuple) -> dist.ProcessGroup:
    """The group that a dispatched collective is given."""
    (group,) = (one for one in args if isinstance(one, torch.ScriptObject) and "ProcessGroup" in str(one._type()))
    return dist.ProcessGroup.unbox(group)


class MallocInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]


_mallinfo = ctypes.CDLL(None).mallinfo2
_mallinfo.restype = MallocInfo


def bytes_in_use() -> int:
    """What glibc has handed out and not got back."""
    info = _mallinfo()
    return info.uordblks + info.hblkhd
