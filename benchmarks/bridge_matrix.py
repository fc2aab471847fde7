"""The pairs of layouts that the bridge is tested on: `python -m benchmarks.bridge_matrix [--quick] [--json PATH]`. Largest differences.

--quick takes the pairs of every test run (tests/rollout/pairs.py), else all are computed, on up to eight ranks. The differences are those
of log-probabilities (nats): to transformers over greedy tokens, and to the trainer's own forward pass over sampled ones. `bits` counts
the tensors of vLLM's state, on all ranks, that equal those of a fresh engine bit for bit.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import table
from tests.rollout.pairs import PAIRS, Pair
from tests.rollout.test_matrix import checked, faults


def measure(quick: bool) -> Mapping[str, Any]:
    rows, wrong = [], []
    with tempfile.TemporaryDirectory(prefix="megarl-matrix-") as folder:
        for pair, reports in checked(Path(folder), [pair for pair in PAIRS if pair.is_quick or not quick], timeout_s=3600):
            rows.append(row(pair, reports))
            wrong += [f"{pair}: {fault}" for fault in faults(pair, reports)]
    exact = [row for row in rows if "bf16" not in row["model"]]
    return {
        "pairs": rows,
        "num_pairs": len(rows),
        "largest_to_transformers_fp32": max(float(row["to transformers"]) for row in exact),
        "largest_to_trainer_fp32": max(float(row["to trainer"]) for row in exact),
        "wrong": "; ".join(wrong) or "nothing",
    }


def row(pair: Pair, reports: list[dict]) -> dict[str, Any]:
    """A pair as a line of the table."""
    same = sum(report["num_state"] - len(report["differing_state"]) for report in reports)
    greedy = [worst for report in reports for worst, _ in report["greedy"]]
    received = sum(report["received_bytes"] for report in reports)
    return {
        "model": pair.model,
        "ranks": pair.ranks,
        "trainer": pair.trainer,
        "sampler": pair.sampler,
        "to transformers": f"{max(greedy):.0e}",
        "to trainer": f"{max(report['trainer'] for report in reports):.0e}",
        "received": f"{received / sum(report['target_bytes'] for report in reports):.0%}",
        "bits": f"{same}/{sum(report['num_state'] for report in reports)}",
        "samples": "same" if all(report["same_samples"] for report in reports) else "DIFFER",
    }


if __name__ == "__main__":
    table.main("bridge_matrix", __doc__.split("\n")[0], measure)
