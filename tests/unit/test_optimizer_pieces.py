"""Optimizer state in Hugging Face coordinates: any flat range of a box is made of few boxes, and each element is found in one."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.checkpoint.sharded import cover_faults
from megarl.models.optimizer_pieces import Held, flat_boxes, optimizer_pieces
from megarl.models.pieces import Piece


@settings(max_examples=200, deadline=None)
@given(st.data(), st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), min_size=1, max_size=3))
def test_a_flat_range_is_its_boxes(data, box):
    shape = [offset + size for offset, size in box]
    full = torch.arange(math.prod(shape)).view(shape)
    part = full[tuple(slice(offset, offset + size) for offset, size in box)].reshape(-1)
    low = data.draw(st.integers(0, len(part)))
    high = data.draw(st.integers(low, len(part)))
    boxes = flat_boxes(tuple(box), low, high)
    assert len(boxes) <= 2 * len(box) - 1
    at = low
    for inner, offset in boxes:
        values = full[tuple(slice(o, o + n) for o, n in inner)].reshape(-1)
        assert offset == at and torch.equal(values, part[at : at + len(values)])
        at += len(values)
    assert at == (high if boxes else low)


@settings(max_examples=50, deadline=None)
@given(cuts=st.sets(st.integers(1, 59)), rows=st.integers(1, 7))
def test_ranges_of_data_ranks_make_up_the_tensor(cuts, rows):
    """One fused parameter of 10 x 6, two Hugging Face tensors in it; its state is dealt to ranks in flat ranges."""
    param = torch.nn.Parameter(torch.zeros(10, 6))
    split = min(rows, 9)
    views = {"a": param.detach()[:split], "b": param.detach()[split:]}
    shapes = {name: (len(view), 6) for name, view in views.items()}
    weights = [Piece(name, ((0, len(view)), (0, 6)), view, False, shapes[name]) for name, view in views.items()]
    whole = torch.arange(60.0)
    edges = [0, *sorted(cuts), 60]
    found = []
    for low, high in zip(edges, edges[1:], strict=False):
        held = Held(param.detach(), low, high - low, {"exp_avg": whole[low:high].clone()}, is_sharded=True)
        found += optimizer_pieces([held], weights)["exp_avg"]
    assert all(piece.is_owner for piece in found), "a shard is written by the replica's owner"
    assert cover_faults(shapes, [(piece.hf_name, piece.box) for piece in found]) == []
    back = {name: torch.empty(shape) for name, shape in shapes.items()}
    for piece in found:
        back[piece.hf_name][tuple(slice(o, o + n) for o, n in piece.box)] = piece.view
    assert torch.equal(torch.cat([back["a"], back["b"]]).reshape(-1), whole)


def test_views_are_live_and_replicas_write_once():
    param = torch.nn.Parameter(torch.zeros(4, 3))
    piece = Piece("w", ((2, 4), (0, 3)), param.detach(), is_owner=False, hf_shape=(6, 3))
    state = torch.zeros(12)
    (moment,) = optimizer_pieces([Held(param.detach(), 0, 12, {"exp_avg": state}, is_sharded=False)], [piece])["exp_avg"]
    moment.view.fill_(3)
    assert (state == 3).all() and not moment.is_owner
