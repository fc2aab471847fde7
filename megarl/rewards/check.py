"""Do the parts of the reward fit together, and is what they need there? No torch: `--check` asks this on any machine."""

import os
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megarl.config import PpoRun, RewardPart, SampleRun
from megarl.config_file import Fault

ANSWER_KINDS = ("exact", "numeric", "math", "code")  # compare with, or run, what the data has under the column `answer`
CAN_PASS = ("exact", "numeric", "math", "regex", "code", "function", "http")  # a score of 1 means that the response is right
# The knobs of each kind beside kind and weight: those it must have first, then those it may have.
KNOBS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "exact": ((), ()),
    "numeric": ((), ("tolerance",)),
    "math": ((), ("overlap", "timeout_s")),
    "regex": (("pattern",), ()),
    "length": (("target",), ()),
    "repetition": ((), ("ngram",)),
    "function": (("function",), ("overlap", "timeout_s")),
    "http": (("urls",), ("hosts", "overlap", "per_request", "timeout_s", "token_file")),
    "code": ((), ("accept", "overlap", "timeout_s")),
    "model": (("path",), ("shape",)),
}
MEANING = {
    "pattern": "the regular expression the whole response has to match",
    "target": "the number of response tokens that cost nothing",
    "function": "package.module:function or path/to/file.py:function",
    "urls": "the addresses of the reward server, such as [http://127.0.0.1:5000/score]",
    "path": "the path of a reward model",
}
LOOPBACK = ("localhost", "127.0.0.1", "::1")
HOOK_TIMEOUT_S = 300.0
DEFAULT_TIMEOUT_S = {"function": 300, "http": 300, "math": 5, "code": 10}


def reward_faults(run: PpoRun | SampleRun) -> Iterator[Fault]:
    """Everything about `rewards`, `reward_hook` and the metrics of `eval.sets` that cannot work, whatever the machine."""
    if not run.rewards and isinstance(run, PpoRun):
        yield Fault(("rewards",), "rewards: found an empty list; expected at least one part, such as {kind: exact}")
    for key, part in parts_of(run):
        yield from _wrong_knobs(key, part)
        yield from _wrong_values(key, part, run)
    if run.rewards and all(part.weight == 0 for part in run.rewards):
        yield Fault(("rewards",), "rewards: every weight is 0; expected at least one part that counts")
    if run.reward_hook is not None and not _is_function(run.reward_hook):
        yield Fault(("reward_hook",), f"reward_hook: found {run.reward_hook!r}; expected {MEANING['function']}")


def missing_for_rewards(run: PpoRun | SampleRun) -> Iterator[Fault]:
    """What the parts need of this machine and do not find."""
    for key, part in parts_of(run):
        if part.kind == "math" and find_spec("math_verify") is None:
            text = "needs the package math-verify, which is not installed here; run pip install 'megarl[math]'"
            yield Fault((f"{key}.kind",), f"{key}.kind: math {text}")
        if part.token_file is not None and not part.token_file.is_file():
            yield Fault((f"{key}.token_file",), f"{key}.token_file: {part.token_file} is no file; expected one that holds the token")
        if part.function is not None and _is_function(part.function):
            yield from _missing_file(f"{key}.function", part.function)
        if part.kind == "code" and os.geteuid() == 0 and "root" not in part.accept:
            yield Fault((f"{key}.accept", f"{key}.kind"), f"{key}.kind: {ROOT_REFUSED.format(key=key)}")
    if run.reward_hook is not None and _is_function(run.reward_hook):
        yield from _missing_file("reward_hook", run.reward_hook)


ROOT_REFUSED = (
    "code runs responses as the user of this process, who is root: no limit on processes holds for root; expected another user, or"
    " {key}.accept: [root]"
)


def parts_of(run: PpoRun | SampleRun) -> list[tuple[str, RewardPart]]:
    """The parts of the reward and the metrics of the held-out sets, by their dotted names."""
    found = [(f"rewards.{index}", part) for index, part in enumerate(run.rewards)]
    sets = run.eval.sets if isinstance(run, PpoRun) and run.eval is not None else ()
    for number, held_out in enumerate(sets):
        found += [(f"eval.sets.{number}.metrics.{index}", part) for index, part in enumerate(held_out.metrics)]
    return found


def distinct_names(kinds: Sequence[str]) -> list[str]:
    """A name for each reward part of a configuration: its kind, numbered from the second of a kind on (`model`, `model_2`)."""
    names: list[str] = []
    for i, kind in enumerate(kinds):
        earlier = list(kinds[:i]).count(kind)
        names.append(f"{kind}_{earlier + 1}" if earlier else kind)
    return names


def split_function(name: str) -> tuple[str, str]:
    """The module or file, and the function, of `module:function`."""
    place, _, function = name.rpartition(":")
    return place, function


def seconds(part: RewardPart) -> float:
    """The part's time limit: its own, or its kind's."""
    return part.timeout_s if part.timeout_s is not None else DEFAULT_TIMEOUT_S[part.kind]


def patience_s(run: PpoRun | SampleRun) -> float:
    """Seconds that a run's own limits leave its slowest scorer for a step's scores; 0 where none waits for others."""
    limits = {"http": seconds, "function": seconds, "code": lambda part: 0.9 * run.parallel.timeout_s}
    own = [limits[part.kind](part) for part in run.rewards if part.kind in limits]
    return max([*own, *([HOOK_TIMEOUT_S] if run.reward_hook is not None else [])], default=0.0)


def url_fault(url: str, hosts: tuple[str, ...]) -> str:
    """What is wrong with the address of a reward server, or "": http and https, no credentials in it, a host on the list."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        return f"expected an address such as http://127.0.0.1:5000/score ({error})"
    if parts.scheme not in ("http", "https") or not host:
        return "expected an address that starts with http:// or https://"
    if parts.username is not None or parts.password is not None:
        return "expected no user or password in an address: put a token into token_file or MEGARL_REWARD_TOKEN"
    if host not in (*LOOPBACK, *hosts):
        return f"expected a host of this machine ({', '.join(LOOPBACK)}) or one listed in hosts: add {host} there if it is meant"
    return ""


def _wrong_knobs(key: str, part: RewardPart) -> Iterator[Fault]:
    needed, allowed = KNOBS[part.kind]
    for name in needed:
        if not getattr(part, name):
            yield Fault((f"{key}.{name}",), f"{key}.{name}: missing; expected {MEANING[name]} for kind {part.kind}")
    for name, field in RewardPart.model_fields.items():
        value = getattr(part, name)
        if name in ("kind", "weight", *needed, *allowed) or value == field.default:
            continue
        kinds = " or ".join(kind for kind, knobs in KNOBS.items() if name in knobs[0] + knobs[1])
        text = f"{key}.{name}: found {_plain(value)!r} with kind {part.kind}; expected no {name}, or kind: {kinds}"
        yield Fault((f"{key}.{name}", f"{key}.kind"), text)


def _wrong_values(key: str, part: RewardPart, run: PpoRun | SampleRun) -> Iterator[Fault]:
    if part.kind == "regex" and part.pattern:
        try:
            re.compile(part.pattern, re.DOTALL)
        except re.error as error:
            yield Fault((f"{key}.pattern",), f"{key}.pattern: found {part.pattern!r}; expected a regular expression of Python: {error}")
    if part.kind == "length" and part.target is not None and part.target >= run.rollout.max_response_tokens:
        limit = run.rollout.max_response_tokens
        text = f"{key}.target: found {part.target}; expected less than rollout.max_response_tokens {limit}, where the score is -1"
        yield Fault((f"{key}.target", "rollout.max_response_tokens"), text)
    if part.kind == "function" and part.function and not _is_function(part.function):
        yield Fault((f"{key}.function",), f"{key}.function: found {part.function!r}; expected {MEANING['function']}")
    if part.kind == "http":
        for index, url in enumerate(part.urls):
            if fault := url_fault(url, part.hosts):
                yield Fault((f"{key}.urls.{index}", f"{key}.hosts"), f"{key}.urls.{index}: found {_without_user(url)!r}; {fault}")
    if part.kind in DEFAULT_TIMEOUT_S and seconds(part) >= 0.9 * run.parallel.timeout_s:
        limit = run.parallel.timeout_s
        text = (
            f"{key}.timeout_s: found {seconds(part):g}; expected less than nine tenths of parallel.timeout_s {limit}: the other ranks wait"
        )
        yield Fault((f"{key}.timeout_s", "parallel.timeout_s"), text)


def _is_function(name: str) -> bool:
    place, function = split_function(name)
    is_file = place.endswith(".py")
    return function.isidentifier() and (is_file or all(part.isidentifier() for part in place.split(".")))


def _missing_file(key: str, name: str) -> Iterator[Fault]:
    place, _ = split_function(name)
    if place.endswith(".py") and not Path(place).is_file():
        yield Fault((key,), f"{key}: {place} is no file; expected the Python file of the function")


def _without_user(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//...@", url)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
