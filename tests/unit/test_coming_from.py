"""The migration tables name keys that exist: a knob of some run, or the start of one."""

import re
from pathlib import Path

from megarl.config_file import RUNS
from megarl.knobs import generic, knobs

TABLES = Path(__file__).parents[2] / "docs" / "coming_from.md"
SYSTEMS = ("OpenRLHF", "DeepSpeed-Chat", "trlx", "ColossalChat", "LLaMA-Factory", "TRL", "verl")
SECTIONS = {name for run_type in RUNS.values() for name in knobs(run_type)}


def cells() -> list[tuple[str, str]]:
    """(our cell, remark) of every row."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in TABLES.read_text().splitlines() if line.startswith("| ")]
    return [(row[1], row[2]) for row in rows if row[0] != "theirs"]


def keys(text: str) -> set[str]:
    """Dotted names in backticks, without the value after a colon."""
    quoted = [word.split(":")[0].strip() for word in re.findall(r"`([^`]+)`", text)]
    return {word for word in quoted if re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+", word) and not word.endswith((".md", ".jsonl", ".sh", ".py"))}


def test_every_system_has_a_table_and_every_row_an_answer():
    text = TABLES.read_text()
    assert all(f"\n## {system}\n" in text for system in SYSTEMS)
    assert len(cells()) > 150 and all(ours for ours, _ in cells())


def test_every_key_exists():
    named = set().union(*(keys(cell) for row in cells() for cell in row))
    assert len(named) > 60
    assert not [name for name in named if generic(name) not in SECTIONS]
