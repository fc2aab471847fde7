"""Rows of Parquet and Arrow files, through pyarrow, which is imported here alone. Files are read batch by batch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megarl.errors import DataError

ROWS_A_BATCH = 1024


def arrow_rows(path: Path, kind: str) -> Iterator[dict[str, Any]]:
    """The rows of a file of `kind` parquet or arrow. A null is an absent key: every row of a table has all columns.

    Raises `DataError` for a file that is missing, damaged or of another kind.
    """
    try:
        for batch in _parquet(path) if kind == "parquet" else _arrow(path):
            for row in batch.to_pylist():
                yield without_nulls(row)
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: not readable as {kind} ({reason})") from error


def without_nulls(value: Any) -> Any:
    """`value` with all keys gone that hold null, at every depth."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _parquet(path: Path) -> Iterator[pyarrow.RecordBatch]:
    with pyarrow.parquet.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=ROWS_A_BATCH)


def _arrow(path: Path) -> Iterator[pyarrow.RecordBatch]:
    """Batches of a stream, which `datasets` writes, or of a file of random access."""
    with pyarrow.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if not is_file:
            with pyarrow.ipc.open_stream(source) as stream:
                yield from stream
            return
        with pyarrow.ipc.open_file(source) as file:
            for index in range(file.num_record_batches):
                yield file.get_batch(index)
