"""Loading pieces from a source: boxes land in live views, and a source that does not fit is refused before the first copy."""

import pytest
import torch

from megarl.errors import WeightMapError
from megarl.models.pieces import Piece, load_pieces

NAME = "model.norm.weight"


class DictSource:
    """Whole tensors by name."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors

    def names(self):
        return self.tensors.keys()

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def read(self, name, box):
        return self.tensors[name][tuple(slice(offset, offset + size) for offset, size in box)]


def piece_of(view: torch.Tensor) -> Piece:
    return Piece(NAME, ((2, 2), (1, 3)), view, is_owner=True, hf_shape=(4, 5))


def test_a_box_is_cast_into_the_live_view():
    parameter = torch.nn.Parameter(torch.zeros(3, 3, dtype=torch.bfloat16))
    full = torch.arange(20.0).view(4, 5)
    load_pieces([piece_of(parameter.detach()[1:])], DictSource({NAME: full}))
    assert torch.equal(parameter[1:].float(), full[2:4, 1:4]) and parameter[0].abs().max() == 0


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"other": torch.zeros(4, 5)}, f"lack {NAME}"),
        ({NAME: torch.zeros(4, 6)}, r"shape \[4, 6\] in the weights; the model needs \[4, 5\]"),
    ],
)
def test_a_source_that_does_not_fit_is_refused_untouched(tensors, words):
    view = torch.full((2, 3), 7.0)
    with pytest.raises(WeightMapError, match=words):
        load_pieces([Piece(NAME, ((0, 4), (0, 5)), torch.zeros(4, 5), True, (4, 5)), piece_of(view)], DictSource(tensors))
    assert torch.equal(view, torch.full((2, 3), 7.0))
