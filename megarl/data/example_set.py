"""What all sets of examples share: files are read once, rows become examples, too long ones follow the policy, a mixture deals them out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from megarl.config import Dataset, DataSource, LessonData
from megarl.data.fields import LineFault
from megarl.data.layouts import Purpose as Use
from megarl.data.layouts import canonical
from megarl.data.order import Mixture, Purpose, contiguous_share, step_share
from megarl.data.packing import Cost
from megarl.data.reading import read_rows
from megarl.data.row_files import Place
from megarl.data.tokenizers import Tokenizer
from megarl.errors import DataError
from megarl.parallel.layout import ParallelLayout

Example = TypeVar("Example")

MAX_LISTED = 5


class ExampleSet(ABC, Generic[Example]):
    """The examples of one file, or of several mixed, in the order of the files.

    `num_malformed` rows could not be read (data.malformed: skip), `num_skipped` and `num_truncated` were too long, `num_filtered` were not
    wanted.
    Raises `DataError` with every malformed row of a file, or the number of over-long rows under the policy `refuse`.
    """

    use: ClassVar[Use]
    order: ClassVar[Purpose]
    unit: ClassVar[str]  # what a row is, in words
    limit_key: ClassVar[str] = "max_tokens"
    policies: ClassVar[str] = "skip or truncate"

    def __init__(self, config: Dataset, files: Sequence[DataSource], tokenizer: Tokenizer):
        self.num_malformed = self.num_skipped = self.num_truncated = self.num_filtered = 0
        self._config, self._files, self._tokenizer = config, tuple(files), tokenizer
        self._limit: int = getattr(config, self.limit_key)
        self.examples: list[Example] = []
        sizes = []
        for source in files:
            before = len(self.examples)
            self._read(source)
            sizes.append(len(self.examples) - before)
        weights = tuple(source.weight for source in files if source.weight is not None)
        self.mixture = Mixture(tuple(sizes), weights or None)

    def __len__(self) -> int:
        return len(self.examples)

    def notices(self) -> list[str]:
        """One sentence for each way in which rows of the files were left out or cut."""
        limit = f"longer than data.{self.limit_key}={self._limit}"
        counts = {
            "malformed rows skipped": self.num_malformed,
            f"rows {limit} skipped": self.num_skipped,
            f"rows {limit} cut": self.num_truncated,
            "rows left out by their pass_rate": self.num_filtered,
        }
        names = ", ".join(str(source.path) for source in self._files)
        return [f"{names}: {count} {what}" for what, count in counts.items() if count]

    @abstractmethod
    def parse(self, row: dict[str, Any], source: DataSource) -> Example | None:
        """A row in the form of `canonical` as an example, None where it is not wanted. Raises `LineFault`."""

    @abstractmethod
    def lengths(self, example: Example) -> list[int]:
        """Tokens of every sequence of an example; the longest counts."""

    @abstractmethod
    def cut(self, example: Example, limit: int) -> Example | None:
        """The example with sequences of at most `limit` tokens, None where a cut leaves nothing to learn."""

    def numbered(self, example: Example, number: int) -> Example:
        """The example, told which one of the set it is."""
        return example

    def example_of(self, row: dict[str, Any], source: DataSource) -> Example | None:
        """A row of any layout as an example, None where it is not wanted. Raises `LineFault`."""
        try:
            return self.parse(canonical(row, source.format, source.columns, self.use, self._config.chat_template), source)
        except RecursionError as error:
            raise LineFault("nested too deeply") from error

    def _read(self, source: DataSource) -> None:
        overlong: list[Place] = []

        def take(place: Place, row: dict[str, Any]) -> Example | None:
            example = self.example_of(row, source)
            if example is None:
                self.num_filtered += 1
            elif max(self.lengths(example)) > self._limit:
                overlong.append(place)
                return self._fitted(example)
            return example

        rows = read_rows(source.path, take, source.split, self._config.malformed)
        if overlong and self._config.overlong == "refuse":
            raise DataError(self._overlong(source.path, overlong))
        kept = [example for example in rows.rows if example is not None]
        if not kept:
            why = "and the bounds of data.min_pass_rate and data.max_pass_rate" if self.num_filtered else ""
            raise DataError(f"{source.path}: no {self.unit} fits data.{self.limit_key}={self._limit} {why}; raise it".replace(" ;", ";"))
        self.num_malformed += len(rows.faults)
        for example in kept:
            self.examples.append(self.numbered(example, len(self.examples)))

    def _fitted(self, example: Example) -> Example | None:
        fitted = None if self._config.overlong == "skip" else self.cut(example, self._limit)
        if fitted is None:
            self.num_skipped += 1
        else:
            self.num_truncated += 1
        return fitted

    def _overlong(self, path: Path, places: list[Place]) -> str:
        """One line: how many rows exceed the limit, the first of them, and the two ways out."""
        some = ", ".join(str(place.number) for place in places[:MAX_LISTED]) + (", ..." if len(places) > MAX_LISTED else "")
        what, key = "lines" if places[0].is_line else "rows", f"data.{self.limit_key}"
        limit = f"{key}={self._limit} tokens ({what} {some})"
        return f"{path}: {len(places)} {what} longer than {limit}; raise {key} or set data.overlong to {self.policies}"


class LessonSet(ExampleSet[Example]):
    """Examples of a supervised lesson."""

    def __init__(self, config: LessonData, tokenizer: Tokenizer, is_eval: bool = False):
        if is_eval and config.eval_path is None:
            raise ValueError("an evaluation set needs data.eval_path")
        data = config.for_file(config.eval_path) if is_eval else config
        super().__init__(data, data.files(), tokenizer)

    def for_step(self, step: int, batch_size: int, seed: int, layout: ParallelLayout, cost: Cost | None = None) -> list[Example]:
        """This data rank's part of the global batch of step `step`, a function of (seed, position): equally many rows, or equal `cost`."""
        rows = [self.examples[i] for i in self.mixture.rows_at(step * batch_size, batch_size, seed, self.order)]
        lengths = [self.lengths(row) for row in rows]
        width = max(map(len, lengths))
        return [rows[i] for i in step_share([[*row, *[0] * (width - len(row))] for row in lengths], layout, "train.batch_size", cost)]

    def shard(self, layout: ParallelLayout) -> list[Example]:
        """This data rank's part of all files in their order, for evaluation; sizes differ by at most one."""
        return self.examples[contiguous_share(len(self), layout)]
