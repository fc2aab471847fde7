"""Whom a hang is blamed on, when a phase is too long, who straggles: from records alone."""

import json
import os
import sys
import time
from types import SimpleNamespace

import pytest

from megarl.operations import heartbeat, outcome, stacks, watchdog
from megarl.operations.heartbeat import collective_of
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


def test_a_scorer_may_take_what_its_own_limit_says(tmp_path):
    """A reward server that is gone for minutes is the run's to deal with, and its ranks wait for one another meanwhile."""
    watch = Watch(tmp_path, Limits(floor_s=10, factor=5))

    def overdue(**changes):
        watch.records = {0: record(0, pid=os.getpid(), longest={"score": 1.0, "learn": 1.0}, **changes)}
        return [limit for _, limit in watch.overdue(NOW)]  # 60 s into its phase

    assert overdue(phase="score") == [10] and overdue(phase="score", patience=300.0) == []
    assert overdue(phase="score", patience=300.0, since=NOW - 331) == [330]
    assert overdue(phase="evaluate score", patience=300.0) == [] and overdue(phase="learn", patience=300.0) == [10]


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
    watch, here = Watch(tmp_path, Limits()), {"pid": os.getpid()}
    watch.records = {0: record(0, longest={"learn": 2.0}, **here), 1: record(1, phase="save", since=NOW - 60, longest={}, **here)}
    assert watch.cannot_stop(NOW) == [], "nobody has asked it to end"
    watch.is_ending = True
    assert watch.cannot_stop(NOW) == ["rank 0, 60 s in phase learn of step 7"], "a first save takes as long as it takes"
    watch.records[0] |= {"longest": {"learn": 25.0}}
    assert watch.cannot_stop(NOW) == [], "it may well end in time"
    watch.records[0] |= {"phase": ""}
    assert watch.cannot_stop(NOW) == [], "it may be writing its checkpoint's end"
    watch.records[1] |= {"phase": "setup load", "since": NOW - 1, "step": 0}
    assert watch.cannot_stop(NOW) == ["rank 1, 1 s in phase setup load of step 0"], "it has nothing to save"


def test_a_rank_that_has_failed_is_no_hang_and_why_it_did_stands(tmp_path, monkeypatch):
    """All ranks of a host failed; one is gone and its launcher has not noticed yet, one is slow to leave."""
    monkeypatch.setenv("MEGARL_ATTEMPT", "7-0-1")
    watch = Watch(tmp_path, Limits(floor_s=4))
    failed = {"phase": "failed", "since": NOW - 10}
    watch.records = {0: record(0, pid=2**22 + 1, **failed), 1: record(1, pid=os.getpid(), **failed)}
    assert [one["rank"] for one, _ in watch.overdue(NOW)] == [1]
    outcome.Outcome("retry", "7-0-1", 4, "LearningError: the update is skipped").write(tmp_path)
    outcome.record_hang(tmp_path, 1, "failed", 6, "rank 1 has been in phase failed", True)
    assert outcome.read(tmp_path).reason == "LearningError: the update is skipped"
    outcome.record_hang(tmp_path, 1, "learn", 6, "rank 1 is stopped", True)
    assert outcome.read(tmp_path).reason == "hang: rank 1 is stopped", "others fail since they waited for it"


def watch_of(folder, run, host, *records):
    """A monitor that has seen the heartbeats `records`."""
    folder.mkdir(exist_ok=True)
    for one in records:
        said = one | {"run": str(run), "host": host, "stacks": "", "pid": os.getpid(), "attempt": "7-0-1"}
        (folder / f"rank-{one['rank']}.json").write_text(json.dumps({"busy": 0.0} | said))
    watch = Watch(folder, host=host)
    watch.look()
    return watch


def test_the_verdict_is_on_disk_before_stacks_and_outlives_those_of_hosts_that_only_wait(tmp_path, monkeypatch):
    """srun ends all nodes as soon as one has ended its ranks."""
    monkeypatch.setenv("MEGARL_ATTEMPT", "7-0-1")
    run, said = tmp_path / "run", []
    run.mkdir()
    monkeypatch.setattr(watchdog.stacks, "dump", lambda record: said.append(outcome.read(run).reason) or "its stack")
    monkeypatch.setattr(watchdog.stacks, "look", lambda pid: Process("S"))
    guilty = watch_of(tmp_path / "a", run, "n1", record(0), record(1, pulse=NOW - 50))
    guilty.report(NOW, 10.0)
    assert len(said) == 2 and all(text.startswith("hang: rank 1 (host n1") for text in said)
    watch_of(tmp_path / "b", run, "n2", record(2), record(3)).report(NOW, 10.0)
    assert outcome.read(run).reason == said[0] and outcome.read(run).rank == 1


def test_stacks_take_no_longer_than_they_may(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=NOW, time=time.time, monotonic=lambda: clock.now)
    monkeypatch.setattr(watchdog, "time", clock)
    monkeypatch.setattr(watchdog.stacks, "dump", lambda record: setattr(clock, "now", clock.now + 15) or "its stack")
    found = Watch(tmp_path)._dumps([record(rank) for rank in range(8)], first=[5])
    assert [rank for rank, text in found.items() if text == "its stack"] == [5, 0]
    assert clock.now - NOW == 30 and len(found) == 8


def test_monitors_write_when_there_is_news_and_name_the_host_of_a_straggler(tmp_path):
    (tmp_path / "run").mkdir()
    first, second = (watch_of(tmp_path / name, tmp_path / "run", name, record(rank)) for rank, name in enumerate(("n1", "n2")))
    written, warnings = 0, []
    for second_of_run in range(120):  # steps of ten seconds
        for watch, rank, pace in ((first, 0, 0.1), (second, 1, 1.0)):
            watch.records[rank] |= {"step": second_of_run // 10, "busy": second_of_run * pace}
            before, now = watch.told, NOW + second_of_run
            watch.tell(now)
            written += watch.told != before
            warnings += watch.straggling(now)
    assert 20 <= written <= 24, "two hosts in twelve steps, not every five seconds"
    assert len(warnings) == 1 and "straggler: rank 1 (n2) computed" in warnings[0]


class Value:
    """Stands for a tensor whose kernel does not end."""

    def item(self):
        return collective_of(sys._getframe().f_back)


def test_on_a_gpu_a_rank_waits_where_it_needs_a_value(monkeypatch):
    assert Value().item() == ""
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    waiting = Value().item()
    assert waiting == "its GPU's queue"
    monkeypatch.setattr(heartbeat, "sys", SimpleNamespace(modules={"torch.cuda": SimpleNamespace()}))
    assert Value().item() == "", "while torch is being imported"
    at_work = record(2, "", LOOP)
    (suspect,) = found([record(0, waiting), record(1, waiting), at_work])
    assert suspect.rank == 2 and not any(suspect.is_certain for suspect in found([record(0, waiting), record(1, waiting)]))


def test_what_nccl_wrote_on_a_timeout_of_its_own_is_kept(tmp_path, capfd):
    run, folder = tmp_path / "run", tmp_path / "heartbeats"
    run.mkdir()
    watch_of(folder, run, "n1", record(0))
    stacks.keep_flight_records(folder)
    assert not list(run.iterdir())
    (folder / "nccl-rank-0").write_bytes(b"\x80")
    stacks.keep_flight_records(folder)
    assert (run / "hangs" / "nccl-rank-0").read_bytes() == b"\x80" and str(run / "hangs") in capfd.readouterr().err
