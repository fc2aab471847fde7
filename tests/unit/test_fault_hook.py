"""The hook for faults on purpose: refused unless allowed, understood or refused, struck once or from an iteration on."""

import time

import pytest

from megarl.errors import ConfigError
from megarl.operations import heartbeat
from megarl.operations.faults import ACTIONS, Fault, struck


def faults(text, **more):
    return Fault.from_environment({"MEGARL_FAULT": text, "MEGARL_ALLOW_FAULTS": "1", **more})


def fault(text, **more):
    (found,) = faults(text, **more)
    return found


def test_without_leave_a_run_is_refused(tmp_path, monkeypatch):
    assert Fault.from_environment({}) == ()
    monkeypatch.setenv("MEGARL_FAULT", "learn:0:1:kill")
    for allow in ("", "0", "yes"):
        monkeypatch.setenv("MEGARL_ALLOW_FAULTS", allow)
        with pytest.raises(ConfigError, match="would break this run on purpose: unset it"), heartbeat.rank_of(tmp_path):
            pytest.fail("it began")


@pytest.mark.parametrize(
    "text", ["learn:0:1", "lern:0:1:kill", "learn:x:1:kill", "learn:0:-1:kill", "learn:0:1:explode", "learn:0:1:kill:2", "learn:0:1:kill,"]
)
def test_what_is_not_understood_is_refused(text):
    with pytest.raises(ConfigError, match="expected phase:rank:iteration:action"):
        fault(text)


def test_it_strikes_at_one_place(tmp_path):
    once = fault("learn:1:3:kill", MEGARL_FAULT_ONCE=str(tmp_path / "struck"))
    assert once.strikes("learn", 1, 3)
    assert not any((once.strikes("learn", 0, 3), once.strikes("learn", 1, 4), once.strikes("score", 1, 3)))
    (tmp_path / "struck").write_text("learn:1:4:kill 1795271243.125\n")
    assert once.strikes("learn", 1, 3), "another one has struck"
    with (tmp_path / "struck").open("a") as file:
        file.write("learn:1:3:kill 1795271244.5\n")
    assert not once.strikes("learn", 1, 3)
    slow = fault("learn:1:3:slow")
    assert [slow.strikes("learn", 1, step) for step in (2, 3, 4)] == [False, True, True]


def test_it_strikes_where_a_phase_begins(tmp_path, monkeypatch):
    struck = []
    monkeypatch.setattr(Fault, "strike", lambda self: struck.append(self.action))
    monkeypatch.setenv("MEGARL_FAULT", "learn:0:2:hang")
    monkeypatch.setenv("MEGARL_ALLOW_FAULTS", "1")
    with heartbeat.rank_of(tmp_path):
        heartbeat.step(0, is_first=True)
        for step in (1, 2, 3):
            with heartbeat.phase("learn"), heartbeat.phase("learn"):
                assert len(struck) == (step >= 2)
            heartbeat.step(step)
    assert struck == ["hang"]


def test_several_strike_once_each(tmp_path, monkeypatch):
    done, marker = [], tmp_path / "struck"
    for action in ("exit", "hang"):
        monkeypatch.setitem(ACTIONS, action, lambda action=action: done.append(action))
    both = faults("learn:0:1:exit,save:1:2:hang", MEGARL_FAULT_ONCE=str(marker))
    assert [one.name for one in both] == ["learn:0:1:exit", "save:1:2:hang"] and struck(marker) == {}
    for phase, rank, step in (("learn", 0, 1), ("save", 1, 2)) * 2:
        for one in both:
            if one.strikes(phase, rank, step):
                one.strike()
    assert done == ["exit", "hang"]
    assert list(struck(marker)) == [one.name for one in both] and abs(time.time() - struck(marker)["save:1:2:hang"]) < 10
