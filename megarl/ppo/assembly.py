"""How a run's configuration becomes the parts of the loop. Every rank builds the same ones."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megarl.bridge.separate_sync import SeparateSync
from megarl.bridge.sync import WeightSync
from megarl.checkpoint.sources import open_start, open_weights
from megarl.checkpoint.store import Checkpoints
from megarl.config import ModelConfig, PpoRun, RewardPart
from megarl.data.batching import pad_rows, padded_length
from megarl.data.prompts import PromptSet
from megarl.data.tokenizers import Tokenizer, check_vocabulary, load_tokenizer, stop_token_ids
from megarl.metrics import RunLog
from megarl.metrics.terminal import PPO_HEADLINE
from megarl.models.spec import ModelSpec
from megarl.parallel import collectives, device, groups
from megarl.parallel.layout import ParallelLayout, RolloutLayout
from megarl.parallel.memory import FROZEN, Offload, Phases
from megarl.ppo.evaluator import Evaluator, NoEvaluator
from megarl.ppo.judge import TOKENS_A_TENSOR_RANK, Judge
from megarl.ppo.parity import ParityGate
from megarl.ppo.parts import FrozenReference, KlSource, NoCritic, NoReference, Parts
from megarl.ppo.roles import Actor, Critic, Reference, RewardModel
from megarl.records import TokenBatch
from megarl.rewards.build import RUN_ONCE, build_hook, build_scorer
from megarl.rewards.check import ANSWER_KINDS
from megarl.rewards.model import ModelScorer
from megarl.rewards.scorer import Scorer, Term, WeightedSum, distinct_names
from megarl.rollout.engine import Engine, make_greedy_requests
from megarl.rollout.separate_engine import SeparateEngine, start_remote, start_separate
from megarl.rollout.vllm_engine import VllmEngine


@dataclass(frozen=True)
class SequenceScores:
    """Scores of whole sequences by a reward model, for `rewards.model.ModelScorer`. Called by every rank of a replica."""

    model: RewardModel
    pad_id: int

    def __call__(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        length = padded_length([len(row) for row in sequences], TOKENS_A_TENSOR_RANK * self.model.layout.tensor)
        token_ids, lengths = pad_rows(sequences, self.pad_id, length)
        return self.model.scores(TokenBatch(token_ids, lengths).to(device.device())).tolist()


def build_parts(run: PpoRun, layout: ParallelLayout) -> Parts:
    """The parts of a run. Called by every rank after `groups.initialize`; a user's mistake on one rank is raised on all.

    The sampler starts first, while the accelerator is empty, and gives its memory back before the models arrive.
    """
    together = partial(collectives.together, group=groups.group(layout, "world"))
    tokenizer = together(lambda: load_tokenizer(run.tokenizer))
    prompts, held_out = together(lambda: _read_prompts(run, tokenizer))
    log = together(lambda: _open_log(run, layout))
    _say_what_was_skipped(run, layout, {run.data.path: prompts} | ({run.eval.path: held_out} if run.eval and held_out else {}))
    spec, source = together(lambda: open_start(run.actor, "actor", run.seed))
    together(lambda: check_vocabulary(tokenizer, spec.vocab_size, run.actor.path, "actor.path"))
    stops = stop_token_ids(tokenizer, spec.end_ids)
    engine = _start_engine(run, layout, spec)
    actor = Actor(spec, run, layout, source)
    weight_sync = _make_sync(run, layout, engine)
    memory = Phases(engine, offload_of(run), partial(weight_sync.push, actor))
    memory.admit("actor", actor.movables)
    reference = _build_reference(run, layout, memory)
    judge = Judge(_build_rewards(run, layout, tokenizer, memory), tokenizer, layout)
    return Parts(
        prompts=prompts,
        stop_token_ids=stops,
        engine=engine,
        memory=memory,
        judge=judge,
        actor=actor,
        critic=_build_critic(run, layout, memory),
        reference=reference,
        weight_sync=weight_sync,
        parity=ParityGate(run, layout, prompts, stops, engine, memory, judge, actor),
        evaluator=_build_evaluator(run, layout, held_out, engine, memory, tokenizer, stops),
        checkpoints=Checkpoints("ppo", run, layout, tokenizer, run.ppo.total_steps),
        log=log,
    )


def _role_arguments(run: PpoRun, layout: ParallelLayout, model: ModelConfig, role: str):
    """(spec, run, layout, source) of a role. Every rank must call it."""
    spec, source = collectives.together(lambda: open_start(model, role, run.seed), groups.group(layout, "world"))
    return spec, run, layout, source


def _start_engine(run: PpoRun, layout: ParallelLayout, spec: ModelSpec) -> VllmEngine | SeparateEngine:
    """The sampler, wherever the run places it."""
    longest = run.data.max_prompt_tokens + run.rollout.max_response_tokens
    if run.rollout.placement == "separate":
        return start_separate(spec, run.rollout, layout, run.precision, longest, _patience(run))
    if run.rollout.placement == "remote":
        return start_remote(spec, run.rollout, layout, run.precision, longest, _patience(run), run.output_dir)
    engine = VllmEngine(spec, run.rollout, RolloutLayout(layout, run.rollout.tensor_parallel), run.precision, longest)
    engine.sleep()
    return engine


def _make_sync(run: PpoRun, layout: ParallelLayout, engine: VllmEngine | SeparateEngine) -> WeightSync:
    """What pushes the actor's weights into `engine`."""
    every = run.rollout.digest_every_syncs
    if isinstance(engine, SeparateEngine):
        return SeparateSync(engine, layout, verify_every=every, timeout_s=_patience(run), host=run.rollout.listen)
    return WeightSync(engine, layout, verify_every=every, timeout_s=_patience(run))


def _patience(run: PpoRun) -> float:
    """Seconds to wait for others: a little less than a collective call does, whose end with a timeout would name nobody."""
    return 0.9 * run.parallel.timeout_s


def offload_of(run: PpoRun) -> Offload:
    """What may leave the device between phases: as the run says, or what suits this host and where its generators are."""
    if run.memory.offload != "auto":
        return run.memory.offload
    if not device.is_cuda():
        return "none"
    return "frozen" if run.rollout.placement == "remote" else "all"


def _build_reference(run: PpoRun, layout: ParallelLayout, memory: Phases) -> KlSource:
    kl = run.ppo.kl
    if run.reference is None and kl.coef == 0 and kl.target is None:
        return NoReference()
    # By default the actor's start: its files once more, or the same draw. A checkpoint to resume from is read into the actor alone, later.
    reference = Reference(*_role_arguments(run, layout, run.reference or run.actor, "actor"))
    memory.admit(FROZEN, reference.movables)
    return FrozenReference(reference, kl.estimator)


def _build_critic(run: PpoRun, layout: ParallelLayout, memory: Phases) -> Critic | NoCritic:
    if run.critic is None:
        return NoCritic()
    critic = Critic(*_role_arguments(run, layout, run.critic, "critic"))
    memory.admit("critic", critic.movables)
    return critic


def _build_rewards(run: PpoRun, layout: ParallelLayout, tokenizer: Tokenizer, memory: Phases) -> WeightedSum:
    together = partial(collectives.together, group=groups.group(layout, "world"))

    def scorer(index: int, part: RewardPart) -> Scorer:
        if part.path is None:
            return together(lambda: build_scorer(index, part, run))
        spec, source = together(lambda: open_weights(part.path, "reward"))
        model = RewardModel(spec, run, layout, source)
        memory.admit(FROZEN, model.movables)
        return ModelScorer(SequenceScores(model, tokenizer.pad_id))

    names = distinct_names([part.kind for part in run.rewards])
    terms = [Term(name, part.weight, scorer(i, part), part.kind in RUN_ONCE) for i, (name, part) in enumerate(zip(names, run.rewards))]
    return WeightedSum(tuple(terms), together(lambda: build_hook(run)))


def _read_prompts(run: PpoRun, tokenizer: Tokenizer) -> tuple[PromptSet, PromptSet | None]:
    """The prompts to train on and those held out, read with the same keys and limits."""
    prompts = PromptSet(run.data, tokenizer, needs_answers=any(part.kind in ANSWER_KINDS for part in run.rewards))
    if run.eval is None:
        return prompts, None
    return prompts, PromptSet(run.data.model_copy(update={"path": run.eval.path}), tokenizer, needs_answers=True)


def _build_evaluator(
    run: PpoRun,
    layout: ParallelLayout,
    held_out: PromptSet | None,
    engine: Engine,
    memory: Phases,
    tokenizer: Tokenizer,
    stops: Sequence[int],
) -> Evaluator | NoEvaluator:
    if run.eval is None or held_out is None:
        return NoEvaluator()
    prompts = held_out.first(run.eval.num_prompts, layout)
    requests = make_greedy_requests(prompts, run.rollout, stops)
    return Evaluator(run.eval, prompts, requests, engine, memory, tokenizer, layout, run.ppo.total_steps)


def _open_log(run: PpoRun, layout: ParallelLayout) -> RunLog:
    run_json = run.model_dump(mode="json")
    return RunLog.open("ppo", run.output_dir, run.log, run.ppo.total_steps, PPO_HEADLINE, layout.rank == 0, run_json)


def _say_what_was_skipped(run: PpoRun, layout: ParallelLayout, files: Mapping[Path, PromptSet]) -> None:
    limit = run.data.max_prompt_tokens
    for path, prompts in files.items():
        for what, count in {"skipped": prompts.num_skipped, "cut on the left": prompts.num_truncated}.items():
            if count and layout.rank == 0:
                print(f"megarl: warning: {path}: {count} prompts longer than data.max_prompt_tokens={limit} {what}", file=sys.stderr)
