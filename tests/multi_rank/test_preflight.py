"""R20: before models are loaded, a host that cannot take part is named on every rank and written down for whoever starts the run again."""

import json
import time
from pathlib import Path

import pytest

from megarl.operations.links import judge_pairs, rounds
from tests.ranks import run_ranks

SLOW_HOST = "n2"


def examine(rank: int, world_size: int, root: Path, name: str, case: str) -> list:
    """(what was raised, seconds) of a preflight over `world_size` hosts, one of which is not well."""
    import torch.distributed as dist

    from megarl.errors import SetupError
    from megarl.operations import links, preflight

    host = name.format(rank)
    faults = (lambda run: ["its disk is full"]) if case == "disk" and host == SLOW_HOST else preflight.faults_of_this_host
    if case == "clock" and host == SLOW_HOST:
        real = time.time
        preflight.time.time = lambda: real() + 60
    if case == "link":
        original = dist.send

        def slow(tensor, other, **options):  # 1 MB/s
            if SLOW_HOST in (host, name.format(other)):
                time.sleep(tensor.numel() / 1e6)
            return original(tensor, other, **options)

        dist.send = slow
    if case == "hiccup":  # one bad moment: the first measurement of each of its pairs
        original, seen = links._bandwidth, set()

        def late(other, *arguments):
            bandwidth = original(other, *arguments)
            is_late = SLOW_HOST in (host, name.format(other)) and other not in seen
            seen.add(other)
            return bandwidth / 100 if is_late else bandwidth

        links._bandwidth = late
    began = time.monotonic()
    try:
        found = preflight.preflight(root / case if case != "private" else root / f"private-{rank}", host, faults)
    except SetupError as error:
        return [str(error), time.monotonic() - began]
    return [found.to_json(), time.monotonic() - began]


def examine_all(rank: int, world_size: int, root: Path) -> dict:
    return {case: examine(rank, world_size, root, "n{}", case) for case in ("well", "disk", "hiccup", "clock", "link", "private")}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    root = tmp_path_factory.mktemp("preflight")
    return root, run_ranks(examine_all, 4, root)


def test_well_hosts_pass_and_leave_their_numbers(reports):
    root, ranks = reports
    for found, seconds in (report["well"] for report in ranks):
        assert found["hosts"] == ("n0", "n1", "n2", "n3") and len(found["pairs"]) == 6 and seconds < 20
        assert found["faults"] == () and max(map(abs, found["clocks_s"].values())) < 1
    print(f"R20: 4 hosts on one machine take {max(report['well'][1] for report in ranks):.2f} s")
    assert [path.name for path in (root / "well").iterdir()] == ["preflight.json"]


def test_one_bad_moment_makes_no_bad_host(reports):
    _, ranks = reports
    assert all(report["hiccup"][0]["faults"] == () for report in ranks)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("disk", "n2: its disk is full"),
        ("clock", "n2: its clock is +60.0 s from the middle"),
        ("link", "n2: its link is slow to 3 of 3 hosts"),
    ],
)
def test_a_bad_host_is_named_and_written_down(reports, case, reason):
    root, ranks = reports
    for message, seconds in (report[case] for report in ranks):
        assert "1 of 4 hosts cannot take part" in message and reason in message and seconds < 20
    assert (root / case / "bad_nodes").read_text() == "n2\n"
    assert {host for host, _ in json.loads((root / case / "preflight.json").read_text())["faults"]} == {SLOW_HOST}


def test_folders_that_are_not_shared_are_refused_and_nobody_is_left_out(reports):
    root, ranks = reports
    for message, _ in (report["private"] for report in ranks):
        assert "4 of 4 hosts" in message and "the folder must be on a shared file system" in message
    assert not (root / "private-0" / "bad_nodes").exists()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
def test_rounds_pair_everyone_with_everyone_once(count):
    played = rounds(count)
    assert sorted(pair for matches in played for pair in matches) == [(a, b) for a in range(count) for b in range(a + 1, count)]
    for matches in played:
        players = [player for pair in matches for player in pair]
        assert len(players) == len(set(players))


def test_one_slow_pair_is_a_warning_and_few_pairs_say_nothing():
    pairs = [("a", "b", 9e8), ("a", "c", 1e9), ("a", "d", 1e9), ("b", "c", 1e8), ("b", "d", 1e9), ("c", "d", 1e9)]
    faults, warnings = judge_pairs(pairs)
    assert faults == [] and "between b and c is slow: 100 MB/s, others have 1000 MB/s" in warnings[0]
    assert judge_pairs([("a", "b", 1.0)]) == ([], [])
    faults, _ = judge_pairs([("a", "b", 1e9), ("a", "c", 1e8), ("b", "c", 1e8)])
    assert [name for name, _ in faults] == ["c"]
