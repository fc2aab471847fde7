"""The mathematical verifier: math-verify finds the answer in the response and decides whether it equals the one of the data.

Its symbolic algebra can run for ever on what a model writes, so it works in a process that is ended when its time is over.
"""

import json
import select
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from megarl.errors import RewardError, SetupError
from megarl.records import Completion, Prompt

WORKER = Path(__file__).with_name("math_worker.py")
START_S = 120.0  # the worker imports sympy, perhaps from a slow disk


class MathAnswer:
    """1 when the response's final answer (the last \\boxed{}, else the last expression) equals `Prompt.answer`, else 0.

    A response cut by the length limit earns 0: it had not ended. So does one that cannot be decided within `timeout_s`, which is said on
    stderr with its prompt. Raises `SetupError` without math-verify, `RewardError` for an answer that cannot be read, naming its prompt.
    """

    def __init__(self, timeout_s: float):
        if find_spec("math_verify") is None:
            raise SetupError("reward math needs the package math-verify, which is not installed here; run pip install 'megarl[math]'")
        self.timeout_s = timeout_s
        self.undecided = 0
        self._worker: subprocess.Popen | None = None

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion], texts: Sequence[str]) -> list[float]:
        return [
            self._score(prompt, text) if completion.finish_reason == "stop" else 0.0
            for prompt, completion, text in zip(prompts, completions, texts, strict=True)
        ]

    def close(self) -> None:
        """End the worker, if there is one."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.wait()
            self._worker.stdin.close()
            self._worker.stdout.close()
            self._worker = None

    def _score(self, prompt: Prompt, text: str) -> float:
        if self._worker is None:
            self._worker = self._start()
        try:
            self._worker.stdin.write(json.dumps({"answer": prompt.answer, "response": text}) + "\n")
            self._worker.stdin.flush()
            reply = self._line(self.timeout_s)
        except BrokenPipeError:
            reply = ""
        if not reply:  # it hangs, or ran out of memory or of stack: the next response gets a new one
            self.close()
            self.undecided += 1
            words = f"a response to prompt {prompt.prompt_id} ({text[-60:]!r}) could not be decided within {self.timeout_s:g} s"
            print(f"megarl: warning: reward math: {words} and earned 0; {self.undecided} so far", file=sys.stderr)
            return 0.0
        is_same = json.loads(reply)
        if is_same is None:
            raise RewardError(
                f"reward math: the answer {prompt.answer[:60]!r} of prompt {prompt.prompt_id} holds no mathematical expression"
            )
        return float(is_same)

    def _start(self) -> subprocess.Popen:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._worker = subprocess.Popen([sys.executable, "-I", str(WORKER)], text=True, encoding="utf-8", bufsize=1, **pipes)
        if self._line(START_S).strip() != "ready":
            self.close()
            raise RewardError(f"reward math: its worker did not start; run {sys.executable} -I {WORKER} to see why")
        return self._worker

    def _line(self, timeout_s: float) -> str:
        """The worker's next line, "" when it ends or the time does. It writes one whole short line at a time."""
        ready, _, _ = select.select([self._worker.stdout], [], [], timeout_s)
        return self._worker.stdout.readline() if ready else ""
