"""R13: a sampler that hangs or answers with what is no completion is an error that says so, and a replay gives the same data.

The sampler is vLLM; what it returns is spoiled on its way to megarl, on one of two ranks.
"""

import copy
import os
import signal
import time
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.rollout.test_separate import TP2, Trainer
from tests.rollout.test_separate_faults import refusal
from tests.rollout.tiny_models import WholeModel, save_tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [save_tiny("llama", seed, folder) for seed in (0, 1)]


def fewer(outputs):
    return outputs[:-1]


def none_at_all(outputs):
    return []


def empty(outputs):
    return change(outputs, token_ids=[])


def non_finite(outputs):
    return change(outputs, value=float("nan"))


def infinite(outputs):
    return change(outputs, value=float("-inf"))


def too_many_tokens(outputs):
    answer = outputs[0].outputs[0]
    return change(outputs, token_ids=[*answer.token_ids, 5], values=[*answer.logprobs.logprobs, -1.0])


def outside_the_vocabulary(outputs):
    answer = outputs[0].outputs[0]
    return change(outputs, token_ids=[10**6, *list(answer.token_ids)[1:]])


def other_tokens_than_logprobs(outputs):
    outputs = copy.deepcopy(outputs)
    outputs[0].outputs[0].token_ids = [*list(outputs[0].outputs[0].token_ids)[:-1], 1]
    return outputs


class Logprobs:
    """vLLM's flat log-probabilities, as far as megarl reads them."""

    def __init__(self, token_ids, values):
        self.token_ids, self.logprobs = list(token_ids), list(values)


def change(outputs, token_ids=None, value=None, values=None):
    """The outputs with the first answer's tokens, or one of its log-probabilities, replaced; both stay as many."""
    outputs = copy.deepcopy(outputs)
    answer = outputs[0].outputs[0]
    tokens = list(answer.token_ids) if token_ids is None else token_ids
    numbers = list(answer.logprobs.logprobs) if values is None else values
    numbers = numbers[: len(tokens)] if value is None else [value, *numbers[1:]]
    answer.token_ids, answer.logprobs = tokens, Logprobs(tokens, numbers)
    return outputs


SPOILERS = {
    fewer: "vLLM returned 7 outputs for 8 requests",
    none_at_all: "vLLM returned 0 outputs for 8 requests",
    empty: "0 tokens; expected 1 to 6",
    non_finite: "log-probability nan; expected a finite number",
    infinite: "log-probability -inf; expected a finite number",
    too_many_tokens: "7 tokens; expected 1 to 6",
    outside_the_vocabulary: "token 1000000 is outside the vocabulary",
    other_tokens_than_logprobs: "speak of other tokens than it returned",
}


def spoil(rank: int, world_size: int, folder: Path) -> dict:
    """(message, whether a replay gives the very same completions) of every spoiler; rank 1's sampler is the bad one."""
    from megarl.bridge.sync import WeightSync
    from megarl.config import ParallelConfig, RolloutConfig
    from megarl.errors import RolloutError
    from megarl.models.family import read_spec
    from megarl.parallel import groups
    from megarl.parallel.layout import RolloutLayout
    from megarl.records import Prompt
    from megarl.rollout.engine import make_requests
    from megarl.rollout.vllm_engine import VllmEngine

    layout = groups.initialize(ParallelConfig(), seed=0)
    rollout = RolloutConfig(prompts_per_step=4, samples_per_prompt=2, max_response_tokens=6, kv_cache_bytes=8 << 20)
    engine = VllmEngine(read_spec(folder), rollout, RolloutLayout(layout, 1), "fp32", 32)
    WeightSync(engine, layout).push(WholeModel.of(folder), 0)
    prompts = [Prompt(4 * rank + index, (5 + index, 6, 7)) for index in range(4)]
    requests = make_requests(prompts, rollout, (), seed=(0, 1), first_position=4 * rank)
    expected, vllm, found = engine.generate(requests), engine._llm.llm_engine, {}
    original = vllm.step
    for spoiler in SPOILERS:
        if rank == 1:
            vllm.step = Spoiled(original, spoiler)
        message = ""
        try:
            engine.generate(requests)
        except RolloutError as error:
            message = str(error)
        vllm.step = original
        found[spoiler.__name__] = [message, engine.generate(requests) == expected]
    return found


class Spoiled:
    """vLLM's step, of which the first one that finishes something gives it back changed; of `none_at_all` every one."""

    def __init__(self, step, spoiler):
        self.step, self.spoiler, self.is_done = step, spoiler, False

    def __call__(self):
        outputs = self.step()
        finished = [output for output in outputs if output.finished]
        if not finished or (self.is_done and self.spoiler is not none_at_all):
            return outputs
        self.is_done = True
        return self.spoiler(finished) + [output for output in outputs if not output.finished]


@pytest.mark.slow
def test_answers_that_are_no_completions_are_refused_and_a_replay_is_the_same(models):
    reports = run_ranks(spoil, 2, models[0])
    for spoiler, reason in SPOILERS.items():
        others, message = (report[spoiler.__name__][0] for report in reports)
        assert reason in message and others in ("", message), (others, message)  # the ranks of one generator agree, these are two
        assert all(report[spoiler.__name__][1] for report in reports), "the same data after a replay"
        print(f"R13: {spoiler.__name__}: {message}")


def stop_a_generator(rank: int, world_size: int, folders) -> dict:
    """A generator that stands still while it should sample: `timeout_s` later every rank knows which."""
    from megarl.rollout.engine import make_greedy_requests

    trainer = Trainer(folders, TP2, 1, False, timeout_s=15)
    trainer.load(folders[0])
    trainer.sync.push(trainer, 0)
    requests = make_greedy_requests(trainer.prompts(), trainer.rollout, stop_token_ids=())
    trainer.engine.generate(requests)
    pids = [peer.pid for peer in trainer.engine.generators.peers]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    report = {"generate": refusal(lambda: trainer.engine.generate(requests))}
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return report


@pytest.mark.slow
def test_a_generator_that_stands_still_is_named(models):
    began = time.monotonic()
    for report in run_ranks(stop_a_generator, 2, models, timeout_s=200):
        message, seconds = report["generate"]
        assert "generator 0 did not answer within 15 s" in message and seconds < 25, report
        print(f"R13: {message} after {seconds:.1f} s")
    assert time.monotonic() - began < 200
