"""What a rank of every stage holds in each phase of a step, on the accelerator and in host memory. Pure: no torch, no GPU.

`parallel.phases` says what is resident when, the layout how it is cut, `activations` what a pass takes on top.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megarl.config import PpoRun, Run, SampleRun
from megarl.cross_check import num_generators
from megarl.models.head_choice import chosen_head
from megarl.models.spec import ModelSpec
from megarl.parallel.layout import ParallelLayout
from megarl.parallel.phases import FROZEN, REFERENCE, RESIDENT, Offload, Phase, offload_of
from megarl.planner.activations import Kernels, Microbatch, head_bytes, stage_activations
from megarl.planner.batch import batch_of, largest_microbatch, text_microbatches
from megarl.planner.devices import Assumptions, Gpu
from megarl.planner.flight import layers_in_flight, layers_without_graph
from megarl.planner.models import PlannedModel, models_of
from megarl.planner.shards import Shard, sampler_elements

SYNC_ROUND_BYTES = 256 << 20  # of `bridge.sync`: at most two rounds of sends and two of receives are buffered
CPU_KV_CACHE_BYTES = 256 << 20
SAMPLER_BATCH_TOKENS = 8192  # that vLLM computes at once, on a GPU
GENERATORS = "generators"  # instead of a phase: what a sampler holds all the time where it has GPUs of its own


@dataclass(frozen=True)
class PhaseMemory:
    """Bytes of a rank of one stage in one phase, by what they are for."""

    phase: str
    stage: int
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def words(self) -> str:
        """When and where."""
        return "on a generator's own GPU" if self.phase == GENERATORS else f"while {self.phase} on stage {self.stage}"


@dataclass(frozen=True)
class MemoryPlan:
    """All phases of all stages, and the host memory of a rank."""

    models: list[PlannedModel]
    phases: list[PhaseMemory]
    host: list[dict[str, int]]  # by stage
    offload: Offload
    kv_cache: int = 0  # of a rank's sampler

    def worst(self, phase: str) -> PhaseMemory:
        """The stage that holds most in a phase."""
        return max((found for found in self.phases if found.phase == phase), key=lambda found: found.total)

    @property
    def names(self) -> tuple[str, ...]:
        """The phases in order."""
        return tuple(dict.fromkeys(found.phase for found in self.phases))

    @property
    def peak(self) -> PhaseMemory:
        """The phase and stage that hold most."""
        return max(self.phases, key=lambda found: found.total)

    @property
    def host_bytes(self) -> int:
        """Of the rank with most."""
        return max((sum(parts.values()) for parts in self.host), default=0)


def plan_memory(run: Run, specs: Mapping[str, ModelSpec], layout: ParallelLayout, gpu: Gpu | None, assumptions: Assumptions) -> MemoryPlan:
    """The memory of every phase. `gpu` None: a CPU host, whose sampler never sleeps and whose layers are Megatron's local ones."""
    models = models_of(run, specs, layout)
    has_sampler = isinstance(run, PpoRun | SampleRun)
    offload = offload_of(run, gpu is not None) if has_sampler else "none"
    batch, microbatches = largest_microbatch(run, layout), batch_of(run, layout.world_size).microbatches
    text = text_microbatches(run, layout)
    sampler = _Sampler(run, specs, layout, gpu, assumptions) if has_sampler and "actor" in specs else None
    phases = []
    for phase in _phases_of(run, models):
        for stage in range(layout.pipeline):
            parts = _resident(models, stage, phase, offload)
            parts |= _passes(run, models, stage, phase, batch, microbatches, text, gpu)
            if sampler is not None:
                parts |= sampler.parts(phase)
            phases.append(PhaseMemory(phase, stage, {name: size for name, size in parts.items() if size}))
    if sampler is not None and not sampler.is_here:
        phases.append(PhaseMemory(GENERATORS, 0, {name: size for name, size in sampler.awake().items() if size}))
    host = [_host(run, models, stage, offload) for stage in range(layout.pipeline)]
    return MemoryPlan(models, phases, host, offload, 0 if sampler is None else sampler.kv_cache)


def kernels_of(spec: ModelSpec, precision: str, gpu: Gpu | None) -> Kernels:
    """Whose layers compute a model: Transformer Engine's on a GPU, in bf16, where it knows the model."""
    return "fused" if gpu is not None and precision == "bf16" and spec.fits_transformer_engine else "local"


def _phases_of(run: Run, models: list[PlannedModel]) -> tuple[Phase, ...]:
    if isinstance(run, PpoRun):
        has_exchange = run.ppo.reference_refresh is not None or (run.eval is not None and run.eval.ema)
        exchanging: tuple[Phase, ...] = ("exchanging",) if has_exchange else ()
        return ("publishing", "generating", "scoring", "learning", *exchanging, "saving")
    if isinstance(run, SampleRun):
        return ("publishing", "generating", "scoring")
    return ("scoring", "learning", "saving") if len(models) > 1 else ("learning", "saving")


def _resident(models: list[PlannedModel], stage: int, phase: Phase, offload: Offload) -> dict[str, int]:
    parts: dict[str, int] = {}
    for model in models:
        owned = model.owned[stage]
        may_leave = offload == "all" or (offload == "frozen" and model.owner in (FROZEN, REFERENCE))
        for part in ("weights", "gradients", "optimizer", "ema"):
            if (model.owner, part) in RESIDENT[phase] or not may_leave:
                parts[f"{model.key} {part}"] = getattr(owned, part)
    return parts


def _passes(
    run: Run,
    models: list[PlannedModel],
    stage: int,
    phase: Phase,
    batch: Microbatch,
    microbatches: int,
    text: tuple[Microbatch, int] | None,
    gpu: Gpu | None,
) -> dict[str, int]:
    """What the forward and backward passes of a phase take: those of the model that takes most, since they run in turn."""
    found = [{}]
    for model in models:
        if phase == "scoring" or (phase == "learning" and model.is_trained):
            found.append(_pass_of(run, model, stage, phase == "learning", batch, microbatches, gpu))
        if phase == "learning" and model.key == "actor" and text is not None:
            found.append(_pass_of(run, model, stage, True, *text, gpu))
        if phase == "learning" and gpu is None and run.parallel.distributed_optimizer:
            found.append({"gradients that gloo reduces": _reduced_bytes(model.shards[stage]) if model.is_trained else 0})
    return max(found, key=lambda parts: sum(parts.values()))


def _pass_of(
    run: Run, model: PlannedModel, stage: int, is_learning: bool, batch: Microbatch, microbatches: int, gpu: Gpu | None
) -> dict[str, int]:
    parallel, precision = run.parallel, run.precision
    flight, chunk = layers_in_flight(parallel, model.role, model.spec.num_layers, microbatches)[stage]
    layers = flight * (1 - layers_without_graph(parallel, model.shards[stage], stage) / model.shards[stage].num_layers)
    kernels = kernels_of(model.spec, precision, gpu)
    used = stage_activations(model.spec, parallel, kernels, precision, batch, layers, chunk)
    kept = used.kept if is_learning else 0
    width = 2 if precision == "bf16" else 4
    weight = 0 if model.spec.mixture else model.shards[stage].largest * width  # its gradient, before it is added to the others
    moments = [{"activations": kept + max(used.backward, used.ends + weight) if is_learning else used.passing}]
    if is_learning and model.shards[stage].embedding:  # comes last, when nothing of its microbatch's chunk is left
        embedding = model.shards[stage].embedding * width
        moments.append({"activations": int(kept * (1 - chunk / flight)) + used.ends, "gradient of the embedding": embedding})
    is_shared = chosen_head(parallel, model.role) == "sharded"
    is_last = stage == parallel.pipeline - 1
    always = {}
    if model.role == "actor" and (is_shared or is_last):
        head = head_bytes(model.spec, parallel, precision, batch, parallel.pipeline if is_shared else 1)
        is_owner = is_last or (stage == 0 and model.spec.tied)
        # after the layers' forward and before their backward: what passes through a layer is not there
        moments.append({"activations": kept + used.ends, "logits": head.backward if is_learning else head.forward})
        if is_shared and not is_owner:
            always["copy of the head"] = head.replica if is_learning else head.replica_forward
    return max(moments, key=lambda parts: sum(parts.values())) | always


def _reduced_bytes(shard: Shard) -> int:
    """Gloo's reduce-scatter works on a copy of all gradients of a buffer; dense weights have one, experts another. NCCL needs none."""
    experts = shard.experts - shard.still_experts
    return 4 * max(shard.learned - experts, experts)


class _Sampler:
    """vLLM in the trainer's processes."""

    def __init__(
        self,
        run: PpoRun | SampleRun,
        specs: Mapping[str, ModelSpec],
        layout: ParallelLayout,
        gpu: Gpu | None,
        assumptions: Assumptions,
    ):
        spec, tensor = specs["actor"], run.rollout.tensor_parallel
        width = 2 if run.precision == "bf16" else 4
        self.is_here = run.rollout.placement == "colocated"
        self.sleeps = gpu is not None
        self.weights = sampler_elements(spec, tensor) * width
        inner = spec.ffn_size * (spec.mixture.experts_per_token if spec.mixture else 1) / tensor
        sequences = -(-run.rollout.prompts_per_step * run.rollout.samples_per_prompt // num_generators(run, layout.world_size))
        logits = 12 * min(1024, max(16, sequences)) * spec.vocab_size  # float32: logits, log-probabilities, a sort's copy
        self.graphs = 0 if run.rollout.eager or gpu is None else assumptions.cuda_graph_bytes
        batch = SAMPLER_BATCH_TOKENS if gpu is not None else 0
        self.work = int(batch * width * (4 * spec.hidden_size + 3 * inner) + logits) if gpu is not None else 0
        self.kv_cache = run.rollout.kv_cache_bytes
        if not self.kv_cache:
            share = int(gpu.memory_bytes * run.rollout.gpu_memory_fraction) if gpu is not None else 0
            self.kv_cache = max(0, share - self.weights - self.work - self.graphs) if gpu is not None else CPU_KV_CACHE_BYTES
        is_local = layout.pipeline == 1 and layout.tensor == tensor and layout.expert == 1
        self.buffers = 0 if is_local else 4 * min(SYNC_ROUND_BYTES, self.weights)

    def parts(self, phase: Phase) -> dict[str, int]:
        """What it takes of the rank in a phase: asleep, the CUDA graphs it recorded."""
        if not self.is_here:
            return {}
        if phase == "publishing":
            kv_cache = 0 if self.sleeps else self.kv_cache
            return {"sampler weights": self.weights, "KV cache": kv_cache, "CUDA graphs": self.graphs, "sync buffers": self.buffers}
        if phase == "generating" or not self.sleeps:
            return self.awake() | ({} if phase == "generating" else {"sampler's passes": 0})
        return {"CUDA graphs": self.graphs}

    def awake(self) -> dict[str, int]:
        """What it takes while it generates."""
        return {"sampler weights": self.weights, "KV cache": self.kv_cache, "CUDA graphs": self.graphs, "sampler's passes": self.work}


def kv_bytes_per_token(spec: ModelSpec, tensor: int, precision: str) -> int:
    """Bytes of keys and values of one token on a generator's rank."""
    return 2 * spec.num_layers * max(1, spec.num_kv_heads // tensor) * spec.head_dim * (2 if precision == "bf16" else 4)


def _host(run: Run, models: list[PlannedModel], stage: int, offload: Offload) -> dict[str, int]:
    """Pinned copies of what may leave, kept for the next time; the copy that a save in the background writes from."""
    away = saved = 0
    for model in models:
        owned = model.owned[stage]
        if offload == "all" or (offload == "frozen" and model.owner in (FROZEN, REFERENCE)):
            away += owned.weights + owned.optimizer + owned.ema  # gradients start from zero: no copy
        if model.is_trained or model.owner == REFERENCE:
            saved += owned.weights + owned.optimizer + owned.ema
    parts = {"waiting": away}
    if run.checkpoint.background != "off":
        parts["checkpoint being written"] = saved
    return {name: size for name, size in parts.items() if size}
