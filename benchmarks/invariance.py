"""How far every layout is from one process: `python -m benchmarks.invariance [--quick] [--ranks N]`. Largest relative differences.

--quick takes the short list of layouts (tests/multi_rank/invariance/layouts.py), else the long one is computed, on up to eight ranks.
A row is a layout, with the largest differences of all families that have it.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks import table
from tests.multi_rank.invariance.compare import TOLERANCES, Difference, compared, faults
from tests.multi_rank.invariance.layouts import CI, DENSE, FOUR, LOCAL, MIXTURES, NIGHTLY, Layout

QUANTITIES = ("log-probs", "entropy", "values", "scores", "advantages", "returns", "loss", "gradient norm", "gradient", "weights", "update")
KINDS = {"dense": DENSE, "local": LOCAL, "mixtures": MIXTURES}
Found = tuple[Layout, Mapping[str, Difference]]


def measure(quick: bool, ranks: int | None) -> Mapping[str, Any]:
    layouts = [layout for layout in (CI + FOUR if quick else NIGHTLY) if ranks in (None, layout.ranks)]
    found = list(compared(layouts, timeout_s=3600))
    return report(found) | {"too_large": "; ".join(line for one in found for line in faults(*one)) or "nothing", "tolerances": TOLERANCES}


def report(found: Iterable[Found]) -> dict[str, Any]:
    """The rows of the table, by ranks; the last one is the largest of all, and `where` says which tensors those are."""
    by_way: dict[tuple[int, str], list[Found]] = {}
    for layout, largest in found:
        by_way.setdefault((layout.ranks, layout.way), []).append((layout, largest))
    rows = []
    for (ranks, way), group in sorted(by_way.items(), key=lambda item: item[0][0]):
        rows.append({"ranks": ranks, "layout": way, "families": _families(layout.family for layout, _ in group), **_largest(group)})
    everything = [one for group in by_way.values() for one in group]
    rows.append({"ranks": "", "layout": "largest", "families": "", **_largest(everything)})
    where = {name: _worst(name, everything) for name in QUANTITIES}
    named = {name: f"{largest[name].tensor} under {layout}" for name, (layout, largest) in where.items()}
    return {"layouts": rows, "num_layouts": len(everything), "where": named}


def _worst(name: str, found: Iterable[Found]) -> Found:
    return max(found, key=lambda one: one[1][name].size)


def _largest(found: list[Found]) -> dict[str, str]:
    return {name: f"{_worst(name, found)[1][name].size:.0e}".replace("e-0", "e-").replace("0e+00", "0") for name in QUANTITIES}


def _families(names: Iterable[str]) -> str:
    """Kinds of families that are there in full, then the others."""
    left, words = list(names), []
    for kind, members in KINDS.items():
        if set(members) <= set(left):
            words.append(kind)
            left = [name for name in left if name not in members]
    return ", ".join([*words, *left])


if __name__ == "__main__":
    options = {"ranks": {"type": int, "help": "only layouts on so many ranks"}}
    table.main("invariance", __doc__.split("\n")[0], measure, options)
