"""How the configuration of `megarl sample` becomes its parts. Every rank builds the same ones."""

import sys
from functools import partial

from megarl.bridge.sync import WeightSync
from megarl.checkpoint.sources import open_start
from megarl.config import SampleRun
from megarl.cross_check import longest_sequence
from megarl.data.prompts import PromptSet
from megarl.data.tokenizers import Tokenizer, check_vocabulary, load_tokenizer, stop_token_ids
from megarl.parallel import collectives, device, groups
from megarl.parallel.layout import ParallelLayout, RolloutLayout
from megarl.parallel.memory import Phases
from megarl.parallel.phases import offload_of
from megarl.ppo.roles import Reference
from megarl.ppo.terms import TermBuilder
from megarl.rewards.build import build_hook
from megarl.rewards.check import ANSWER_KINDS
from megarl.rewards.scorer import WeightedSum
from megarl.rollout.text_stops import TextStops
from megarl.rollout.vllm_engine import VllmEngine
from megarl.sampling.part_files import SampleFiles
from megarl.sampling.sampler import Answered, SamplingParts, sample


def sample_responses(run: SampleRun, layout: ParallelLayout) -> Answered:
    """Sample and score responses to the prompts of a run. Called by every rank after `groups.initialize`."""
    return sample(run, layout, build_parts(run, layout))


def build_parts(run: SampleRun, layout: ParallelLayout) -> SamplingParts:
    """The parts of a run. Called by every rank; a user's mistake on one rank is raised on all.

    As in PPO the sampler starts first and gets its weights from a model in the trainer's layout, which a Hugging Face directory and a
    checkpoint under any layout can fill.
    """
    together = partial(collectives.together, group=groups.group(layout, "world"))
    tokenizer = together(lambda: load_tokenizer(run.tokenizer))
    needs_answers = any(part.kind in ANSWER_KINDS for part in run.rewards)
    prompts = together(lambda: PromptSet(run.data, tokenizer, needs_answers=needs_answers))
    if layout.rank == 0:
        for notice in prompts.notices():
            print(f"megarl: warning: {notice}", file=sys.stderr)
    spec, source = together(lambda: open_start(run.actor, "actor", run.seed))
    together(lambda: check_vocabulary(tokenizer, spec.vocab_size, run.actor.path, "actor.path"))
    engine = VllmEngine(spec, run.rollout, RolloutLayout(layout, run.rollout.tensor_parallel), run.precision, longest_sequence(run)[0])
    engine.sleep()
    policy = Reference(spec, run, layout, source)
    sync = WeightSync(engine, layout, timeout_s=0.9 * run.parallel.timeout_s)
    memory = Phases(engine, offload_of(run, device.is_cuda()), partial(sync.push, policy))
    memory.admit("actor", policy.movables)
    scores = _build_scores(run, layout, tokenizer, memory)
    with memory.publishing():
        sync.push(policy, version=0)
    return SamplingParts(
        prompts=prompts.prompts[: run.sample.num_prompts or None],
        stop_token_ids=(*stop_token_ids(tokenizer, spec.end_ids), *run.rollout.stop_token_ids),
        tokenizer=tokenizer,
        engine=TextStops(engine, tokenizer) if run.rollout.stop_strings else engine,
        memory=memory,
        scores=scores,
        files=SampleFiles(run.output_dir, layout.dp_rank),
    )


def _build_scores(run: SampleRun, layout: ParallelLayout, tokenizer: Tokenizer, memory: Phases) -> WeightedSum | None:
    if not run.rewards:
        return None
    terms = TermBuilder(run, layout, tokenizer, memory).terms("rewards", run.rewards)
    hook = collectives.together(lambda: build_hook(run), groups.group(layout, "world"))
    return WeightedSum(terms, hook)
