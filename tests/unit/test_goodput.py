"""Where a run's time went: seconds add up, steps done twice are lost, files that end in the middle of a line are read."""

import json
import subprocess
import sys

import pytest

from megarl.cli import run
from megarl.operations.events import EventLog, read_events
from megarl.operations.goodput import goodput


def at(time, event, **fields):
    return {"time": float(time), "event": event, "attempt": "a", **fields}


def lesson():
    """Ten seconds a step; a save of two after step 2; dead in step 4; the second start does step 3 again and ends well after 5."""
    first = [at(0, "start"), at(20, "continue", step=0), at(30, "step", step=1), at(40, "step", step=2)]
    first += [at(42, "phase", name="save", step=2, seconds=2.0), at(52, "step", step=3), at(57, "phase", name="learn", step=4, seconds=4.0)]
    second = [at(67, "start"), at(77, "phase", name="setup load", step=0, seconds=3.0), at(82, "continue", step=2)]
    second += [
        at(92, "step", step=3),
        at(102, "step", step=4),
        at(105, "phase", name="evaluate", step=5, seconds=3.0),
        at(115, "step", step=5),
    ]
    second += [at(116, "phase", name="save", step=5, seconds=1.0), at(117, "end", step=5, outcome="done")]
    return first + second


def test_seconds_add_up():
    found = goodput(lesson())
    assert (found.steps, found.lost_steps, found.starts, found.failures) == (5, 1, 2, 1)
    assert found.wall_s == 117
    assert found.useful_s == 20 + 10 + 10 + 10 + 1  # 1, 2, 3 (second time), 4, 5 without its evaluation, the way out
    assert (found.evaluation_s, found.checkpoint_s, found.setup_s, found.down_s) == (3, 1, 20 + 15, 10)
    assert found.lost_s == 12 + 5  # step 3 of the first start, with its save, and the begun step 4
    parts = (found.useful_s, found.evaluation_s, found.checkpoint_s, found.setup_s, found.lost_s, found.down_s)
    assert sum(parts) == pytest.approx(found.wall_s)
    assert found.share == pytest.approx(51 / 117) and found.mttf_s == 107
    assert found.phases_s == {"save": 3.0, "learn": 4.0, "evaluate": 3.0}


def test_a_run_that_still_goes_on_has_not_failed():
    found = goodput(lesson()[:-1])
    assert found.failures == 1 and goodput(lesson()[:4]).failures == 0
    assert goodput([]) is None and goodput([at(0, "attempt")]) is None


def test_steps_are_lost_when_a_later_start_begins_before_them_not_when_it_has_done_them_again():
    found = goodput([*lesson()[:-6], at(90, "phase", name="learn", step=3, seconds=8.0)])  # the second start works on step 3
    assert (found.steps, found.lost_steps) == (2, 1) and found.useful_s == 20 + 8
    again = [at(200, "start"), at(210, "continue", step=0), at(215, "step", step=1)]  # a third one found no checkpoint
    found = goodput([*lesson()[:-2], *again])
    assert (found.steps, found.lost_steps, found.useful_s) == (1, 6, 5)
    parts = (found.useful_s, found.evaluation_s, found.checkpoint_s, found.setup_s, found.lost_s, found.down_s)
    assert sum(parts) == pytest.approx(found.wall_s)


def test_a_start_that_comes_back_beside_a_newer_one_counts_no_more():
    second = [event | {"attempt": "b"} for event in lesson()[7:]]
    late = [at(90, "step", step=4), at(95, "phase", name="save", step=4, seconds=2.0), at(96, "end", step=4, outcome="FencedError")]
    assert goodput(sorted([*lesson()[:7], *second, *late], key=lambda event: event["time"])) == goodput(lesson())


def test_what_a_process_did_before_it_said_so_is_setup():
    events = lesson()
    events[7] = at(67, "start", age=6.0)
    found = goodput(events)
    assert (found.setup_s, found.down_s, found.wall_s) == (20 + 15 + 6, 10 - 6, 117)


def test_the_first_start_of_a_process_tells_its_age(tmp_path):
    """In a process of its own: this one has lived for long."""
    code = (
        "import time; began = time.time(); time.sleep(0.3)\n"
        "from pathlib import Path; from megarl.operations.heartbeat import rank_of\n"
        f"for _ in range(2):\n    with rank_of(Path({str(tmp_path)!r})): pass\n"
        "print(time.time() - began)"
    )
    lived = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    first, second = (event["age"] for event in read_events(tmp_path) if event["event"] == "start")
    assert 0.3 <= first <= lived + 10 and second == 0


def test_hangs_and_stragglers_are_counted():
    events = [*lesson()[:7], at(60, "hang", rank=1), *lesson()[7:]]
    found = goodput(events + [at(120, "straggler", rank=1)])
    assert (found.hangs, found.stragglers, found.lost_s, found.down_s) == (1, 1, 12 + 8, 7)


def test_files_of_several_hosts_and_torn_lines_are_read(tmp_path):
    one, other = EventLog(tmp_path / "events.jsonl", attempt="a"), EventLog(tmp_path / "events.n2.jsonl", attempt="a")
    one.write("start", ranks=2)
    other.write("hang", rank=3)
    one.close()
    path = tmp_path / "events.jsonl"
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole + whole[:end])
        assert [event["event"] for event in read_events(tmp_path)] in (["start", "hang"], ["start", "start", "hang"])
    path.write_bytes(whole + b'{"time": 1, "ev' + bytes(20))
    log = EventLog(path, attempt="b")
    log.write("start", ranks=2)
    log.close()
    assert [event["attempt"] for event in read_events(tmp_path)] == ["a", "a", "b"], "the next start begins a line of its own"
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("after", [3, 8, 11])
def test_a_clock_that_is_set_back_moves_nothing(tmp_path, after):
    """By an hour, or as on another host that the run was started on again."""
    events = lesson()
    moved = [event | {"time": event["time"] - 3600 * (place >= after)} for place, event in enumerate(events)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in moved))
    found, expected = goodput(read_events(tmp_path)), goodput(events)
    gap = events[after]["time"] - events[after - 1]["time"]  # nobody can tell how long that was
    assert found.wall_s == pytest.approx(expected.wall_s - gap)
    assert (found.steps, found.lost_steps, found.starts, found.failures) == (5, 1, 2, 1)
    parts = (found.useful_s, found.evaluation_s, found.checkpoint_s, found.setup_s, found.lost_s, found.down_s)
    assert sum(parts) == pytest.approx(found.wall_s) and min(found.setup_s, found.lost_s, found.down_s) >= 0


def test_an_unwritable_diary_stops_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    EventLog(tmp_path / "file" / "events.jsonl").write("start")


def test_the_command_prints_it(tmp_path, capsys):
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in lesson()))
    assert run(["goodput", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "43.6% of 117.0 s" in said and "5 kept, 1 done again" in said and "107 s" in said
    assert run(["goodput", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lost_steps"] == 1
    assert run(["goodput", str(tmp_path / "nothing")]) == 78
    assert "expected the output_dir of a run that was started" in capsys.readouterr().err
