"""Files of a checkpoint: tensors survive exactly, damage is seen, covers are exact, progress is a value."""

import hashlib
import json
import random
import shutil

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megarl.bridge.plan import num_elements
from megarl.checkpoint import manifest as manifests
from megarl.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    MANIFEST_HASH,
    STEP_NAME,
    Manifest,
    StoredFile,
    StoredLayout,
    StoredModel,
    manifest_hash_line,
    read_manifest,
    step_directories,
    verify,
)
from megarl.checkpoint.publish import point_to, publish, versions
from megarl.checkpoint.sharded import TensorEntry, cover_faults, measure, write_tensors, write_text
from megarl.checkpoint.train_state import TrainState
from megarl.errors import CheckpointError, DamageError


def entries_of(tensors):
    return [TensorEntry(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()]


def test_written_file_is_what_safetensors_reads(tmp_path):
    tensors = {
        "bytes": torch.arange(5, dtype=torch.uint8),
        "half": torch.randn(3, 7).bfloat16(),
        "single": torch.randn(2, 3, 4).transpose(0, 2),
        "empty": torch.empty(0, dtype=torch.float64),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "mask": torch.tensor([True, False]),
    }
    asked = []
    written = write_tensors(tmp_path / "a.safetensors", entries_of(tensors), lambda e: asked.append(e.key) or tensors[e.key])
    assert sorted(asked) == sorted(tensors)
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key
    assert measure(tmp_path / "a.safetensors") == written


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    with pytest.raises(ValueError, match="shape"):
        write_tensors(tmp_path / "a.safetensors", [TensorEntry("w", torch.float32, (2, 3))], lambda _: torch.zeros(3, 2))


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), row_cuts=st.sets(st.integers(1, 8)), column_cuts=st.sets(st.integers(1, 8)))
def test_any_grid_of_pieces_covers_exactly_once(rows, columns, row_cuts, column_cuts):
    def spans(size, cuts):
        edges = [0, *sorted(cut for cut in cuts if cut < size), size]
        return [(low, high - low) for low, high in zip(edges, edges[1:], strict=False)]

    boxes = [(row, column) for row in spans(rows, row_cuts) for column in spans(columns, column_cuts)]
    shapes = {"w": (rows, columns)}
    assert cover_faults(shapes, [("w", box) for box in boxes]) == []
    assert cover_faults(shapes, [("w", box) for box in boxes[1:]])
    assert cover_faults(shapes, [("w", box) for box in [*boxes, boxes[0]]])
    if len(boxes) > 1 and num_elements(boxes[0]) == num_elements(boxes[1]):
        assert cover_faults(shapes, [("w", box) for box in [boxes[1], *boxes[1:]]])


def test_cover_names_unknown_tensors_and_boxes_outside():
    assert "not in the table" in cover_faults({"w": (2,)}, [("v", ((0, 2),)), ("w", ((0, 2),))])[0]
    assert "outside the shape" in cover_faults({"w": (2,)}, [("w", ((1, 2),))])[0]
    assert "0 of 2" in cover_faults({"w": (2,)}, [])[0]


def test_train_state_survives_json_exactly():
    state = TrainState(step=3, policy_version=2, prompts_consumed=192, kl_coef=0.1 + 0.2)
    assert TrainState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_train_state_advances():
    state = TrainState(kl_coef=0.05).advance(64, is_policy_updated=False).advance(64, kl_coef=0.06)
    assert state == TrainState(step=2, policy_version=1, prompts_consumed=128, kl_coef=0.06)


@pytest.mark.parametrize(
    "change", [{"step": -1}, {"step": 1.5}, {"kl_coef": float("nan")}, {"step": "1"}, {"more": 1}, {"policy_version": True}]
)
def test_train_state_refuses_what_it_did_not_write(change):
    with pytest.raises(CheckpointError):
        TrainState.from_json({**TrainState().to_json(), **change})


def make_checkpoint(directory, name="step-00000001"):
    staging = directory / f".staging-{name}"
    staging.mkdir(parents=True)
    tensors = {"w": torch.arange(6.0).view(2, 3), "b": torch.tensor([1.5, -2.0]).bfloat16()}
    written = {
        "a.txt": write_text(staging / "a.txt", "what was written"),
        "w.safetensors": write_tensors(staging / "w.safetensors", entries_of(tensors), lambda e: tensors[e.key]),
    }
    files = {path: StoredFile(kind="config", num_bytes=file.num_bytes, blake3=file.digest) for path, file in written.items()}
    manifest = Manifest(
        format=FORMAT,
        course="sft",
        state=TrainState(step=int(STEP_NAME.fullmatch(name)[1]), kl_coef=0.05).to_json(),
        layout=StoredLayout(),
        models={"actor": StoredModel(shapes={"w": (2, 3)})},
        files=files,
        versions=versions(),
    )
    publish(staging, directory / name, manifest)
    point_to(directory / name)
    return directory / name, manifest


def rewrite(directory, change):
    """Another manifest, in good order otherwise."""
    content = change(json.loads((directory / MANIFEST).read_text()))
    data = json.dumps(content).encode()
    (directory / MANIFEST).write_bytes(data)
    (directory / MANIFEST_HASH).write_bytes(manifest_hash_line(hashlib.sha256(data).hexdigest()))


def check(directory):
    for path, file in read_manifest(directory).files.items():
        verify(directory, path, file)


def test_manifest_survives_and_the_pointer_follows(tmp_path):
    directory = tmp_path / "checkpoints"
    first, manifest = make_checkpoint(directory)
    second, _ = make_checkpoint(directory, "step-00000012")
    assert read_manifest(first) == manifest
    assert step_directories(directory) == [first, second]
    assert (directory / "latest").read_text() == "step-00000012\n"
    assert manifests.find_checkpoint(tmp_path) == manifests.find_checkpoint(directory) == manifests.find_checkpoint(second) == second
    assert not list(directory.glob(".*")), "nothing is left of the staging directories"
    verify(first, "a.txt", manifest.files["a.txt"])


def test_unfinished_directories_are_not_checkpoints(tmp_path):
    (tmp_path / "checkpoints" / "step-00000009").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".staging-step-00000010").mkdir()
    assert manifests.find_checkpoint(tmp_path) is None


def test_every_flipped_bit_is_seen(tmp_path):
    directory, _ = make_checkpoint(tmp_path)
    check(directory)
    rng, files = random.Random(0), sorted(directory.iterdir())
    for _ in range(1000):
        path = rng.choice(files)
        before = path.read_bytes()
        data = bytearray(before)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with pytest.raises(DamageError, match=path.name):
            check(directory)
        path.write_bytes(before)
    check(directory)


@pytest.mark.parametrize("name", ["a.txt", "w.safetensors", MANIFEST, MANIFEST_HASH])
@pytest.mark.parametrize("damage", ["truncate", "empty", "remove", "longer"])
def test_damage_is_seen_before_use(tmp_path, name, damage):
    directory, _ = make_checkpoint(tmp_path)
    path = directory / name
    data = path.read_bytes()
    changed = {"truncate": data[:-1], "empty": b"", "longer": data + b"\0"}
    path.unlink() if damage == "remove" else path.write_bytes(changed[damage])
    with pytest.raises(DamageError, match=name):
        check(directory)


def test_damage_is_described(tmp_path):
    directory, manifest = make_checkpoint(tmp_path)
    (directory / "a.txt").write_text("what was w\x01itten")
    found = blake3((directory / "a.txt").read_bytes()).hexdigest()
    with pytest.raises(DamageError, match=f"a.txt has BLAKE3 {found}; its manifest says {manifest.files['a.txt'].blake3}"):
        check(directory)


def test_swapped_files_and_a_manifest_of_another_step_are_seen(tmp_path):
    first, _ = make_checkpoint(tmp_path)
    second, _ = make_checkpoint(tmp_path, "step-00000002")
    for name in (MANIFEST, MANIFEST_HASH):
        shutil.copy(first / name, second / name)
    with pytest.raises(DamageError, match="is of step 1; its directory is called step-00000002"):
        read_manifest(second)
    (first / "a.txt").rename(first / "kept")
    (first / "w.safetensors").rename(first / "a.txt")
    (first / "kept").rename(first / "w.safetensors")
    with pytest.raises(DamageError, match="a.txt"):
        check(first)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "..\\b", ""])
def test_manifest_may_not_name_files_outside(tmp_path, name):
    directory, _ = make_checkpoint(tmp_path)
    rewrite(directory, lambda content: content | {"files": {name: content["files"]["a.txt"]}})
    with pytest.raises(CheckpointError, match="outside"):
        read_manifest(directory)


@pytest.mark.parametrize("change", [{"format": 1}, {"surprise": 1}, {"models": {"judge": {"shapes": {}}}}, {"files": 3}])
def test_malformed_manifests_are_refused(tmp_path, change):
    directory, _ = make_checkpoint(tmp_path)
    rewrite(directory, lambda content: content | change)
    with pytest.raises(CheckpointError, match="manifest.json"):
        read_manifest(directory)
