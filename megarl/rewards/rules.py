"""Verifiers and shaping terms that read the response alone or compare it with `Prompt.answer`. Pure and cheap: every rank runs them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from megarl.records import Completion, Prompt

NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3})?|[-+]?\.\d+(?:[eE][-+]?\d{1,3})?")


@dataclass(frozen=True)
class NumericAnswer:
    """1 when the last number of the response is the answer's last number, up to `tolerance` times the answer's size (at least 1), else 0.

    A response cut by the length limit earns 0: it had not ended. GSM8K's `#### 42` and thousands with commas are read.
    """

    tolerance: float = 1e-6

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion], texts: Sequence[str]) -> list[float]:
        return [
            float(completion.finish_reason == "stop" and self._is_same(last_number(text), last_number(prompt.answer)))
            for prompt, completion, text in zip(prompts, completions, texts, strict=True)
        ]

    def _is_same(self, found: Decimal | None, expected: Decimal | None) -> bool:
        if found is None or expected is None:
            return False
        return abs(found - expected) <= Decimal(self.tolerance) * max(Decimal(1), abs(expected))


@dataclass(frozen=True)
class Pattern:
    """1 when the whole response matches the regular expression (`re.fullmatch`, the dot matching newlines), else 0."""

    pattern: re.Pattern[str]

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion], texts: Sequence[str]) -> list[float]:
        return [float(self.pattern.fullmatch(text) is not None) for text in texts]


@dataclass(frozen=True)
class Length:
    """0 up to `target` response tokens, then falling in a line to -1 at `limit` (the soft over-long punishment of DAPO, equation 13)."""

    target: int
    limit: int

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion], texts: Sequence[str]) -> list[float]:
        excess = [max(0, len(completion.token_ids) - self.target) for completion in completions]
        return [-min(1.0, tokens / (self.limit - self.target)) for tokens in excess]


@dataclass(frozen=True)
class Repetition:
    """Minus the share of the response's n-grams of tokens that occurred in it before: 0 without repetition, near -1 in a loop."""

    ngram: int

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion], texts: Sequence[str]) -> list[float]:
        return [-self._repeated(completion.token_ids) for completion in completions]

    def _repeated(self, tokens: Sequence[int]) -> float:
        grams = [tuple(tokens[i : i + self.ngram]) for i in range(len(tokens) - self.ngram + 1)]
        return 1 - len(set(grams)) / len(grams) if grams else 0.0


def last_number(text: str) -> Decimal | None:
    """The last number written in `text`; a minus after a digit or letter is a hyphen or a subtraction, no sign."""
    numbers = list(NUMBER.finditer(text))
    if not numbers:
        return None
    found = numbers[-1]
    digits, start = found[0].replace(",", ""), found.start()
    if digits[0] in "+-" and start > 0 and (text[start - 1].isalnum() or text[start - 1] == ")"):
        digits = digits[1:]
    try:
        return Decimal(digits)
    except InvalidOperation:
        return None
