"""Boxes of safetensors files read with plain reads: the same numbers as the reference reader gives, and damage refused."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megarl.checkpoint import tensor_file
from megarl.checkpoint.tensor_file import TensorFile

TENSORS = {
    "matrix": torch.arange(7 * 5, dtype=torch.float32).view(7, 5),
    "cube": torch.arange(3 * 4 * 5).view(3, 4, 5),
    "half": torch.linspace(-1, 1, 12).bfloat16(),
    "scalar": torch.tensor(7.5, dtype=torch.float16),
    "empty": torch.empty(0, 3),
    "mask": torch.tensor([True, False, True]),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tensors") / "a.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def test_whole_tensors_are_those_of_the_reference_reader(path):
    file = TensorFile(path)
    assert set(file.keys()) == set(TENSORS) and file.metadata == {"format": "pt"}
    with safe_open(path, framework="pt") as reference:
        for key, tensor in TENSORS.items():
            part = file.get_slice(key)
            assert part.get_shape() == list(tensor.shape) and part.get_dtype() == reference.get_slice(key).get_dtype()
            found = part[tuple(slice(0, size) for size in tensor.shape)]
            assert found.dtype == tensor.dtype and torch.equal(found, reference.get_tensor(key))


@pytest.mark.parametrize("block_bytes", [1, 64, 1 << 20])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_box_is_that_part_of_the_tensor(path, monkeypatch, block_bytes, data):
    monkeypatch.setattr(tensor_file, "BLOCK_BYTES", block_bytes)
    key = data.draw(st.sampled_from(["matrix", "cube", "half"]))
    edges = [sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in TENSORS[key].shape]
    box = tuple(slice(low, high) for low, high in edges)
    assert torch.equal(TensorFile(path).get_slice(key)[box], TENSORS[key][box])


def damaged(path, tmp_path, change):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    copy = tmp_path / "b.safetensors"
    copy.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    return copy


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda header: header["matrix"].update(shape=[7, 6]), "matrix.*cannot take"),
        (lambda header: header["matrix"].update(data_offsets=[0, 4]), "cannot take|start at"),
        (lambda header: header.pop("mask"), "describes|start at"),
        (lambda header: header["matrix"].update(shape=[-7, -5]), "damaged"),
        (lambda header: header["matrix"].pop("dtype"), "damaged"),
    ],
)
def test_headers_that_lie_are_refused(path, tmp_path, change, words):
    with pytest.raises(SafetensorError, match=words):
        TensorFile(damaged(path, tmp_path, change))


@pytest.mark.parametrize("content", [b"", b"1234567", (1 << 40).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"])
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    (tmp_path / "c.safetensors").write_bytes(content)
    with pytest.raises(SafetensorError):
        TensorFile(tmp_path / "c.safetensors")


def test_a_truncated_file_and_a_missing_tensor_are_refused(path, tmp_path):
    (tmp_path / "d.safetensors").write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SafetensorError, match="describes"):
        TensorFile(tmp_path / "d.safetensors")
    with pytest.raises(SafetensorError, match="no tensor other"):
        TensorFile(path).get_slice("other")


def test_types_without_a_name_here_are_told(path, tmp_path):
    copy = damaged(path, tmp_path, lambda header: header["matrix"].update(dtype="F8_E4M3"))
    with pytest.raises(SafetensorError, match="F8_E4M3"):
        TensorFile(copy).get_slice("matrix")[:, :]
