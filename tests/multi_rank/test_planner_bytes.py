"""Plans against two real ranks: what they hold and what they hand to collectives, byte by byte on small models."""

import pytest

from benchmarks.planner import TOLERANCE, memory_rows, message_rows
from benchmarks.planner_runs import RANKS, Case, steps
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

CASES = (
    Case("tiny", {"distributed_optimizer": False}),
    Case("tiny", {"tensor": 2, "sequence": True}, frozen_layers=1),
    Case("tiny", {"pipeline": 2}),
    Case("small", {"context": 2}),
)


@pytest.fixture(scope="module")
def measured() -> list[list[dict]]:
    ranks = run_ranks(steps, RANKS, list(CASES))
    return [[rank[number] for rank in ranks] for number in range(len(CASES))]


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_ranks_hold_and_send_what_the_plan_says(measured, number):
    case, ranks = CASES[number], measured[number]
    messages = list(message_rows(case, ranks))
    assert messages or case.parallel.get("distributed_optimizer") is False
    for row in messages:
        assert row["ratio"] == pytest.approx(1, abs=0.02), row
    for row in memory_rows(case, ranks):
        assert row["resident_ratio"] == pytest.approx(1, abs=0.02), row
        if case.size == "tiny":  # what a process allocates once weighs much beside it
            assert row["ratio"] > 1 - 2 * TOLERANCE, row
        else:
            assert row["ratio"] == pytest.approx(1, abs=TOLERANCE) and row["passes_ratio"] == pytest.approx(1, abs=2 * TOLERANCE), row
