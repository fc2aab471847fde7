"""Where samples wait until all are there: one file of finished lines a data rank, merged into one file in the order of the prompts.

A line counts when it is whole, so a run that was ended in the middle of one goes on with that prompt. Lines of any number of ranks are
understood: a run may go on with another number.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megarl.errors import ConfigError

MERGED, PARTS, SETTINGS = "samples.jsonl", "parts", "settings.json"


class SampleFiles:
    """The files in a run's `output_dir`. `append` is called by one rank of each data-parallel replica, the rest by whoever is named."""

    def __init__(self, output_dir: Path, data_rank: int):
        self.merged = output_dir / MERGED
        self._parts = output_dir / PARTS
        self._own = self._parts / f"rank-{data_rank:05}.jsonl"

    def start(self, settings: dict[str, Any]) -> set[int]:
        """The ids of the prompts whose lines are there; called by one rank before any writes.

        Raises `ConfigError` when the lines were sampled with other `settings`.
        """
        path = self._parts / SETTINGS
        self._parts.mkdir(parents=True, exist_ok=True)
        if path.exists():
            earlier = json.loads(path.read_text(encoding="utf-8"))
            changed = sorted(name for name in earlier.keys() | settings.keys() if earlier.get(name) != settings.get(name))
            if changed:
                raise ConfigError(
                    f"output_dir: {self._parts.parent} holds samples with another {', '.join(changed)}; expected the same settings, or"
                    " another output_dir"
                )
        else:
            _write(path, json.dumps(settings, indent=1) + "\n")
        return set(self._places())

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write finished lines through to the disk."""
        with open(self._own, "ab+") as file:
            if file.tell() and not _ends_a_line(file):  # what an ended run left of a line
                file.write(b"\n")
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())

    def merge(self) -> int:
        """All lines in the order of the prompts as one file, which gets its name when it is whole; their number. Called by one rank."""
        places = self._places()
        staging = self.merged.with_name(f".{MERGED}")
        with open(staging, "wb") as out:
            files = {path: open(path, "rb") for path in {path for path, _ in places.values()}}
            try:
                for prompt_id in sorted(places):
                    path, offset = places[prompt_id]
                    files[path].seek(offset)
                    out.write(files[path].readline())
            finally:
                for file in files.values():
                    file.close()
            out.flush()
            os.fsync(out.fileno())
        os.replace(staging, self.merged)
        return len(places)

    def _places(self) -> dict[int, tuple[Path, int]]:
        """File and offset of each prompt's line; torn lines do not count."""
        return {prompt_id: (path, offset) for path in sorted(self._parts.glob("rank-*.jsonl")) for prompt_id, offset in _lines(path)}


def _lines(path: Path) -> Iterator[tuple[int, int]]:
    with open(path, "rb") as file:
        offset = 0
        for line in file:
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                row = None
            if isinstance(row, dict) and isinstance(row.get("prompt_id"), int):
                yield row["prompt_id"], offset
            offset += len(line)


def _ends_a_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _write(path: Path, text: str) -> None:
    staging = path.with_name(f".{path.name}")
    staging.write_text(text, encoding="utf-8")
    os.replace(staging, path)
