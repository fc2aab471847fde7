"""What every dataset of a run says about its files."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field

from megarl.config.section import Section, UserPath

COLUMNS = (
    *("prompt", "messages", "response", "text", "answer", "pass_rate"),
    *("chosen", "rejected", "margin", "responses", "scores", "score"),
)


def _known_columns(columns: dict[str, str]) -> dict[str, str]:
    if any(name not in COLUMNS or not column for name, column in columns.items()):
        raise ValueError(f"our name: the file's name, such as prompt: question; ours are {', '.join(COLUMNS)}")
    return columns


def _one_place(template: str) -> str:
    if template and template.count("{}") != 1:
        raise ValueError("text with one {} where the prompt goes")
    return template


class Reading(Section):
    """A file, and how its rows are read (docs/data.md)."""

    path: UserPath | None = None  # JSONL, JSON, Parquet, a dataset that Hugging Face's save_to_disk wrote, or a directory of files
    format: Literal["auto", "plain", "openrlhf", "trl", "alpaca", "sharegpt", "hh"] = "auto"  # layout; auto: told by each row's keys
    columns: Annotated[dict[str, str], AfterValidator(_known_columns)] = {}  # our name of a column: the file's
    template: Annotated[str, AfterValidator(_one_place)] = ""  # what stands around a plain prompt, with {} in its place
    split: str | None = None  # of a Hugging Face dataset, or of a directory of files, that has several


class DataSource(Reading):
    """One file or directory of a mixture. What it leaves out it takes from the section around it."""

    path: UserPath
    weight: Annotated[float, Field(gt=0)] | None = None  # its share of what is read; null for all: by their numbers of rows


class Dataset(Reading):
    """Rows of one file, or of several mixed."""

    sources: tuple[DataSource, ...] = ()  # instead of path: several, mixed by weight
    malformed: Literal["refuse", "skip"] = "refuse"  # what happens to a row that cannot be read
    chat_template: bool = False  # render prompts and messages through the tokenizer's template

    def files(self) -> tuple[DataSource, ...]:
        """The sources with nothing left out: one for `path`, or those of `sources`."""
        listed = self.sources if self.path is None else (DataSource(path=self.path),)
        mine = {name: getattr(self, name) for name in Reading.model_fields if name != "path"}
        return tuple(source.model_copy(update={n: v for n, v in mine.items() if n not in source.model_fields_set}) for source in listed)

    def for_file(self, path: Path) -> Self:
        """The same keys and limits for one other file, such as a held-out one, whose rows are all kept."""
        return self.model_copy(update={"path": path, "sources": ()})
