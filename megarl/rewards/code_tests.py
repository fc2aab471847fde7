"""Programs judged by tests: 1 when the response's code passes all of them in the sandbox, else 0."""

import json
import os
import re
import secrets
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from megarl.errors import RewardError
from megarl.records import Completion, Prompt
from megarl.rewards.sandbox import Sandbox
from megarl.rewards.scorer import prompt_ids

FENCE = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
MOST_AT_ONCE = 32

# Runs the code, then the tests in its namespace, then prints the word that says so: an early sys.exit(0) does not print it.
HARNESS = """\
import os, sys
word = sys.stdin.readline().strip()
verdict = os.dup(1)
null = os.open("/dev/null", os.O_RDWR)
os.dup2(null, 0), os.dup2(null, 1), os.dup2(null, 2)
with open("solution.py") as file: solution = file.read()
with open("tests.py") as file: tests = file.read()
os.unlink("tests.py"), os.unlink("main.py")
space = {"__name__": "solution"}
exec(compile(solution, "solution.py", "exec"), space)
exec(compile(tests, "tests.py", "exec"), space)
os.write(verdict, word.encode())
"""


class CodeTests:
    """Judges by `Prompt.answer`: either Python statements to run after the code (asserts), or JSON {"inputs": [...], "outputs": [...]},
    texts for stdin and what must be printed for each, compared line by line without white space at their ends.

    The code is the last fenced block of the response, or all of it without one. A response cut by the length limit earns 0. With asserts
    the code shares a process with its tests and could in principle forge their success; with inputs and outputs it cannot.
    Raises `RewardError` naming the prompt for tests that cannot be read, when the sandbox fails, or when all took longer than `patience_s`.
    """

    def __init__(self, sandbox: Sandbox, patience_s: float):
        self.sandbox, self.patience_s = sandbox, patience_s

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion], texts: Sequence[str]) -> list[float]:
        deadline = time.monotonic() + self.patience_s

        def judge(prompt: Prompt, completion: Completion, text: str) -> float:
            tests = read_tests(prompt)
            code = code_of(text)
            if completion.finish_reason != "stop" or not code.strip():
                return 0.0
            if time.monotonic() > deadline:
                words = f"the tests of {prompt_ids(completions)} took more than {self.patience_s:g} s in all"
                raise RewardError(f"reward code: {words}; expected a smaller timeout_s or fewer responses a step")
            try:
                return float(self._passes(code, tests))
            except RewardError as error:
                raise RewardError(f"reward code: the sandbox failed for prompt {prompt.prompt_id}: {error}") from None

        with ThreadPoolExecutor(min(MOST_AT_ONCE, len(os.sched_getaffinity(0)))) as pool:
            pieces = [pool.submit(judge, *row) for row in zip(prompts, completions, texts, strict=True)]
            try:
                return [piece.result() for piece in pieces]
            finally:
                for piece in pieces:
                    piece.cancel()

    def _passes(self, code: str, tests: str | list[tuple[str, str]]) -> bool:
        command = [sys.executable, "-I", "main.py"]
        if isinstance(tests, str):
            word = secrets.token_hex(16)
            files = {"main.py": HARNESS, "solution.py": code, "tests.py": tests}
            ending = self.sandbox.run(command, files, word + "\n")
            return ending.code == 0 and ending.output == word.encode()
        for given, expected in tests:
            ending = self.sandbox.run(command, {"main.py": code}, given)
            if ending.code != 0 or _lines(ending.output.decode(errors="replace")) != _lines(expected):
                return False
        return True


def code_of(text: str) -> str:
    """The last fenced block; all of the text when no fence opens; nothing when one opens and never closes."""
    blocks = FENCE.findall(text)
    return blocks[-1] if blocks else "" if "```" in text else text


def read_tests(prompt: Prompt) -> str | list[tuple[str, str]]:
    """The tests in `prompt.answer`: Python statements, or (stdin, stdout) pairs. Raises `RewardError` naming the prompt."""
    where = f"reward code: the tests of prompt {prompt.prompt_id}"
    try:
        found = json.loads(prompt.answer)
    except ValueError:
        try:
            compile(prompt.answer, "tests", "exec")
        except (SyntaxError, ValueError) as error:
            raise RewardError(f"{where} are neither JSON nor Python: {error}; expected asserts or inputs and outputs") from None
        return prompt.answer
    pairs = (found.get("inputs"), found.get("outputs")) if isinstance(found, dict) else (None, None)
    is_right = all(isinstance(side, list) and side and all(isinstance(text, str) for text in side) for side in pairs)
    if not is_right or len(pairs[0]) != len(pairs[1]):
        raise RewardError(f'{where} are {prompt.answer[:60]!r}; expected {{"inputs": [text, ...], "outputs": [text, ...]}} of equal length')
    return list(zip(*pairs))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
