"""The memory of import and export does not grow with the model."""

from pathlib import Path

import pytest

from benchmarks.checkpoint_export import measure


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark of memory")
def test_memory_is_that_of_a_block_whatever_the_size():
    result = measure(quick=True)
    rows = result["Conversion against the size of the model"]
    for what in ("import", "export"):
        mine = [row for row in rows if row["conversion"] == what]
        growth, peaks = mine[-1]["model MiB"] - mine[0]["model MiB"], [row["peak MiB"] for row in mine]
        assert growth > 150, "the largest is several times the smallest"
        assert max(peaks) < 100 and peaks[-1] - peaks[0] < 0.15 * growth, (what, mine)
        assert result[f"{what}: bytes of memory for each byte of the model"] < 0.15, mine
