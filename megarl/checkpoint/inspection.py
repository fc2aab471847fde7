"""What is on disk, told without changing anything: the checkpoints of a run, whether one is what was written, where two differ."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from megarl.checkpoint import manifest as manifests
from megarl.checkpoint.manifest import LATEST, Manifest, StoredFile
from megarl.checkpoint.model_card import run_digest
from megarl.checkpoint.publish import STAGING, TRASH
from megarl.checkpoint.sharded import TensorEntry, cover_faults, measure
from megarl.checkpoint.sources import CheckpointSource, SafetensorsSource
from megarl.checkpoint.streams import row_blocks
from megarl.checkpoint.tensor_file import TensorFile
from megarl.errors import CheckpointError, MegarlError
from megarl.models.decoder_table import SCALAR_HEAD
from megarl.models.pieces import TensorSource

NOT_IN_MANIFEST = {manifests.MANIFEST, manifests.MANIFEST_HASH}


@dataclass(frozen=True)
class Listed:
    """A checkpoint of a run, or something in its directory that is none: `state` says what is wrong, empty when nothing is."""

    name: str
    state: str
    step: int | None = None
    course: str = ""
    layout: str = ""
    models: tuple[str, ...] = ()
    num_bytes: int = 0
    written: str = ""  # local time
    is_latest: bool = False


@dataclass(frozen=True)
class Finding:
    """A file, or a part of one, that is not what the manifest says."""

    file: str
    expected: str
    found: str


@dataclass(frozen=True)
class Verified:
    """What a verification read and what it found."""

    directory: Path
    num_files: int
    num_bytes: int
    seconds: float
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Difference:
    """A tensor that two models hold differently: how many of its elements, and the largest |difference| (in float64)."""

    tensor: str
    what: str  # "values", or what keeps them from being compared
    largest: float = 0.0
    num_elements: int = 0
    num_different: int = 0


def list_checkpoints(path: Path) -> list[Listed]:
    """Every checkpoint of a run's output directory (or of its `checkpoints`), oldest first, with what is unfinished or damaged.

    Raises `CheckpointError` when `path` is no directory of checkpoints. Reads manifests alone.
    """
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory; expected a run's output_dir")
    try:
        latest = (directory / LATEST).read_text(errors="replace").strip()
    except OSError:
        latest = ""
    listed = [_listed(found, latest) for found in sorted(directory.iterdir()) if found.is_dir()]
    if latest not in {entry.name for entry in listed} and listed:
        listed.append(Listed(LATEST, f"names {latest!r}, which is not there"))
    if not listed:
        raise CheckpointError(f"{path} holds no checkpoints (step-*): expected a run's output_dir")
    return listed


def verify_checkpoint(directory: Path, threads: int) -> Verified:
    """Read every byte of a checkpoint in `threads` threads and compare it with the manifest; whatever is wrong is a finding."""
    start = time.perf_counter()
    try:
        manifest = manifests.read_manifest(directory)
    except CheckpointError as error:
        return Verified(directory, 0, 0, 0.0, (Finding(manifests.MANIFEST, "what was written", str(error)),))
    findings: list[Finding] = []
    with ThreadPoolExecutor(threads) as pool:
        ordered = sorted(manifest.files.items(), key=lambda item: -item[1].num_bytes)  # large ones first: none is left for the end
        for found in pool.map(lambda item: _check_file(directory, *item), ordered):
            findings += found
    known = {*manifest.files, *NOT_IN_MANIFEST}
    present = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    findings += [Finding(name, "no such file", "a file the manifest does not name") for name in sorted(present - known)]
    for model, stored in manifest.models.items():
        boxes = [(t.name, t.box) for file in manifest.files_of("weights", model).values() for t in file.tensors]
        findings += [Finding(model, "every element once", fault) for fault in cover_faults(stored.shapes, boxes)]
    num_bytes = sum(file.num_bytes for file in manifest.files.values())
    return Verified(directory, len(manifest.files), num_bytes, time.perf_counter() - start, tuple(findings))


def describe(directory: Path) -> dict:
    """The facts of one checkpoint's manifest, as JSON."""
    manifest = manifests.read_manifest(directory)
    kinds: dict[str, list[int]] = {}
    for file in manifest.files.values():
        kinds.setdefault(f"{file.model} {file.kind}".strip(), []).append(file.num_bytes)
    facts = {name: value for name in ("parent", "attempt", "metrics") if (value := getattr(manifest, name, None))}
    return {
        "directory": str(directory),
        "format": manifest.format,
        "course": manifest.course,
        "state": dict(manifest.state),
        "layout": str(manifest.layout),
        **facts,
        "models": {name: _model_facts(manifest, name) for name in manifest.models},
        "files": {kind: {"files": len(sizes), "bytes": sum(sizes)} for kind, sizes in kinds.items()},
        "run_sha256": run_digest(manifest),
        "versions": manifest.versions,
    }


def differences(a: Path, b: Path, model: str | None = None) -> Iterator[Difference]:
    """Tensors of the weights in which two models differ; each of `a` and `b` is a checkpoint, a run, or a Hugging Face directory.

    Only a block of each is in memory at a time. `model` defaults to `actor`, else the only one. Raises `CheckpointError` or
    `WeightMapError` for what cannot be read.
    """
    first, second = _open(a, model), _open(b, model)
    names = [set(source.names()) for source in (first, second)]
    for name in dict.fromkeys([*first.names(), *second.names()]):
        if not all(name in held for held in names):
            yield Difference(name, f"only in {a if name in names[0] else b}")
        elif first.shape(name) != second.shape(name):
            yield Difference(name, f"shapes {list(first.shape(name))} and {list(second.shape(name))}")
        else:
            difference = _difference(name, first, second)
            if difference.num_different or difference.what != "values":
                yield difference


def _difference(name: str, first: TensorSource, second: TensorSource) -> Difference:
    shape, largest, different = first.shape(name), 0.0, 0
    entry = TensorEntry(name, torch.float64, shape)
    for x, y in zip(row_blocks(first, entry), row_blocks(second, entry), strict=True):
        gap = (x - y).abs()
        gap = torch.where((x == y) | (x.isnan() & y.isnan()), 0.0, gap.nan_to_num(nan=float("inf")))
        largest = max(largest, float(gap.max()) if gap.numel() else 0.0)
        different += int(gap.count_nonzero())
    types = [str(source.dtype(name)).removeprefix("torch.") for source in (first, second)]
    what = "values" if types[0] == types[1] else f"types {types[0]} and {types[1]}"
    return Difference(name, what, largest, _count(shape), different)


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _open(path: Path, model: str | None) -> TensorSource:
    checkpoint = manifests.find_checkpoint(path)
    if checkpoint is None:
        source = SafetensorsSource(path)
        held = "reward" if SCALAR_HEAD in set(source.names()) else "actor"
        if model not in (None, held) and {model, held} != {"critic", "reward"}:
            raise CheckpointError(f"{path} holds the model {held!r}; expected {model!r}")
        return source
    names = sorted(manifests.read_manifest(checkpoint).models)
    return CheckpointSource(checkpoint, model or ("actor" if "actor" in names or len(names) != 1 else names[0]))


def _listed(directory: Path, latest: str) -> Listed:
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(directory.stat().st_mtime))
    if not manifests.STEP_NAME.fullmatch(directory.name):
        is_swept = directory.name.startswith((STAGING, TRASH))
        return Listed(directory.name, "left over: swept when the run starts again" if is_swept else "set aside", written=written)
    try:
        manifest = manifests.read_manifest(directory)
    except MegarlError as error:
        return Listed(directory.name, str(error).replace(f"{directory}/", "").replace(f"{directory} ", ""), written=written)
    wrong = next((fault for path, file in manifest.files.items() if (fault := _size_fault(directory, path, file))), "")
    return Listed(
        directory.name,
        wrong,
        int(manifest.state["step"]),
        manifest.course,
        str(manifest.layout),
        tuple(manifest.models),
        sum(file.num_bytes for file in manifest.files.values()),
        written,
        directory.name == latest,
    )


def _size_fault(directory: Path, path: str, file: StoredFile) -> str:
    try:
        size = (directory / path).stat().st_size
    except OSError as error:
        return f"{path}: {error.strerror}"
    return "" if size == file.num_bytes else f"{path} has {size} bytes instead of {file.num_bytes}"


def _check_file(directory: Path, path: str, file: StoredFile) -> list[Finding]:
    try:
        size = (directory / path).stat().st_size
        if size != file.num_bytes:
            return [Finding(path, f"{file.num_bytes} bytes", f"{size} bytes")]
        digest = measure(directory / path).digest
    except OSError as error:
        return [Finding(path, f"{file.num_bytes} bytes", error.strerror or "cannot be read")]
    if digest != file.blake3:
        return [Finding(path, f"BLAKE3 {file.blake3}", digest)]
    return _check_tensors(directory, path, file)


def _check_tensors(directory: Path, path: str, file: StoredFile) -> list[Finding]:
    """Of a file that is what was written: its header against the tensors that the manifest says it holds."""
    if not file.tensors:
        return []
    try:
        opened = TensorFile(directory / path)
        parts = {key: opened.get_slice(key) for key in opened.keys()}
    except (OSError, SafetensorError) as error:
        return [Finding(path, "a safetensors file", str(error))]
    expected = {tensor.key: (tensor.dtype, [size for _, size in tensor.box]) for tensor in file.tensors}
    found = {key: (part.get_dtype(), part.get_shape()) for key, part in parts.items()}
    names = [key for key in expected.keys() & found.keys() if expected[key] != found[key]] + sorted(expected.keys() - found.keys())
    return [Finding(f"{path}: {key}", str(expected[key]), str(found.get(key, "no such tensor"))) for key in names]


def _model_facts(manifest: Manifest, model: str) -> dict:
    shapes = manifest.models[model].shapes
    dtypes = sorted({tensor.dtype for file in manifest.files_of("weights", model).values() for tensor in file.tensors})
    return {"tensors": len(shapes), "parameters": sum(_count(shape) for shape in shapes.values()), "types": dtypes}
