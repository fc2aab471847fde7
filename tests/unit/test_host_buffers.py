"""Copies for a save behind the training: equal, apart from the live tensors, in memory that is used again."""

import torch

from megarl.checkpoint import files
from megarl.checkpoint.files import HostBuffers, PlannedFile
from megarl.checkpoint.publish import NOT_WRITTEN, stored


def plan_of(**tensors: torch.Tensor) -> list[PlannedFile]:
    names = sorted(tensors)
    parts = [{name: tensors[name] for name in names[:2]}, {name: tensors[name] for name in names[2:]}]
    return [PlannedFile(f"{number}", stored("weights", NOT_WRITTEN), part) for number, part in enumerate(parts)]


def test_copies_are_equal_and_stay_when_training_goes_on(monkeypatch):
    monkeypatch.setattr(files, "BUFFER_BYTES", 256)
    live = {
        "a": torch.randn(5, 7),
        "b": torch.randn(100).bfloat16(),
        "c": torch.arange(6).view(2, 3).t(),  # not contiguous
        "d": torch.tensor(3.0),
        "e": torch.empty(0, dtype=torch.float64),
        "f": torch.randn(300),  # larger than a block
    }
    expected = {name: tensor.clone() for name, tensor in live.items()}
    buffers = HostBuffers()

    def copies() -> dict[str, torch.Tensor]:
        return {name: tensor for file in buffers.copy(plan_of(**live)) for name, tensor in file.tensors.items()}

    first = copies()
    for tensor in live.values():
        tensor.zero_()
    for name, tensor in expected.items():
        assert first[name].dtype == tensor.dtype and torch.equal(first[name], tensor), name
    places = {name: tensor.data_ptr() for name, tensor in first.items()}
    second = copies()
    assert {name: tensor.data_ptr() for name, tensor in second.items()} == places, "the memory is used again"
    assert not any(tensor.any() for tensor in second.values())
    assert sum(tensor.nbytes for tensor in live.values()) <= buffers.num_bytes < 3000


def test_another_plan_gets_other_buffers():
    buffers = HostBuffers()
    buffers.copy(plan_of(a=torch.ones(4)))
    (file, _) = buffers.copy(plan_of(a=torch.ones(2, 3)))
    assert torch.equal(file.tensors["a"], torch.ones(2, 3))
