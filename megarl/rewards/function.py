"""Any Python function as a reward or as the hook behind the sum: found by name, called with a time limit.

A name is `package.module:function` or `path/to/file.py:function`. The code is the user's own and runs with the run's rights: name only
functions you trust.
"""

import importlib
import importlib.util
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarl.errors import RewardError, SetupError
from megarl.records import Completion, Prompt
from megarl.rewards.check import split_function
from megarl.rewards.scorer import prompt_ids


@dataclass(frozen=True)
class FunctionScorer:
    """`function(prompts, responses, answers) -> list of numbers`: three lists of str, entry i about one sample, and one number for each.

    `answers` holds "" where the data has none. Raises `RewardError` naming the prompts when the function raises or outlasts `timeout_s`.
    """

    name: str
    function: Callable[..., Any]
    timeout_s: float

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion], texts: Sequence[str]) -> list[float]:
        answers = [prompt.answer for prompt in prompts]
        arguments = ([prompt.text for prompt in prompts], list(texts), answers)
        return as_list(call(f"reward function {self.name}", self.function, arguments, self.timeout_s, completions))


@dataclass(frozen=True)
class FunctionHook:
    """`function(prompts, responses, answers, rewards, parts) -> list of numbers`, called once a step for a data rank's rows.

    `rewards` is the weighted sum of every row; `parts` maps each part's name to its scores before weights. The samples of a prompt follow
    one another. Raises as `FunctionScorer`.
    """

    name: str
    function: Callable[..., Any]
    timeout_s: float

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        texts: Sequence[str],
        rewards: list[float],
        parts: dict[str, list[float]],
    ) -> list[float]:
        lists = {name: list(column) for name, column in parts.items()}
        arguments = ([prompt.text for prompt in prompts], list(texts), [prompt.answer for prompt in prompts], list(rewards), lists)
        return as_list(call(f"reward_hook {self.name}", self.function, arguments, self.timeout_s, completions))


def load_function(name: str, key: str) -> Callable[..., Any]:
    """The function that `name` stands for. Raises `SetupError` naming `key` when its module or itself is not there, or fails to load."""
    place, function = split_function(name)
    try:
        module = _module_of_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # a user's module may raise anything while it loads
        raise SetupError(f"{key}: {place} cannot be imported: {_where(error)}") from error
    found = getattr(module, function, None)
    if not callable(found):
        names = [known for known, value in vars(module).items() if callable(value) and not known.startswith("_")]
        raise SetupError(f"{key}: {place} has no function {function}; expected one of {', '.join(names) or '(it has none)'}")
    return found


def call(who: str, function: Callable[..., Any], arguments: tuple, timeout_s: float, completions: Sequence[Completion]) -> Any:
    """`function(*arguments)`, given up after `timeout_s`; its thread cannot be stopped and is left behind, for the run ends.

    Raises `RewardError` that says what it raised, or which line it was in when the time was over.
    """
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["value"] = function(*arguments)
        except Exception as error:  # a user's function may raise anything
            outcome["error"] = error

    thread = threading.Thread(target=work, daemon=True, name=who)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise RewardError(f"{who} did not return within {timeout_s:g} s ({prompt_ids(completions)}); it is in {_line_of(thread)}")
    if "error" in outcome:
        raise RewardError(f"{who} failed on {prompt_ids(completions)}: {_where(outcome['error'])}") from outcome["error"]
    return outcome["value"]


def as_list(value: Any) -> Any:
    """Arrays and tensors, and lists of scalar ones, as plain lists; all else stays as it is, for `scorer.checked` to name."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(plain, list | tuple):
        return [
            one.item() if hasattr(one, "item") and getattr(one, "size", 1) != 0 and getattr(one, "ndim", 0) == 0 else one for one in plain
        ]
    return plain


def _module_of_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"megarl_user_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _where(error: Exception) -> str:
    """The error with the innermost line it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _line_of(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "an unknown line"
