"""Files of rows: JSON lines, a JSON list, Parquet, and what Hugging Face's `save_to_disk` writes; each row with its place.

JSON lines, Parquet and Arrow are read row by row, a JSON list at once. What cannot be a row is found here, what a row means is not.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from megarl.data.fields import LineFault, as_object, parse_object
from megarl.errors import DataError

Kind = Literal["lines", "list", "parquet", "arrow"]
SUFFIXES: dict[str, Kind] = {".jsonl": "lines", ".json": "list", ".parquet": "parquet", ".arrow": "arrow"}
MAGIC_GZIP, MAGIC_PARQUET, MAGIC_ARROW = b"\x1f\x8b", b"PAR1", b"ARROW1"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
BLOCK = 64 * 1024


@dataclass(frozen=True)
class Place:
    """Where a row stands: `number` counts lines of a text file, or rows of another, from 1."""

    path: Path
    number: int
    is_line: bool = True

    def __str__(self) -> str:
        return f"{self.path}:{self.number}" if self.is_line else f"{self.path}: row {self.number}"


@dataclass(frozen=True)
class Found:
    """A row, or why there is none."""

    place: Place
    row: dict[str, Any] | None
    fault: str = ""


@dataclass(frozen=True)
class RowFile:
    """One file and how it is read."""

    path: Path
    kind: Kind


def scan(path: Path, split: str | None = None) -> Iterator[Found]:
    """Every row of a file or directory, in order. Raises `DataError` where there is nothing that could be read as rows."""
    files = files_of(path, split)
    needs_arrow(files)
    for file in files:
        if file.kind == "lines":
            yield from _lines(file.path)
        elif file.kind == "list":
            yield from _list(file.path)
        else:
            from megarl.data.arrow_files import arrow_rows

            for number, row in enumerate(arrow_rows(file.path, file.kind), start=1):
                yield Found(Place(file.path, number, is_line=False), row)


def needs_arrow(files: Sequence[RowFile]) -> None:
    """Raise `DataError` when one of the files needs a package that is not installed."""
    if wanted := [file for file in files if file.kind in ("parquet", "arrow")]:
        if find_spec("pyarrow") is None:
            raise DataError(f"{wanted[0].path}: {wanted[0].kind} files need the package pyarrow; run pip install 'megarl[data]'")


def files_of(path: Path, split: str | None = None) -> list[RowFile]:
    """The files behind a path: itself, the parts of a Hugging Face dataset, or the data files of a directory, sorted by name."""
    if not path.is_dir():
        if split is not None:
            raise DataError(f"{path}: a file has no splits; remove split={split}, or name the directory")
        return [RowFile(path, _kind(path))]
    if (path / "dataset_dict.json").is_file():
        return files_of(path / _chosen(path, split))
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return _saved(path)
    found = sorted(file for file in path.iterdir() if _suffix(file) in SUFFIXES and not file.name.startswith((".", "_")))
    data = [file for file in found if split is None or file.name.startswith(split)]
    if not data:
        what = "a directory without data files" + ("" if split is None else f" whose name starts with {split}")
        raise DataError(f"{path}: cannot be read: {what}; expected *.jsonl, *.json, *.parquet, or a saved dataset")
    if len({_suffix(file) for file in data}) > 1:
        raise DataError(f"{path}: files of several kinds ({data[0].name}, {data[-1].name}); name one of them, or choose by split")
    return [RowFile(file, _kind(file)) for file in data]


def _chosen(path: Path, split: str | None) -> str:
    names = _json(path / "dataset_dict.json").get("splits")
    if not isinstance(names, list) or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise DataError(f"{path / 'dataset_dict.json'}: no list of splits")
    if split is None and len(names) > 1:
        raise DataError(f"{path}: a dataset with the splits {', '.join(names)}; choose one with split, or name its directory")
    if split is not None and split not in names:
        raise DataError(f"{path}: no split {split}; expected one of {', '.join(names)}")
    return split or names[0]


def _saved(path: Path) -> list[RowFile]:
    state = _json(path / "state.json")
    names = [entry.get("filename") for entry in state.get("_data_files") or [] if isinstance(entry, dict)]
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise DataError(f"{path / 'state.json'}: expected the names of the data files beside it")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise DataError(f"{path}: rows are chosen by an index file of an old version of datasets; load and save it with a newer one")
    return [RowFile(path / name, "arrow") for name in names]


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON") from error
    return value if isinstance(value, dict) else {}


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def _kind(path: Path) -> Kind:
    """What a file is by its first bytes; whether it is one JSON list or lines, by its name too."""
    start = _start(path)
    if start.startswith(MAGIC_PARQUET):
        return "parquet"
    if start.startswith(MAGIC_ARROW) or _suffix(path) == ".arrow":
        return "arrow"
    if _suffix(path) == ".parquet":
        raise DataError(f"{path}: not a Parquet file: it does not start with PAR1")
    is_list = _suffix(path) != ".jsonl" and start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    return "list" if is_list else "lines"


def _start(path: Path) -> bytes:
    try:
        with _open(path) as file:
            return file.read(BLOCK)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({_reason(error)}); expected a file of rows") from error


def _open(path: Path) -> Any:
    with open(path, "rb") as file:
        is_gzip = file.read(2) == MAGIC_GZIP
    return gzip.open(path, "rb") if is_gzip else open(path, "rb")


def _lines(path: Path) -> Iterator[Found]:
    if _start(path).startswith(UTF_16):
        raise DataError(f"{path}: UTF-16 text; expected UTF-8: convert it with iconv -f UTF-16 -t UTF-8")
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, start=1):
                place = Place(path, number)
                try:
                    text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                    if text:
                        yield Found(place, parse_object(text))
                except UnicodeDecodeError as error:
                    yield Found(place, None, f"not UTF-8 (byte {error.start + 1} of the line)")
                except LineFault as fault:
                    yield Found(place, None, str(fault))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({_reason(error)}); expected a file of rows") from error


def _list(path: Path) -> Iterator[Found]:
    try:
        with _open(path) as file:
            text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start + 1})") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({_reason(error)}); expected a file of rows") from error
    decoder, at, line = json.JSONDecoder(), text.index("[") + 1, text.count("\n", 0, text.index("[")) + 1
    separator = ""
    while True:
        start = _skip(text, at)
        line += text.count("\n", at, start)
        if text[start : start + 1] == "]" and separator != ",":
            if text[start + 1 :].strip():
                yield Found(Place(path, line), None, "not JSON: something follows the list")
            return
        try:
            value, end = decoder.raw_decode(text, start)
        except (json.JSONDecodeError, RecursionError) as error:
            yield Found(Place(path, line), None, f"not JSON: {getattr(error, 'msg', 'nested too deeply')}; the list is not read further")
            return
        try:
            yield Found(Place(path, line), as_object(value))
        except LineFault as fault:
            yield Found(Place(path, line), None, str(fault))
        at = _skip(text, end)
        line += text.count("\n", start, at)
        separator = text[at : at + 1]
        if separator == ",":
            at += 1
        elif separator != "]":
            yield Found(Place(path, line), None, "not JSON: expected ',' or ']'; the list is not read further")
            return


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
