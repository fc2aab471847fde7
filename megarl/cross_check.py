"""Does a run fit its world and its models? Pure rules over several keys at once, each fault naming the keys to change.

The rules are the ones that Megatron-Core, vLLM and the loop would otherwise break on minutes later, on all ranks at once.
"""

import math
from collections.abc import Iterator, Mapping

from megarl.config import DpoRun, LessonRun, PpoRun, RrhfRun, Run, SampleRun, TrainedModelConfig
from megarl.config_file import RUNS, Fault
from megarl.data.check import data_faults
from megarl.data.pack_size import tile_of, token_budget
from megarl.errors import LayoutError
from megarl.models.family import ModelSpec
from megarl.parallel.layout import ParallelLayout
from megarl.ppo.check import algorithm_faults
from megarl.ppo.eval_sets import evaluation_faults
from megarl.rewards.check import reward_faults
from megarl.rollout.check import sampling_faults
from megarl.sampling.check import sample_faults

LAYOUT_KEYS = ("parallel.tensor", "parallel.pipeline", "parallel.context", "parallel.expert", "cluster")
LOOPBACK = ("127.0.0.1", "::1", "localhost")
VLLM_VOCABULARY_MULTIPLE = 64  # vLLM pads the vocabulary to this before it cuts it over its tensor-parallel ranks


def cross_check(run: Run, world_size: int, specs: Mapping[str, ModelSpec]) -> list[Fault]:
    """Everything that does not fit, all at once.

    Args: `world_size` ranks; `specs` the shape of each model by its dotted key (`actor`, `critic`, `reference`, `rewards.0`, `model`);
    a model whose shape is not known is left out and not judged.
    """
    faults = [*_layout(run, world_size), *_sequence_parallel(run), *_virtual_pipeline(run), *_shared_head(run), *_packing(run)]
    faults += data_faults(run)
    faults += [*_models(run, specs), *_frozen(run, specs), *_mixtures(run, specs), *_lengths(run, specs)]
    replica = run.parallel.tensor * run.parallel.pipeline * run.parallel.context
    data = world_size // replica if world_size % replica == 0 else None
    if isinstance(run, PpoRun):
        faults += sampling_faults(run, specs["actor"].vocab_size if "actor" in specs else None)
        faults += [*_generation(run, world_size, specs), *_placement(run), *reward_faults(run), *_vocabularies(specs)]
        faults += [*evaluation_faults(run), *algorithm_faults(run), *_ptx(run, data, specs), *_ppo_batch(run, data)]
    elif isinstance(run, SampleRun):
        faults += sampling_faults(run, specs["actor"].vocab_size if "actor" in specs else None) if run.rollout.refill is None else []
        faults += [*sample_faults(run), *_generation(run, world_size, specs), *reward_faults(run), *_vocabularies(specs)]
    elif isinstance(run, LessonRun):
        faults += [*_lesson(run), *_vocabularies(specs), *_lesson_batch(run, data)]
    return faults


def started_on(run: Run, world_size: int) -> list[Fault]:
    """The fault of a run that was started on another number of ranks than its file is written for."""
    if run.cluster is None and world_size == 1 and smallest_world(run) > 1:
        need = smallest_world(run)
        return [Fault(LAYOUT_KEYS, f"started as one process; this layout needs {need} ranks or a multiple: {_launcher(run, need)}")]
    if run.cluster is None or run.cluster.world_size == world_size:
        return []
    text = (
        f"cluster: {run.cluster.nodes} nodes x {run.cluster.ranks_per_node} ranks_per_node = {run.cluster.world_size} ranks, but this run"
        f" was started on {world_size}: {_launcher(run, run.cluster.ranks_per_node)} on each node, or change cluster (cluster=null: any)"
    )
    return [Fault(("cluster.nodes", "cluster.ranks_per_node"), text)]


def _launcher(run: Run, num_ranks: int) -> str:
    command = next(kind for kind, run_type in RUNS.items() if type(run) is run_type)
    return f"NPROC={num_ranks} bash launch/torchrun.sh {command} ..."


def smallest_world(run: Run) -> int:
    """The smallest number of ranks that the layout of a run fits."""
    parallel = run.parallel
    replica = parallel.tensor * parallel.pipeline * parallel.context
    generator = run.rollout.tensor_parallel if isinstance(run, PpoRun | SampleRun) and run.rollout.placement == "colocated" else 1
    return math.lcm(replica, generator, parallel.pipeline * parallel.expert)


def divisors(number: int, times: int = 1) -> str:
    """The divisors of a number, each so many `times`, in words, the middle left out when there are many."""
    found = [str(d * times) for d in range(1, number + 1) if number % d == 0]
    return ", ".join(found if len(found) <= 8 else [*found[:6], "...", found[-1]])


def _named(model: str) -> tuple[str, str]:
    """The keys that decide a model's shape."""
    return f"{model}.path", f"{model}.shape"


def layout_of(run: Run, world_size: int) -> ParallelLayout:
    """How a run lies on `world_size` ranks. Raises LayoutError when it does not fit them."""
    parallel = run.parallel
    return ParallelLayout(parallel.tensor, parallel.pipeline, world_size, context=parallel.context, expert=parallel.expert)


def _layout(run: Run, world_size: int) -> Iterator[Fault]:
    try:
        layout_of(run, world_size)
    except LayoutError as error:
        yield Fault(LAYOUT_KEYS, str(error))


def _sequence_parallel(run: Run) -> Iterator[Fault]:
    if run.parallel.sequence and run.parallel.tensor == 1:
        keys = ("parallel.sequence", "parallel.tensor")
        yield Fault(keys, "parallel.sequence: found true with parallel.tensor 1; expected false, or parallel.tensor of at least 2")


def _virtual_pipeline(run: Run) -> Iterator[Fault]:
    if run.parallel.virtual_pipeline > 1 and run.parallel.pipeline == 1:
        keys = ("parallel.virtual_pipeline", "parallel.pipeline")
        text = f"found {run.parallel.virtual_pipeline} with parallel.pipeline 1; expected 1, or parallel.pipeline of at least 2"
        yield Fault(keys, f"parallel.virtual_pipeline: {text}: chunks take turns only where there are stages to take turns with")


def _shared_head(run: Run) -> Iterator[Fault]:
    knob, parallel = "parallel.head", run.parallel
    if parallel.head != "sharded":
        return
    if parallel.pipeline == 1:
        text = f"{knob}: found sharded with parallel.pipeline 1; expected auto or last_stage, or parallel.pipeline of at least 2"
        yield Fault((knob, "parallel.pipeline"), text)
    if parallel.virtual_pipeline > 1:
        text = (
            f"found sharded with parallel.virtual_pipeline {parallel.virtual_pipeline}; expected auto or last_stage (or virtual_pipeline 1)"
        )
        yield Fault((knob, "parallel.virtual_pipeline"), f"{knob}: {text}")


def _models(run: Run, specs: Mapping[str, ModelSpec]) -> Iterator[Fault]:
    for key, spec in specs.items():
        yield from _tensor_fits("parallel.tensor", run.parallel.tensor, key, spec)
        stages, chunks = run.parallel.pipeline, run.parallel.virtual_pipeline
        if spec.num_layers < stages:
            text = f"parallel.pipeline: found {stages}; expected at most the {spec.num_layers} layers of {key}"
            yield Fault(("parallel.pipeline", *_named(key)), text)
        elif spec.num_layers < stages * chunks:
            text = f"found {chunks} with parallel.pipeline {stages}; expected at most {spec.num_layers // stages}: {key} has"
            text = f"parallel.virtual_pipeline: {text} {spec.num_layers} layers, too few for {stages * chunks} chunks"
            yield Fault(("parallel.virtual_pipeline", "parallel.pipeline", *_named(key)), text)


def _frozen(run: Run, specs: Mapping[str, ModelSpec]) -> Iterator[Fault]:
    """Which of the lowest layers may be frozen."""
    for key in ("actor", "critic", "model"):
        model, spec = getattr(run, key, None), specs.get(key)
        if not isinstance(model, TrainedModelConfig) or spec is None or model.frozen_layers == 0:
            continue
        knob = f"{key}.frozen_layers"
        if model.frozen_layers > spec.num_layers:
            text = f"{knob}: found {model.frozen_layers}; expected at most the {spec.num_layers} layers of {key}"
            yield Fault((knob, *_named(key)), text)
        has_vocabulary_head = key == "actor" or (isinstance(run, LessonRun) and run.role == "actor")
        if spec.tied and has_vocabulary_head:
            text = f"{knob}: found {model.frozen_layers}; expected 0: the embedding of {key} is its head, too (tied), which must learn"
            yield Fault((knob, *_named(key)), text)


def _mixtures(run: Run, specs: Mapping[str, ModelSpec]) -> Iterator[Fault]:
    """What mixtures of experts ask of a layout, and what only they understand."""
    expert, tensor = run.parallel.expert, run.parallel.tensor
    for key, spec in specs.items():
        mixture = spec.mixture
        if mixture is not None and mixture.num_experts % expert:
            text = f"found {expert}; expected a divisor of the {mixture.num_experts} experts of {key}: {divisors(mixture.num_experts)}"
            yield Fault(("parallel.expert", *_named(key)), f"parallel.expert: {text}")
        if mixture is not None and tensor > 1 and not run.parallel.sequence:
            text = f"found false with parallel.tensor {tensor}; expected true: {key} is a mixture of experts, which takes its tokens split"
            yield Fault(("parallel.sequence", "parallel.tensor", *_named(key)), f"parallel.sequence: {text} over tensor-parallel ranks")
        model = getattr(run, key, None)
        balance = model.optimizer.router_balance if isinstance(model, TrainedModelConfig) else 0.0
        if mixture is None and balance > 0:
            knob = f"{key}.optimizer.router_balance"
            yield Fault((knob, *_named(key)), f"{knob}: found {balance:g}; expected 0: {key} is dense, it has no router to balance")
    if expert > 1 and specs and all(spec.mixture is None for spec in specs.values()):
        names = tuple(name for key in specs for name in _named(key))
        text = f"parallel.expert: found {expert}; expected 1: no model of this run is a mixture of experts"
        yield Fault(("parallel.expert", *names), text)


def _tensor_fits(knob: str, tensor: int, model: str, spec: ModelSpec) -> Iterator[Fault]:
    sizes = [(spec.num_heads, "attention heads"), (spec.hidden_size, "channels")]
    if spec.mixture is None or knob == "rollout.tensor_parallel":  # the trainer keeps experts whole, the sampler cuts them
        sizes.append((spec.ffn_size, "feed-forward channels"))
    for number, what in sizes:
        if number % tensor:
            text = f"{knob}: found {tensor}; expected a divisor of the {number} {what} of {model}: {divisors(number)}"
            yield Fault((knob, *_named(model)), text)
    if spec.num_kv_heads % tensor and tensor % spec.num_kv_heads:
        text = f"{knob}: found {tensor}; expected a divisor or a multiple of the {spec.num_kv_heads} key-value heads of {model}"
        yield Fault((knob, *_named(model)), text)


def _generation(run: PpoRun | SampleRun, world_size: int, specs: Mapping[str, ModelSpec]) -> Iterator[Fault]:
    tensor, knob = run.rollout.tensor_parallel, "rollout.tensor_parallel"
    if run.rollout.placement == "colocated" and world_size % tensor:
        text = f"{knob}: found {tensor}; expected a divisor of the world of {world_size} ranks: {divisors(world_size)}"
        yield Fault((knob, "cluster"), text)
    if "actor" in specs:
        yield from _tensor_fits(knob, tensor, "actor", specs["actor"])
        padded = -(-specs["actor"].vocab_size // VLLM_VOCABULARY_MULTIPLE) * VLLM_VOCABULARY_MULTIPLE
        if padded % tensor:
            text = f"{knob}: found {tensor}; expected a divisor of the actor's padded vocabulary of {padded} tokens"
            yield Fault((knob, *_named("actor")), text)


def _placement(run: PpoRun) -> Iterator[Fault]:
    """What only generators of their own need, and what they cannot do without."""
    placement, replicas, listen = run.rollout.placement, run.rollout.replicas, run.rollout.listen
    keys = ("rollout.replicas", "rollout.placement")
    if placement == "colocated" and replicas:
        text = f"rollout.replicas: found {replicas} with rollout.placement colocated; expected 0: there are as many generators as fit the"
        yield Fault(keys, f"{text} ranks (world / rollout.tensor_parallel), or rollout.placement separate or remote")
    if placement == "remote" and not replicas:
        yield Fault(keys, "rollout.replicas: found 0 with rollout.placement remote; expected how many generators will join")
    if placement != "colocated" and run.cluster is not None and run.cluster.nodes > 1 and listen in LOOPBACK:
        text = f"rollout.listen: found {listen} with rollout.placement {placement} on {run.cluster.nodes} nodes; expected an address of the"
        yield Fault(("rollout.listen", "rollout.placement", "cluster.nodes"), f"{text} first node that the others reach")


def num_generators(run: PpoRun | SampleRun, world_size: int) -> int:
    """Generator replicas of a run."""
    if run.rollout.placement == "colocated":
        return world_size // run.rollout.tensor_parallel
    if run.rollout.placement == "remote":
        return run.rollout.replicas
    return max(1, run.rollout.replicas) * (run.cluster.nodes if run.cluster is not None else 1)


def _lengths(run: Run, specs: Mapping[str, ModelSpec]) -> Iterator[Fault]:
    longest, words, keys = longest_sequence(run)
    for key, spec in specs.items():
        if longest > spec.max_positions:
            text = f"{words}; expected at most the {spec.max_positions} positions of {key}"
            yield Fault((*keys, *_named(key)), text)


def longest_row(run: Run) -> int:
    """Tokens of the longest row that a microbatch may have to hold: a sequence, or all sequences of a pair or a list."""
    return longest_sequence(run)[0] * (run.sequences_per_row if isinstance(run, LessonRun) else 1)


def _packing(run: Run) -> Iterator[Fault]:
    knob, most = "parallel.max_tokens_per_microbatch", run.parallel.max_tokens_per_microbatch
    if most == 0:
        return
    _, words, keys = longest_sequence(run)
    if longest_row(run) > token_budget(run.parallel):
        tile = tile_of(run.parallel)
        need = -(-longest_row(run) // tile) * tile
        together = run.sequences_per_row if isinstance(run, LessonRun) else 1
        pair = f", and a {run.unit[:-1]} is {'two' if together == 2 else together} of them" if together > 1 else ""
        text = f"{knob}: found {most}; expected 0 (no packing) or at least {need}: {words}{pair}"
        yield Fault((knob, *keys, "parallel.tensor", "parallel.context"), text)


def longest_sequence(run: Run) -> tuple[int, str, tuple[str, ...]]:
    """Tokens of the longest sequence a run may see, the same in words, and the keys that decide it."""
    if isinstance(run, PpoRun | SampleRun):
        prompts = {"data.max_prompt_tokens": run.data.max_prompt_tokens}
        for number, held_out in enumerate(run.eval.sets if isinstance(run, PpoRun) and run.eval is not None else ()):
            prompts[f"eval.sets.{number}.data.max_prompt_tokens"] = held_out.data.max_prompt_tokens
        key = max(prompts, key=prompts.__getitem__)
        prompt, response = prompts[key], run.rollout.max_response_tokens
        words = f"{key} {prompt} + rollout.max_response_tokens {response} = {prompt + response} tokens"
        return prompt + response, words, ("rollout.max_response_tokens", key)
    assert isinstance(run, LessonRun)
    return run.data.max_tokens, f"data.max_tokens: found {run.data.max_tokens}", ("data.max_tokens",)


def _vocabularies(specs: Mapping[str, ModelSpec]) -> Iterator[Fault]:
    leader = "actor" if "actor" in specs else "model"
    if leader not in specs:
        return
    expected = specs[leader].vocab_size
    for key, spec in specs.items():
        if spec.vocab_size != expected:
            text = (
                f"{key}.path: a vocabulary of {spec.vocab_size}; expected the {leader}'s {expected}: all models of a run read the same"
                f" token ids, so {key} must come from a model with the same tokenizer"
            )
            yield Fault((*_named(key), *_named(leader)), text)


def _ptx(run: PpoRun, data: int | None, specs: Mapping[str, ModelSpec]) -> Iterator[Fault]:
    """The text that the policy imitates: its batch and its lengths."""
    ptx, knob = run.ppo.ptx, "ppo.ptx.data.max_tokens"
    if ptx is None:
        return
    if not ptx.data.files():
        yield Fault(("ppo.ptx.data",), "ppo.ptx.data: found neither path nor sources; expected a file of demonstrations")
    if data is not None:
        yield from _replica_batch(run, "ppo.ptx.batch_size", ptx.batch_size, data)
    longest = ptx.data.max_tokens
    if "actor" in specs and longest > specs["actor"].max_positions:
        text = f"{knob}: found {longest}; expected at most the {specs['actor'].max_positions} positions of actor"
        yield Fault((knob, *_named("actor")), text)
    if run.parallel.max_tokens_per_microbatch and longest > token_budget(run.parallel):
        text = f"found {longest}; expected at most parallel.max_tokens_per_microbatch, {run.parallel.max_tokens_per_microbatch}"
        yield Fault((knob, "parallel.max_tokens_per_microbatch"), f"{knob}: {text}")


def _divides(name: str, size: int, parts: int, words: str, keys: tuple[str, ...]) -> Iterator[Fault]:
    if size % parts:
        lower, upper = size // parts * parts, (size // parts + 1) * parts
        near = f"{lower} or {upper}" if lower else str(upper)
        yield Fault(keys, f"{name}: found {size}; expected a multiple of {words}: the nearest {'are' if lower else 'is'} {near}")


def _ppo_batch(run: PpoRun, data: int | None) -> Iterator[Fault]:
    prompts, samples, minibatch = run.rollout.prompts_per_step, run.rollout.samples_per_prompt, run.ppo.minibatch_size
    knob = "rollout.prompts_per_step"
    if (prompts * samples) % minibatch:
        text = (
            f"ppo.minibatch_size: found {minibatch}; expected a divisor of the {prompts * samples} sequences a step"
            f" (rollout.prompts_per_step {prompts} x rollout.samples_per_prompt {samples}): {divisors(prompts * samples)}"
        )
        yield Fault(("ppo.minibatch_size", knob, "rollout.samples_per_prompt"), text)
    if data is not None:
        yield from _divides(knob, prompts, data, f"the {data} data-parallel replicas", (knob, *LAYOUT_KEYS))
        yield from _replica_batch(run, "ppo.minibatch_size", minibatch, data)


def _replica_batch(run: Run, knob: str, size: int, data: int) -> Iterator[Fault]:
    keys = (knob, *LAYOUT_KEYS)
    if size % data:
        yield from _divides(knob, size, data, f"the {data} data-parallel replicas", keys)
        return
    share, micro = size // data, run.parallel.microbatch_size
    if share % micro and not run.parallel.max_tokens_per_microbatch:
        text = (
            f"parallel.microbatch_size: found {micro}; expected a divisor of the {share} sequences that a data-parallel replica has of"
            f" {knob} ({size} / {data} replicas): {divisors(share)}"
        )
        yield Fault(("parallel.microbatch_size", *keys), text)


def _lesson(run: LessonRun) -> Iterator[Fault]:
    if run.train.eval_every_steps and run.data.eval_path is None:
        keys = ("train.eval_every_steps", "data.eval_path")
        yield Fault(keys, f"train.eval_every_steps: found {run.train.eval_every_steps} without data.eval_path; expected both or 0")
    if isinstance(run, DpoRun) and run.dpo.loss == "ipo" and run.dpo.label_smoothing:
        text = f"dpo.label_smoothing: found {run.dpo.label_smoothing:g} with dpo.loss ipo; expected 0: it is a part of the loss dpo"
        yield Fault(("dpo.label_smoothing", "dpo.loss"), text)


def _lesson_batch(run: LessonRun, data: int | None) -> Iterator[Fault]:
    """A microbatch counts sequences and holds whole rows: pairs, or lists of the largest size."""
    knob, size, width = "train.batch_size", run.train.batch_size, run.sequences_per_row
    if data is None:
        return
    if width == 1 or size % data:
        yield from _replica_batch(run, knob, size, data)
        return
    share, micro = size // data, run.parallel.microbatch_size
    if (micro % width or share % (micro // width)) and not run.parallel.max_tokens_per_microbatch:
        expected = (
            f"{width} (the sequences of a {run.unit[:-1]}) times a divisor of the {share} {run.unit} that a data-parallel replica has"
        )
        text = f"found {micro}; expected {expected} of {knob} ({size} / {data} replicas): {divisors(share, width)}"
        keys = ("parallel.microbatch_size", knob, *(("rrhf.max_responses",) if isinstance(run, RrhfRun) else ()), *LAYOUT_KEYS)
        yield Fault(keys, f"parallel.microbatch_size: {text}")
