"""R4: killed at a random byte of a save or before any system call of it, a run goes on from the previous checkpoint or the new one."""

import random
import signal
from pathlib import Path

import pytest

from tests.course.lesson_files import write_files
from tests.faults.workshop import Trap, forked, in_workshop, make_bench


def kill_and_restore(root: Path, background: str, num_bytes: int, every_call: int, seed: int) -> dict:
    """Kill `num_bytes` saves at random bytes and one before every `every_call`-th system call; tells what was restored after each."""
    bench, rng = make_bench(root, background=background), random.Random(seed)

    def measure() -> list:
        state = bench.save(bench.restore())
        trap = Trap()
        bench.save(state)
        return [trap.num_bytes, trap.calls]

    def die(trap: dict) -> None:
        state = bench.save(bench.restore())
        Trap(**trap)
        bench.save(state)

    def look() -> list:
        state = bench.restore()
        return [state.step, bench.filled_with(), bench.names()]

    status, measured = forked(measure)
    assert status == 0, measured
    total, calls = measured
    traps = [{"at_byte": rng.randrange(total)} for _ in range(num_bytes)]
    traps += [{"at_call": number} for number in range(1, len(calls) + 1, every_call)]
    rng.shuffle(traps)
    step, wrong, outcomes = 2, [], {"previous": 0, "new": 0}
    for trap in traps:
        status, _ = forked(lambda trap=trap: die(trap))
        seen, found = forked(look)
        if status != -signal.SIGKILL or seen != 0:
            wrong.append([trap, status, found])
            break
        restored, numbers, names = found
        left = [name for name in names if name.startswith((".staging", ".trash", "damaged"))]
        if restored not in (step + 1, step + 2) or numbers != [float(restored)] or left:
            wrong.append([trap, step, found])
        outcomes["new" if restored == step + 2 else "previous"] += 1
        step = restored
    return {"killed": len(traps), "wrong": wrong, "outcomes": outcomes, "bytes": total, "calls": calls}


def check(result: dict, killed: int) -> None:
    print(
        f"R4: {result['killed']} kills, {len(result['wrong'])} wrong, {result['outcomes']}; a save is {result['bytes']} bytes,"
        f" {len(result['calls'])} system calls"
    )
    assert result["wrong"] == [] and result["killed"] >= killed
    assert min(result["outcomes"].values()) > 0, "kills before and after the rename"
    assert {"fsync", "rename", "replace", "mkdir"} <= set(result["calls"])


@pytest.mark.parametrize("background", ["off", "wait"])
def test_some_kills_during_save(tmp_path, background):
    check(in_workshop(kill_and_restore, write_files(tmp_path), background, 6, 8, 0), 10)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("background", ["off", "wait"])
def test_two_hundred_kills_and_one_before_every_system_call(tmp_path, background):
    check(in_workshop(kill_and_restore, write_files(tmp_path), background, 200, 1, 1), 200)
