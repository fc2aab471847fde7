"""What a file of rows holds, as a run would read it: counts, lengths, examples with what is learned marked, every malformed row."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from megarl.config import DataSource, LessonData, PromptData
from megarl.data.demonstrations import DemonstrationSet
from megarl.data.example_set import ExampleSet
from megarl.data.fields import LineFault
from megarl.data.layouts import Purpose, recognised
from megarl.data.preferences import PreferenceSet
from megarl.data.prompts import PromptSet
from megarl.data.rankings import RankingSet
from megarl.data.row_files import scan
from megarl.data.tokenizers import Message, Tokenizer
from megarl.errors import DataError

SETS: dict[Purpose, type[ExampleSet]] = {
    "prompt": PromptSet,
    "demonstration": DemonstrationSet,
    "preference": PreferenceSet,
    "ranking": RankingSet,
}
NUM_BINS = 12


class Characters(Tokenizer):
    """A tokenizer whose tokens are characters: shows a file where no tokenizer is named."""

    END = 0x110000

    def __init__(self) -> None:
        self.path = Path("characters")
        self.eos_id = self.pad_id = self.END
        self.bos_id = None
        self.vocab_size = self.END + 1

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in token_ids if i != self.END)

    def spelled(self, token_ids: Sequence[int]) -> str:
        return "".join("<end>" if i == self.END else chr(i) for i in token_ids)

    def render_chat(self, messages: list[Message], add_generation_prompt: bool) -> list[int]:
        ids = [i for m in messages for i in (*self.encode(f"<{m['role']}>\n{m['content']}"), self.END, ord("\n"))]
        return ids + (self.encode("<assistant>\n") if add_generation_prompt else [])

    def save_for_export(self, directory: Path) -> None:
        raise DataError("characters are no tokenizer that could be exported")


@dataclass(frozen=True)
class Sequences:
    """An example as text: for each of its sequences, stretches of tokens and whether they are learned or compared."""

    place: str
    titles: tuple[str, ...]
    stretches: tuple[tuple[tuple[str, bool], ...], ...]


@dataclass
class Survey:
    """Everything found in some files of rows. `lengths` has the longest sequence of each good row; `overlong` of them exceed the limit."""

    use: Purpose
    num_rows: int = 0
    num_learned: int = 0
    num_filtered: int = 0
    overlong: int = 0
    layouts: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    examples: list[Sequences] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def histogram(self) -> list[tuple[int, int, int]]:
        """Bins of equal width: first length, last length, number of rows."""
        if not self.lengths:
            return []
        low, high = min(self.lengths), max(self.lengths)
        width = max(1, -(-(high - low + 1) // NUM_BINS))
        counts = Counter((length - low) // width for length in self.lengths)
        return [(low + i * width, low + (i + 1) * width - 1, counts[i]) for i in range((high - low) // width + 1)]

    def quantile(self, share: float) -> int:
        """The smallest length that is at least as long as `share` of the rows."""
        return sorted(self.lengths)[max(0, -(-int(share * 1000) * len(self.lengths) // 1000) - 1)]


def survey(
    config: PromptData | LessonData, files: Sequence[DataSource], use: Purpose, tokenizer: Tokenizer, num_examples: int = 3
) -> Survey:
    """Read all rows. Raises `DataError` only where there is no file, or nothing that could be read as rows."""
    nothing = config.model_copy(update={"path": None, "sources": ()})
    reader, found = SETS[use](nothing, tokenizer), Survey(use)
    limit = getattr(config, reader.limit_key)
    for source in files:
        before = found.num_rows
        for item in scan(source.path, source.split):
            found.num_rows += 1
            try:
                if item.row is None:
                    raise LineFault(item.fault)
                layout = recognised(item.row | dict.fromkeys(source.columns)) if source.format == "auto" else source.format
                example = reader.example_of(item.row, source)
                found.layouts[layout] += 1
            except LineFault as fault:
                found.faults.append(f"{item.place}: {fault}")
                continue
            if example is None:
                found.num_filtered += 1
                continue
            length = max(reader.lengths(example))
            found.lengths.append(length)
            found.overlong += length > limit
            marked = _marked(example, use)
            found.num_learned += sum(sum(mask) for _, _, mask in marked)
            if len(found.examples) < num_examples:
                found.examples.append(_shown(str(item.place), marked, tokenizer))
        if found.num_rows == before:
            raise DataError(f"{source.path}: no lines; expected one JSON object a line, or rows of a table")
    return found


def use_of(files: Sequence[DataSource]) -> Purpose:
    """What the first good row of the files is for, by its keys."""
    for source in files:
        for item in scan(source.path, source.split):
            if item.row is not None:
                return _use_of_row(item.row.keys() | source.columns.keys(), item.row)
    return "prompt"


def _use_of_row(keys: set[str], row: dict[str, Any]) -> Purpose:
    if {"responses", "scores"} <= keys:
        return "ranking"
    if "rejected" in keys or isinstance(row.get("output"), list):
        return "preference"
    if keys & {"response", "completion", "output", "conversations", "text"}:
        return "demonstration"
    turns = row.get("messages")
    answered = isinstance(turns, list) and bool(turns) and isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant"
    return "demonstration" if answered else "prompt"


def _marked(example: Any, use: Purpose) -> list[tuple[str, Sequence[int], Sequence[bool]]]:
    """Title, tokens and mask of each sequence of an example."""
    if use == "prompt":
        title = f"prompt (answer: {example.answer})" if example.answer else "prompt"
        return [(title, example.token_ids, (False,) * len(example.token_ids))]
    if use == "demonstration":
        return [("demonstration", example.token_ids, example.loss_mask)]
    if use == "preference":
        named = {"chosen": example.chosen_ids, "rejected": example.rejected_ids}
    else:
        named = {f"response {i + 1}, score {score:g}": ids for i, (ids, score) in enumerate(zip(example.responses, example.scores))}
    start = example.num_prompt_tokens
    return [(title, ids, [i >= start for i in range(len(ids))]) for title, ids in named.items()]


def _shown(place: str, marked: Sequence[tuple[str, Sequence[int], Sequence[bool]]], tokenizer: Tokenizer) -> Sequences:
    stretches = []
    for _, ids, mask in marked:
        runs = groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
        stretches.append(tuple((tokenizer.spelled([i for i, _ in run]), is_learned) for is_learned, run in runs))
    return Sequences(place, tuple(title for title, _, _ in marked), tuple(stretches))
