"""How far every layout is from one process: `python -m benchmarks.invariance [--quick] [--json PATH]`. Largest relative differences.

--quick takes the short list of layouts (tests/multi_rank/invariance/layouts.py), else the long one is computed, on up to eight ranks.
"""

from collections.abc import Mapping
from typing import Any

from benchmarks import table
from tests.multi_rank.invariance.compare import TOLERANCES, compared, faults
from tests.multi_rank.invariance.layouts import CI, FOUR, NIGHTLY

QUANTITIES = ("log-probs", "entropy", "values", "scores", "advantages", "returns", "loss", "gradient norm", "gradient", "weights", "update")


def measure(quick: bool) -> Mapping[str, Any]:
    rows, too_large = [], []
    for layout, largest in compared(CI + FOUR if quick else NIGHTLY, timeout_s=3600):
        rows.append({"layout": str(layout), **{name: f"{largest[name].size:.1e}" for name in QUANTITIES}})
        too_large += faults(layout, largest)
    largest = {name: max(float(row[name]) for row in rows) for name in QUANTITIES}
    rows.append({"layout": "largest", **{name: f"{size:.1e}" for name, size in largest.items()}})
    return {"layouts": rows, "num_layouts": len(rows) - 1, "too_large": "; ".join(too_large) or "nothing", "tolerances": TOLERANCES}


if __name__ == "__main__":
    table.main("invariance", __doc__.split("\n")[0], measure)
