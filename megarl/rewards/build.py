"""From the configuration to scorers. Reward models are built where models are (`ppo.assembly`); everything else here."""

import os
import re

from megarl.config import PpoRun, RewardPart
from megarl.rewards.check import HOOK_TIMEOUT_S, seconds
from megarl.rewards.code_tests import CodeTests
from megarl.rewards.exact import ExactAnswer
from megarl.rewards.function import FunctionHook, FunctionScorer, load_function
from megarl.rewards.math_answer import MathAnswer
from megarl.rewards.remote import REQUESTS_A_URL, RemoteScorer
from megarl.rewards.rules import Length, NumericAnswer, Pattern, Repetition
from megarl.rewards.sandbox import Sandbox
from megarl.rewards.scorer import Ahead, Scorer
from megarl.rewards.token import read_token

# Scored by one rank of a replica: they cost much, or the same response may get another score the next time.
RUN_ONCE = ("function", "http", "math", "code")
SAMPLING_RANKS = 8  # of a node, each of which may have programs run ahead
MATH_AT_ONCE, FUNCTION_AT_ONCE = 16, 4096  # responses that one call gets, if so many are finished


def build_scorer(key: str, part: RewardPart, run: PpoRun) -> Scorer:
    """The scorer of the part named `key`, of any kind but `model`. Raises `SetupError` where this machine lacks what it needs."""
    match part.kind:
        case "exact":
            return ExactAnswer()
        case "numeric":
            return NumericAnswer(part.tolerance)
        case "math":
            return MathAnswer(seconds(part))
        case "regex":
            return Pattern(re.compile(part.pattern or "", re.DOTALL))
        case "length":
            return Length(part.target or 1, run.rollout.max_response_tokens)
        case "repetition":
            return Repetition(part.ngram)
        case "function":
            name = part.function or ""
            return FunctionScorer(name, load_function(name, f"{key}.function"), seconds(part))
        case "http":
            return RemoteScorer(part.urls, part.per_request, seconds(part), read_token(part.token_file))
        case "code":
            return CodeTests(Sandbox(seconds(part), part.accept, key), 0.9 * run.parallel.timeout_s)
    raise AssertionError(f"{part.kind} is built elsewhere")


def ahead_of(part: RewardPart) -> Ahead | None:
    """How the part is scored while other responses are sampled; None where it waits for all of them.

    A function may compare the responses it gets with one another, so that it waits unless the part says otherwise.
    """
    is_wanted = part.overlap if part.overlap is not None else part.kind in ("math", "code", "http")
    match part.kind if is_wanted else "":
        case "http":
            return Ahead(REQUESTS_A_URL * len(part.urls), part.per_request, seconds(part))
        case "code":
            return Ahead(max(1, len(os.sched_getaffinity(0)) // SAMPLING_RANKS), 1)
        case "math":
            return Ahead(1, MATH_AT_ONCE)
        case "function":
            return Ahead(1, FUNCTION_AT_ONCE, seconds(part))
    return None


def build_hook(run: PpoRun) -> FunctionHook | None:
    """The function behind the sum, if the run names one."""
    if run.reward_hook is None:
        return None
    patience_s = min(HOOK_TIMEOUT_S, 0.9 * run.parallel.timeout_s)
    return FunctionHook(run.reward_hook, load_function(run.reward_hook, "reward_hook"), patience_s)
