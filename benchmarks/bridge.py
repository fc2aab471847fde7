"""The way of the weights from trainer to sampler: plans for large simulated clusters, and real transfers on this machine.

`python -m benchmarks.bridge [--layouts] [--live] [--quick] [--json PATH]`; both without a choice.

`--layouts`: `bytes_over_bound` compares what ranks receive with what they lack, counted without the planner. `critical_over_bound` adds
up, round after round, what the busiest rank sends or receives, over what no plan can beat; `seconds_at_45gb_s` is that sum at 45 GB/s
for every byte, those inside a node as well: a prediction without latency, packing and unpacking. Planning is timed in seconds of CPU.
The second table holds what other projects publish, on other machines and with other models.
"""

from collections.abc import Mapping
from typing import Any

from benchmarks import bridge_layouts
from benchmarks.table import main


def measure(quick: bool, layouts: bool, live: bool) -> Mapping[str, Any]:
    """The rows of the chosen halves."""
    result: dict[str, Any] = {}
    if layouts or not live:
        rows = bridge_layouts.layouts(quick)
        result |= {"layouts": rows, "published by others": list(bridge_layouts.PEERS)}
        result |= {name: max(row[name] for row in rows) for name in ("bytes_over_bound", "critical_over_bound", "plan_cpu_s")}
    if live or not layouts:
        from benchmarks import bridge_live  # imports the tests' models and ranks, which planning does without

        result["live"] = bridge_live.live(quick)
    return result


if __name__ == "__main__":
    flag = {"action": "store_true"}
    halves = {"layouts": flag | {"help": "simulated clusters only"}, "live": flag | {"help": "real transfers only"}}
    main("bridge", __doc__.splitlines()[0], measure, halves)
