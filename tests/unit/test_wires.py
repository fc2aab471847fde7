"""What a generator's process is told of a plan."""

import json

from megarl.bridge.joint import Meeting, process_name
from megarl.bridge.plan import TargetBox, make_outline
from megarl.bridge.wires import Delivery


def outline_of_two_trainers_and_two_generators():
    """Rows 0..7 of a tensor on rank 0, 8..15 on rank 1; rank 2 wants all of it, rank 3 the middle. Three rows fit a round."""
    held = [[("w", ((0, 8), (0, 4)))], [("w", ((8, 8), (0, 4)))], [], []]
    whole = TargetBox("w", ((0, 16), (0, 4)), "weight", ((0, 16), (0, 4)))
    middle = TargetBox("w", ((4, 8), (0, 4)), "weight", ((0, 8), (0, 4)))
    return make_outline(held, [[], [], [whole], [middle]], bucket_bytes=48, element_bytes=4)


def test_generators_behind_the_trainers_receive_everything_they_want_and_hold_nothing():
    outline = outline_of_two_trainers_and_two_generators()
    plan = outline.write_out()
    assert {op.source_rank for op in plan.ops} == {0, 1} and {op.target_rank for op in plan.ops} == {2, 3}
    for rank, elements in ((2, 64), (3, 32)):
        rounds = outline.write_out(rank).rounds
        assert len(rounds) == len(plan.rounds)
        assert sum(op.num_elements for ops in rounds for op in ops) == elements
        assert all(sum(op.num_elements for op in ops) <= 12 for ops in rounds)


def test_a_delivery_survives_json():
    rounds = outline_of_two_trainers_and_two_generators().write_out(3).rounds
    for delivery in (
        Delivery(3, rounds, {0: "ring-0-3", 1: "ring-1-3"}, None),
        Delivery(3, rounds, {}, Meeting("127.0.0.1", 4711, num_trainers=2, num_processes=2, tensor=2)),
    ):
        assert Delivery.from_json(json.loads(json.dumps(delivery.to_json()))) == delivery
    assert delivery.ops == tuple(op for ops in rounds for op in ops)


def test_processes_have_names():
    meeting = Meeting("127.0.0.1", 4711, num_trainers=2, num_processes=4, tensor=2)
    assert [meeting.name(rank) for rank in (1, 5)] == ["trainer rank 1", "generator 1 (its rank 1 of 2)"]
    assert process_name(3, 1) == "generator 3"
