"""How a run's configuration becomes the parts of the loop. Every rank builds the same ones."""

import sys
from collections.abc import Sequence
from functools import partial

from megarl.bridge.separate_sync import SeparateSync
from megarl.bridge.sync import WeightSync
from megarl.checkpoint.sources import open_start
from megarl.checkpoint.store import Checkpoints
from megarl.config import EvalSet, ModelConfig, PpoRun, PromptData, RewardPart
from megarl.cross_check import longest_sequence
from megarl.data.demonstrations import DemonstrationSet
from megarl.data.prompts import PromptSet
from megarl.data.tokenizers import Tokenizer, check_vocabulary, load_tokenizer, stop_token_ids
from megarl.metrics import RunLog
from megarl.metrics.terminal import PPO_HEADLINE
from megarl.models.spec import ModelSpec
from megarl.parallel import collectives, device, groups
from megarl.parallel.layout import ParallelLayout, RolloutLayout
from megarl.parallel.memory import Phases
from megarl.parallel.phases import FROZEN, REFERENCE, offload_of
from megarl.ppo.average import AveragedEvaluator, AveragedPolicy
from megarl.ppo.eval_sets import eval_sets
from megarl.ppo.evaluator import Evaluator, NoEvaluator
from megarl.ppo.harvest import Harvester
from megarl.ppo.held_out import HeldOut, eval_requests
from megarl.ppo.judge import Judge
from megarl.ppo.parity import ParityGate
from megarl.ppo.parts import FrozenReference, KlSource, NoCritic, NoReference, Parts
from megarl.ppo.ptx import NoPtx, Ptx
from megarl.ppo.reference import RefreshedReference
from megarl.ppo.roles import Actor, Critic, Reference
from megarl.ppo.scoring import ScoredAhead
from megarl.ppo.terms import TermBuilder
from megarl.rewards.ahead import EarlyScores
from megarl.rewards.build import build_hook
from megarl.rewards.check import ANSWER_KINDS
from megarl.rewards.scorer import WeightedSum
from megarl.rollout.engine import Engine, make_greedy_requests
from megarl.rollout.separate_engine import SeparateEngine, start_remote, start_separate
from megarl.rollout.text_stops import TextStops
from megarl.rollout.vllm_engine import VllmEngine


def build_parts(run: PpoRun, layout: ParallelLayout) -> Parts:
    """The parts of a run. Called by every rank after `groups.initialize`; a user's mistake on one rank is raised on all.

    The sampler starts first, while the accelerator is empty, and gives its memory back before the models arrive.
    """
    together = partial(collectives.together, group=groups.group(layout, "world"))
    tokenizer = together(lambda: load_tokenizer(run.tokenizer))
    prompts, held_out = together(lambda: _read_prompts(run, tokenizer))
    ptx = together(lambda: _read_ptx(run, layout, tokenizer))
    log = together(lambda: _open_log(run, layout))
    _say_what_was_skipped(layout, [(run.data, prompts), *((held.data, found) for held, found in held_out)])
    spec, source = together(lambda: open_start(run.actor, "actor", run.seed))
    together(lambda: check_vocabulary(tokenizer, spec.vocab_size, run.actor.path, "actor.path"))
    stops = (*stop_token_ids(tokenizer, spec.end_ids), *run.rollout.stop_token_ids)
    end_ids = stops if run.rollout.min_response_tokens else ()
    engine = _start_engine(run, layout, spec)
    actor = Actor(spec, run, layout, source, ptx, end_ids)
    weight_sync = _make_sync(run, layout, engine)
    memory = Phases(engine, offload_of(run, device.is_cuda()), partial(weight_sync.push, actor))
    memory.admit("actor", actor.movables)
    reference = _build_reference(run, layout, memory, actor, end_ids)
    sampler = TextStops(engine, tokenizer) if run.rollout.stop_strings else engine
    builder = TermBuilder(run, layout, tokenizer, memory)
    rewards = WeightedSum(builder.terms("rewards", run.rewards), together(lambda: build_hook(run)))
    early = EarlyScores(rewards.terms, tokenizer, prompts.find, _patience(run))
    ahead = ScoredAhead(layout, early, engine.group) if early.is_used else None
    judge = Judge(rewards, tokenizer, layout, ahead=ahead, min_tokens=run.rollout.min_response_tokens)
    harvester = Harvester(run, layout, prompts, stops, sampler, memory)
    return Parts(
        harvester=harvester,
        engine=sampler,
        memory=memory,
        judge=judge,
        actor=actor,
        critic=_build_critic(run, layout, memory),
        reference=reference,
        weight_sync=weight_sync,
        parity=ParityGate(run, layout, prompts, stops, sampler, memory, judge, actor),
        evaluator=_with_average(
            run,
            _build_evaluator(run, layout, held_out, sampler, memory, tokenizer, stops, builder),
            AveragedPolicy(actor, weight_sync, memory),
        ),
        checkpoints=Checkpoints("ppo", run, layout, tokenizer, run.ppo.total_steps, harvester),
        log=log,
    )


def _role_arguments(run: PpoRun, layout: ParallelLayout, model: ModelConfig, role: str):
    """(spec, run, layout, source) of a role. Every rank must call it."""
    spec, source = collectives.together(lambda: open_start(model, role, run.seed), groups.group(layout, "world"))
    return spec, run, layout, source


def _read_ptx(run: PpoRun, layout: ParallelLayout, tokenizer: Tokenizer) -> Ptx | NoPtx:
    """The text that the policy imitates, if any."""
    if run.ppo.ptx is None:
        return NoPtx()
    examples = DemonstrationSet(run.ppo.ptx.data, tokenizer)
    for notice in examples.notices() if layout.rank == 0 else []:
        print(f"megarl: warning: {notice}", file=sys.stderr)
    return Ptx(run.ppo.ptx, examples, tokenizer.pad_id, run.parallel.logits_bytes, run.seed, layout)


def _start_engine(run: PpoRun, layout: ParallelLayout, spec: ModelSpec) -> VllmEngine | SeparateEngine:
    """The sampler, wherever the run places it."""
    longest = longest_sequence(run)[0]
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


def _build_reference(run: PpoRun, layout: ParallelLayout, memory: Phases, actor: Actor, end_ids: tuple[int, ...]) -> KlSource:
    kl = run.ppo.kl
    if run.reference is None and kl.coef == 0 and kl.target is None:
        return NoReference()
    # By default the actor's start: its files once more, or the same draw. A checkpoint to resume from is read into the actor alone, later.
    reference = Reference(*_role_arguments(run, layout, run.reference or run.actor, "actor"), end_ids)
    if run.ppo.reference_refresh is None:
        memory.admit(FROZEN, reference.movables)
        return FrozenReference(reference, kl.estimator)
    memory.admit(REFERENCE, reference.movables)
    return RefreshedReference(reference, kl.estimator, run.ppo.reference_refresh, actor, memory)


def _build_critic(run: PpoRun, layout: ParallelLayout, memory: Phases) -> Critic | NoCritic:
    if run.critic is None:
        return NoCritic()
    critic = Critic(*_role_arguments(run, layout, run.critic, "critic"))
    memory.admit("critic", critic.movables)
    return critic


def _read_prompts(run: PpoRun, tokenizer: Tokenizer) -> tuple[PromptSet, list[tuple[EvalSet, PromptSet]]]:
    """The prompts to train on, and those held out."""

    def read(data: PromptData, parts: Sequence[RewardPart]) -> PromptSet:
        return PromptSet(data, tokenizer, needs_answers=any(part.kind in ANSWER_KINDS for part in parts))

    return read(run.data, run.rewards), [(held_out, read(held_out.data, held_out.metrics)) for held_out in eval_sets(run)]


def _build_evaluator(
    run: PpoRun,
    layout: ParallelLayout,
    held_out: Sequence[tuple[EvalSet, PromptSet]],
    engine: Engine,
    memory: Phases,
    tokenizer: Tokenizer,
    stops: Sequence[int],
    builder: TermBuilder,
) -> Evaluator | NoEvaluator:
    if run.eval is None:
        return NoEvaluator()
    sets = []
    for config, prompts in held_out:
        own = prompts.first(config.num_prompts, layout)
        requests = eval_requests(config, make_greedy_requests(own, run.rollout, stops))
        key = f"eval.sets.{run.eval.sets.index(config)}.metrics" if config in run.eval.sets else "eval"
        sets.append(HeldOut(config, own, requests, builder.terms(key, config.metrics)))
    return Evaluator(run.eval, sets, engine, memory, tokenizer, layout, run.ppo.total_steps)


def _with_average(run: PpoRun, evaluator: Evaluator | NoEvaluator, average: AveragedPolicy) -> Evaluator | AveragedEvaluator | NoEvaluator:
    """The same, or one that evaluates the policy's moving average, too (`eval.ema`)."""
    if run.eval is None or not run.eval.ema or isinstance(evaluator, NoEvaluator):
        return evaluator
    return AveragedEvaluator(evaluator, average)


def _open_log(run: PpoRun, layout: ParallelLayout) -> RunLog:
    run_json = run.model_dump(mode="json")
    return RunLog.open("ppo", run.output_dir, run.log, run.ppo.total_steps, PPO_HEADLINE, layout.rank == 0, run_json)


def _say_what_was_skipped(layout: ParallelLayout, files: Sequence[tuple[PromptData, PromptSet]]) -> None:
    for _, prompts in files if layout.rank == 0 else ():
        for notice in prompts.notices():
            print(f"megarl: warning: {notice}", file=sys.stderr)
