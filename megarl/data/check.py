"""What is wrong with the datasets of a run, as far as its keys and the names of its files tell."""

from collections.abc import Iterator
from pathlib import Path

from megarl.config import Dataset, LessonData, PpoRun, PromptData, Run, SftRun
from megarl.config_file import Fault
from megarl.data.row_files import files_of, needs_arrow
from megarl.errors import DataError

EXPECTED = "a JSONL, JSON or Parquet file, or a dataset directory"


def datasets(run: Run) -> dict[str, Dataset]:
    """Every section of a run that names files of rows, by its dotted name."""
    found = {"data": run.data}
    if isinstance(run, PpoRun) and run.eval is not None:
        found |= {f"eval.sets.{i}.data": held_out.data for i, held_out in enumerate(run.eval.sets)}
    return found


def data_faults(run: Run) -> Iterator[Fault]:
    """Keys that contradict each other."""
    for name, data in datasets(run).items():
        yield from _files(name, data)
        if data.chat_template and any(source.template for source in data.files()):
            text = f"found with {name}.chat_template true; expected one of them: both say how a prompt is written"
            yield Fault((f"{name}.template", f"{name}.chat_template"), f"{name}.template: {text}")
        if isinstance(data, PromptData) and data.min_pass_rate > data.max_pass_rate:
            text = f"found {data.min_pass_rate:g}; expected at most {name}.max_pass_rate {data.max_pass_rate:g}"
            yield Fault((f"{name}.min_pass_rate", f"{name}.max_pass_rate"), f"{name}.min_pass_rate: {text}")
        if isinstance(data, LessonData) and data.learn != "responses" and not isinstance(run, SftRun):
            yield Fault((f"{name}.learn",), f"{name}.learn: found {data.learn}; expected responses: it is a part of megarl sft")


def missing_files(run: Run) -> Iterator[Fault]:
    """Files that are not there, or whose kind this installation cannot read."""
    named: dict[str, tuple[Path, str | None]] = {}
    for name, data in datasets(run).items():
        if data.path is not None:
            named[f"{name}.path"] = (data.path, data.split)
        else:
            named |= {f"{name}.sources.{i}.path": (source.path, source.split) for i, source in enumerate(data.files())}
    if isinstance(run, PpoRun) and run.eval is not None and run.eval.path is not None:
        named["eval.path"] = (run.eval.path, run.data.split)
    if isinstance(run.data, LessonData) and run.data.eval_path is not None:
        named["data.eval_path"] = (run.data.eval_path, run.data.split)
    for key, (path, split) in named.items():
        if not path.exists():
            yield Fault((key,), f"{key}: {path} does not exist; expected {EXPECTED}")
            continue
        try:
            needs_arrow(files_of(path, split))
        except DataError as error:
            yield Fault((key,), f"{key}: {error}")


def _files(name: str, data: Dataset) -> Iterator[Fault]:
    keys = (f"{name}.path", f"{name}.sources")
    if data.path is None and not data.sources:
        yield Fault(keys, f"{name}.path: missing; expected {EXPECTED}, or {name}.sources")
    if data.path is not None and data.sources:
        yield Fault(keys, f"{name}.path: found with {name}.sources; expected one of them")
    unweighted = [i for i, source in enumerate(data.sources) if source.weight is None]
    if unweighted and len(unweighted) < len(data.sources):
        key = f"{name}.sources.{unweighted[0]}.weight"
        yield Fault((key, f"{name}.sources"), f"{key}: missing; expected a weight for every source, or for none")
