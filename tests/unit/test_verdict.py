"""Whom a hang is blamed on, when a phase is too long, who straggles: from records alone."""

import json
import os
import time
from types import SimpleNamespace

import pytest

from megarl.operations import watchdog
from megarl.operations.verdict import Limits, Process, stragglers, suspects
from megarl.operations.watchdog import Watch

NOW = 1000.0
LOOP = ["ppo/loop.py:40 train"]


def record(rank, collective="all_reduce", sites=("ppo/loop.py:40 train", "parallel/collectives.py:60 sum_over"), **changes):
    basic = {"rank": rank, "pid": 100 + rank, "host": "n1", "phase": "learn", "step": 7, "since": NOW - 60, "pulse": NOW - 0.2}
    return basic | {"collective": collective, "sites": list(sites), "longest": {"learn": 2.0}} | changes


def found(records, **states):
    processes = {r["rank"]: Process(states.get(f"rank{r['rank']}", "S")) for r in records}
    return suspects(records, processes, NOW)


@pytest.mark.parametrize(
    ("changes", "state", "why"),
    [
        ({}, "T", "stopped by a signal"),
        ({}, "X", "its process is gone"),
        ({"pulse": NOW - 50}, "R", "native code holds the interpreter's lock for 50 s"),
        ({"pulse": NOW - 50}, "D", "a device or file system does not answer"),
        ({"collective": "", "sites": LOOP}, "S", "not in an exchange with other ranks"),
        ({"collective": "", "sites": [*LOOP, "rollout/control.py:70 receive"]}, "S", "waits for its generators"),
    ],
)
def test_the_rank_that_others_wait_for_is_the_only_suspect(changes, state, why):
    (suspect,) = found([record(0), record(1), record(2, **changes), record(3)], rank2=state)
    assert suspect.rank == 2 and suspect.is_certain and why in suspect.why
    assert "rank 2 (host n1, pid 102) has been in phase learn of step 7 for 60 s" in suspect.words()


def test_of_ranks_that_all_wait_the_odd_one_is_suspected():
    behind, ahead = [*LOOP, "parallel/collectives.py:60 sum_over"], ["ppo/loop.py:44 train", "parallel/collectives.py:73 broadcast"]
    (suspect,) = found([record(0, sites=behind), record(1, sites=behind), record(2, "broadcast", ahead)])
    assert suspect.rank == 2 and "it waits in broadcast while others wait in all_reduce at parallel/collectives.py:60" in suspect.why
    both = found([record(0, sites=behind), record(1, "broadcast", ahead)])
    assert [suspect.rank for suspect in both] == [0, 1], "of two that wait for one another, nobody can tell which is wrong"
    (suspect,) = found([record(0, step=8), record(1), record(2)])
    assert suspect.rank == 0


def test_a_host_whose_ranks_all_wait_at_one_place_blames_nobody_for_certain():
    hosts = found([record(0), record(1)])
    assert [suspect.is_certain for suspect in hosts] == [False, False] and "see the report of the other hosts" in hosts[0].why


def test_sites_of_another_phase_are_not_shown():
    (suspect,) = found([record(0), record(1, pulse=NOW - 70)], rank1="T")
    assert suspect.sites == ()


def test_limits_follow_the_longest_phase_of_any_rank_and_start():
    limits = Limits(floor_s=10, factor=5, first_s=300)
    records = [record(0), record(1, longest={"learn": 8.0, "save": 1.0})]
    assert limits.of("learn", records, {}) == 40
    assert limits.of("learn", records, {"learn": 20.0}) == 100
    assert limits.of("save", records, {}) == 10, "never under the floor"
    assert limits.of("generate", records, {}) == 300, "never ended before"
    assert limits.of("", records, {}) == 10, "between phases"


def test_a_rank_that_has_failed_has_little_time_to_leave():
    limits = Limits(floor_s=10, factor=4, first_s=60)
    assert limits.of("failed", [], {}) == 10


def test_a_straggler_is_far_from_half_of_the_others_and_not_by_a_little():
    assert stragglers({0: 1.0, 1: 1.2, 2: 6.0, 3: 0.9}, 2.5, 0.5) == [2]
    assert stragglers({0: 1.0, 1: 6.0}, 2.5, 0.5) == [1]
    assert stragglers({0: 0.01, 1: 0.2, 2: 0.01}, 2.5, 0.5) == []
    assert stragglers({0: 1.0, 1: 1.5, 2: 2.0}, 2.5, 0.5) == [] and stragglers({0: 5.0}, 2.5, 0.5) == []


def test_a_monitor_that_stood_still_itself_starts_its_clock_anew(tmp_path, monkeypatch):
    """As when a whole job is suspended: the time in which nobody ran says nothing of the ranks."""
    naps = iter([1, 1, 1, 60, *[1] * 20])
    clock = SimpleNamespace(
        now=NOW, time=time.time, monotonic=lambda: clock.now, sleep=lambda _: setattr(clock, "now", clock.now + next(naps))
    )
    one = record(0, since=NOW, run=str(tmp_path), longest={"learn": 0.5}, stacks="", pid=os.getpid(), attempt="a", busy=0.0)
    (tmp_path / "rank-0.json").write_text(json.dumps(one))
    monkeypatch.setattr(watchdog, "time", clock)
    monkeypatch.setattr(watchdog.stacks, "dump", lambda record: "its stack")
    state = Watch(tmp_path, Limits(floor_s=4, factor=4), is_killing=False)
    looks = [now - NOW for now in watchdog.watch(state, os.getppid())]
    assert looks == [0, 1, 2, 3, 63, 64, 65, 66, 67, 68] and state.hang


@pytest.mark.parametrize("seen", ["12345", ""], ids=["seen alive", "dead before the first look"])
def test_ranks_that_wait_for_a_dead_one_are_found_after_a_while(tmp_path, seen):
    """In a wait that no closed connection ends; a rank that has left as it should, or one that alone is left, is nothing to wait for."""
    alive, dead = os.getpid(), 2**22 + 1  # no process has such a number
    watch = Watch(tmp_path, Limits())
    watch.identities[1] = seen

    def lost_at(seconds, **phases):
        for rank, pid in ((0, alive), (1, dead)):
            one = record(rank, pid=pid, run=str(tmp_path), phase=phases.get(f"rank{rank}", "publish"))
            (tmp_path / f"rank-{rank}.json").write_text(json.dumps(one))
        watch.look()
        return watch.lost(NOW + seconds)

    assert [lost_at(seconds) for seconds in (0, 3, 5)] == [[], [], [1]]
    assert lost_at(6, rank1="failed") == [1] and lost_at(7, rank1="ended") == []
    assert lost_at(8) == [] and lost_at(13) == [1], "its clock starts anew"


def test_a_job_that_is_being_ended_does_not_wait_for_what_a_lost_node_holds(tmp_path):
    watch = Watch(tmp_path, Limits())
    watch.records = {0: record(0, longest={"learn": 2.0}), 1: record(1, phase="save", since=NOW - 60, longest={})}
    assert watch.cannot_stop(NOW) == [], "nobody has asked it to end"
    watch.is_ending = True
    assert watch.cannot_stop(NOW) == ["rank 0, 60 s in phase learn of step 7"], "a first save takes as long as it takes"
    watch.records[0] |= {"longest": {"learn": 25.0}}
    assert watch.cannot_stop(NOW) == [], "it may well end in time"
