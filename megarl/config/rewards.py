"""The terms of the weighted reward sum."""

from typing import Annotated, Literal

from pydantic import Field

from megarl.config.section import Positive, Section, UserPath


class RewardPart(Section):
    """One term of the weighted reward sum (docs/rewards.md). Every kind has knobs of its own; a knob of another kind is refused."""

    kind: Literal["exact", "numeric", "math", "regex", "length", "repetition", "function", "http", "code", "model"]
    weight: float = 1.0
    path: UserPath | None = None  # model: a megarl checkpoint
    shape: UserPath | None = None  # model: as for the other models
    tolerance: Annotated[float, Field(ge=0)] = 1e-6  # numeric: largest difference, as a part of the answer (of 1 for a smaller one)
    pattern: str | None = None  # regex: what the whole response has to match
    target: Positive | None = None  # length: tokens that cost nothing; from there the score falls to -1 at rollout.max_response_tokens
    ngram: Positive = 4  # repetition: tokens of what may not come twice
    function: str | None = None  # function: module:function or file.py:function
    urls: tuple[str, ...] = ()  # http: addresses of the reward server, used in turn
    hosts: tuple[str, ...] = ()  # http: hosts that urls may name beside this machine's loopback
    per_request: Positive = 16  # http: responses a request
    token_file: UserPath | None = None  # http: file that holds the bearer token; none: the environment's MEGARL_REWARD_TOKEN, if set
    overlap: bool | None = None  # math, code, http (null: true), function (null: false): score what is finished while others are sampled
    timeout_s: Positive | None = None  # http, function: all of a step's scores (300); math (5), code (10): one response
    accept: tuple[Literal["root", "no_namespaces"], ...] = ()  # code: run responses as root; run them without namespaces
