"""The exact verifier: 1 when the response is the answer, else 0."""

import re
from collections.abc import Sequence

from megarl.records import Completion, Prompt

PLAIN_NUMBER = re.compile(r"([+-]?)([0-9]+)(?:\.([0-9]*))?")
GROUPED = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?")


class ExactAnswer:
    """Compares the response with `Prompt.answer` after `normalise`. A response cut by the length limit earns 0: it had not ended."""

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion], texts: Sequence[str]) -> list[float]:
        return [
            float(completion.finish_reason == "stop" and normalise(text) == normalise(prompt.answer))
            for prompt, completion, text in zip(prompts, completions, texts, strict=True)
        ]


def normalise(text: str) -> str:
    """The form in which answers are compared: whitespace collapsed, letters folded, numbers in their shortest plain form."""
    folded = " ".join(text.split()).casefold()
    number = PLAIN_NUMBER.fullmatch(folded.replace(",", "") if GROUPED.fullmatch(folded) else folded)
    if number is None:
        return folded
    sign, whole, fraction = number.group(1), number.group(2).lstrip("0") or "0", (number.group(3) or "").rstrip("0")
    value = whole + (f".{fraction}" if fraction else "")
    return f"-{value}" if sign == "-" and value != "0" else value
