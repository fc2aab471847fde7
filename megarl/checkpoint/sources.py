"""Where weights are read from: a Hugging Face directory or a megarl checkpoint, both seen as named tensors of which boxes can be read."""

import json
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError

from megarl.bridge.plan import Box, intersect, num_elements, within
from megarl.checkpoint import manifest as manifests
from megarl.checkpoint.hf_directory import check_tensors
from megarl.checkpoint.manifest import Manifest, StoredTensor
from megarl.checkpoint.publish import GENERATION
from megarl.checkpoint.sharded import DTYPES, whole
from megarl.checkpoint.tensor_file import TensorFile
from megarl.config import ModelConfig
from megarl.errors import CheckpointError, DamageError, WeightMapError
from megarl.models.decoder_table import SCALAR_HEAD
from megarl.models.family import ModelSpec, Role, read_spec
from megarl.models.pieces import TensorSource
from megarl.models.random_weights import RandomSource

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_OPEN = 64  # files of a checkpoint at a time: their number grows with the ranks that wrote it, a process' descriptors do not
HEAD_SEED = 0  # every rank, run and resume starts from the same new head


class SafetensorsSource:
    """Tensors of a Hugging Face directory, sharded or single. Reads only the asked boxes; files are never loaded whole.

    Raises `WeightMapError` for a directory without safetensors files, a weight map that leaves the directory, and a missing tensor.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self._files: dict[str, TensorFile] = {}
        self._file_of = self._read_index()

    def names(self) -> Iterable[str]:
        return self._file_of.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        stored = self._slice(name).get_dtype()
        if stored not in DTYPES:
            raise WeightMapError(
                f"{self.directory / self._file_of[name]}: tensor {name} is stored as {stored}; expected one of {', '.join(DTYPES)}:"
                " save the model without quantisation first"
            )
        return DTYPES[stored]

    def file_of(self, name: str) -> str:
        """The file that holds a tensor."""
        if name not in self._file_of:
            where = INDEX if (self.directory / INDEX).is_file() else SINGLE
            raise WeightMapError(f"{self.directory / where}: tensor {name} is missing; the model's config.json asks for it")
        return self._file_of[name]

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The elements of `box`, in the stored dtype, on the CPU."""
        part = self._slice(name)
        shape = tuple(part.get_shape())
        if len(shape) != len(box) or any(offset + size > full for (offset, size), full in zip(box, shape, strict=True)):
            expected = [offset + size for offset, size in box]
            raise WeightMapError(f"{self.directory / self._file_of[name]}: {name} has shape {list(shape)}; expected at least {expected}")
        try:
            return part[within(box, whole(shape))]
        except (OSError, SafetensorError) as error:
            raise WeightMapError(f"{self.directory / self._file_of[name]}: tensor {name}: {error}") from error

    def _slice(self, name: str):
        file = self.file_of(name)
        try:
            return self._open(file).get_slice(name)
        except SafetensorError as error:
            raise WeightMapError(f"{self.directory / file}: tensor {name}: {error}") from error

    def _open(self, file: str) -> TensorFile:
        if file not in self._files:
            try:
                self._files[file] = TensorFile(self.directory / file)
            except (OSError, SafetensorError) as error:
                raise WeightMapError(f"{self.directory / file} cannot be read as safetensors: {error}") from error
        return self._files[file]

    def _read_index(self) -> dict[str, str]:
        index = self.directory / INDEX
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
                pairs = {str(name): str(file) for name, file in weight_map.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise WeightMapError(f"{index} is not a safetensors index: expected an object with a weight_map ({error})") from error
            for name, file in pairs.items():
                if not manifests.is_inside(file) or len(PurePosixPath(file).parts) != 1:
                    raise WeightMapError(f"{index}: weight_map puts {name} in {file!r}; expected a file name in this directory: refused")
            return pairs
        if (self.directory / SINGLE).is_file():
            return {name: SINGLE for name in self._open(SINGLE).keys()}
        if pickles := sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in self.directory.glob(pattern)):
            raise WeightMapError(
                f"{self.directory} holds {pickles[0]}, a pickle, which could run code when read; expected {SINGLE}: if you trust it,"
                " convert it with transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
            )
        raise WeightMapError(f"{self.directory} holds no weights: expected {SINGLE} or {INDEX}")


class CheckpointFiles:
    """The tensor files of a checkpoint, opened when asked for; at most `MAX_OPEN` at a time, never loaded whole.

    Each file is verified against its hash when first opened, unless `is_verified` says that somebody did. Raises `DamageError`.
    """

    def __init__(self, directory: Path, manifest: Manifest | None = None, is_verified: bool = False):
        self.directory = Path(directory)
        self.manifest = manifest or manifests.read_manifest(self.directory)
        self._verified = set(self.manifest.files) if is_verified else set()
        self._open: OrderedDict[str, TensorFile] = OrderedDict()

    def read(self, path: str, key: str, where: tuple[slice, ...]) -> torch.Tensor:
        """A part of one stored tensor."""
        try:
            return self._opened(path).get_slice(key)[where]
        except (OSError, SafetensorError) as error:
            raise DamageError(f"{self.directory / path}: {key}: {error}") from error

    def read_all(self, path: str) -> dict[str, torch.Tensor]:
        """Every tensor of a small file."""
        opened = self._opened(path)
        return {key: self.read(path, key, tuple(slice(size) for size in opened.get_slice(key).get_shape())) for key in opened.keys()}

    def _opened(self, path: str) -> TensorFile:
        if path not in self._verified:
            manifests.verify(self.directory, path, self.manifest.files[path])
            self._verified.add(path)
        if path not in self._open:
            try:
                self._open[path] = TensorFile(self.directory / path)
            except (OSError, SafetensorError) as error:
                raise DamageError(f"{self.directory / path} cannot be read as safetensors: {error}") from error
        self._open.move_to_end(path)
        while len(self._open) > MAX_OPEN:
            self._open.popitem(last=False)
        return self._open[path]


class CheckpointSource:
    """Tensors of one model of a megarl checkpoint, whatever layout wrote it: its weights, or what the optimizer holds in `slot` for them.

    Raises `CheckpointError` for an unknown model, a damaged file and a tensor that is not wholly there.
    """

    def __init__(self, directory: Path, model: str, slot: str = "weight", files: CheckpointFiles | None = None):
        self._files = files or CheckpointFiles(directory)
        self.directory, self.manifest = self._files.directory, self._files.manifest
        if model not in self.manifest.models:
            raise CheckpointError(f"{directory} holds the models {sorted(self.manifest.models)}; expected {model!r}")
        self.model, self.slot = model, slot
        self._pieces: dict[str, list[tuple[str, StoredTensor]]] = {}
        for path, file in self.manifest.files_of("weights" if slot == "weight" else "optimizer", model).items():
            for tensor in file.tensors:
                if tensor.slot == slot:
                    self._pieces.setdefault(tensor.name, []).append((path, tensor))

    def names(self) -> Iterable[str]:
        return self._pieces.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        self._pieces_of(name)
        return tuple(self.manifest.models[self.model].shapes[name])

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._pieces_of(name)[0][1].dtype]

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The elements of `box`, put together from the pieces that hold them, in the stored dtype, on the CPU."""
        pieces = self._pieces_of(name)
        if len(box) != len(self.shape(name)):
            raise CheckpointError(f"{self.directory}: {name} has shape {list(self.shape(name))}; the model asks for the box {box}")
        out = torch.empty([size for _, size in box], dtype=self.dtype(name))
        found = 0
        for path, piece in pieces:
            if (shared := intersect(piece.box, box)) is not None:
                out[within(shared, box)] = self._files.read(path, piece.key, within(shared, piece.box))
                found += num_elements(shared)
        if found != num_elements(box):
            raise CheckpointError(f"{self.directory}: {name} has {found} of the {num_elements(box)} elements in the box {box}")
        return out

    def _pieces_of(self, name: str) -> list[tuple[str, StoredTensor]]:
        if name not in self._pieces:
            what = "tensor" if self.slot == "weight" else f"{self.slot} of the tensor"
            raise CheckpointError(f"{self.directory}: model {self.model} holds no {what} {name}")
        return self._pieces[name]


class AveragedSource:
    """The moving average of a model's weights (`ppo.ema`), f32; of a weight that was frozen, which has none, the weight itself.

    Raises `CheckpointError` where the checkpoint holds no average of the model.
    """

    def __init__(self, directory: Path, model: str):
        files = CheckpointFiles(directory)
        self._weights, self._averages = (CheckpointSource(directory, model, slot, files) for slot in ("weight", "ema"))
        self._averaged = set(self._averages.names())
        if not self._averaged:
            raise CheckpointError(f"{directory} holds no moving average of {model}; expected a run with ppo.ema")

    def names(self) -> Iterable[str]:
        return self._weights.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """The weights': what an export is written in by default."""
        return self._weights.dtype(name)

    def read(self, name: str, box: Box) -> torch.Tensor:
        return (self._averages if name in self._averaged else self._weights).read(name, box)


class WithNewHead:
    """A language model's tensors and a scalar head drawn from `drawn`: how a critic or a reward model starts from one."""

    def __init__(self, source: TensorSource, drawn: RandomSource):
        self._source, self._drawn = source, drawn

    def names(self) -> Iterable[str]:
        return [*self._source.names(), SCALAR_HEAD]

    def shape(self, name: str) -> tuple[int, ...]:
        return (self._drawn if name == SCALAR_HEAD else self._source).shape(name)

    def read(self, name: str, box: Box) -> torch.Tensor:
        return (self._drawn if name == SCALAR_HEAD else self._source).read(name, box)


def open_weights(path: Path, role: str) -> tuple[ModelSpec, TensorSource]:
    """The model at `path`, to start a model of `role` from.

    `path` is a Hugging Face directory, a megarl checkpoint, or a run's output directory (its newest complete checkpoint counts).
    Roles: `actor` needs a language model; `critic` takes a model with a scalar head when there is one, else a language model whose head is
    replaced by a random one, N(0, 0.02^2) and the same in every run; `reward` needs a trained reward model.
    Raises `CheckpointError` or `WeightMapError`, naming the path.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; expected a Hugging Face directory or a megarl checkpoint")
    if (checkpoint := manifests.find_checkpoint(path)) is not None:
        spec, source, has_head = _open_checkpoint(checkpoint, role)
    elif (path / "config.json").is_file():
        spec, source, has_head = _open_hugging_face(path, role)
    else:
        raise CheckpointError(
            f"{path} is neither a Hugging Face directory (no config.json) nor a megarl checkpoint ({manifests.MANIFEST}), and holds no"
            " finished checkpoint of a run (checkpoints/step-*)"
        )
    table = spec.table("actor" if role == "actor" else "critic")
    if not has_head:
        source = WithNewHead(source, RandomSource(table, HEAD_SEED))
    check_shapes(path, table.hf_shapes, source)
    return spec, source


def open_start(model: ModelConfig, role: Role, seed: int) -> tuple[ModelSpec, TensorSource]:
    """What a model of a run starts from: the weights at its path, or random ones of the same shape. Raises as `open_weights` does."""
    if not model.random_init:
        return open_weights(model.path, role)
    spec = read_spec(model.path)
    return spec, RandomSource(spec.table(role), seed, spec.standard_deviation)


def generation_config(path: Path, model: str) -> str:
    """The text of the generation_config.json that came with the model at `path` (as for `open_weights`); empty where there is none."""
    checkpoint = manifests.find_checkpoint(path)
    try:
        text = ((path if checkpoint is None else checkpoint / model) / GENERATION).read_text(encoding="utf-8")
        return text if isinstance(json.loads(text), dict) else ""
    except (OSError, ValueError):
        return ""


def check_shapes(path: Path, shapes: dict[str, tuple[int, ...]], source: TensorSource) -> None:
    """Raise `WeightMapError` when `source` lacks a tensor of the table or holds it in another shape."""
    for name, expected in shapes.items():
        if tuple(source.shape(name)) != tuple(expected):
            raise WeightMapError(
                f"{path}: tensor {name} has shape {list(source.shape(name))}; config.json describes a model where it has {list(expected)}"
            )


def find_model(directory: Path, role: str) -> Path:
    """The directory inside a checkpoint that holds the model a model of `role` starts from. Raises `CheckpointError` when there is none."""
    models = manifests.read_manifest(directory).models
    preferred = {"actor": ["actor"], "critic": ["critic", "reward", "actor"], "reward": ["reward"]}[role]
    model = next((name for name in preferred if name in models), None)
    if model is None:
        wanted = "a reward model" if role == "reward" else "a language model"
        raise CheckpointError(f"{directory} holds the models {sorted(models)}; expected {wanted} for the role {role}")
    return directory / model


def _open_checkpoint(checkpoint: Path, role: str) -> tuple[ModelSpec, TensorSource, bool]:
    directory = find_model(checkpoint, role)
    source = CheckpointSource(checkpoint, directory.name)
    return read_spec(directory), source, role == "actor" or manifests.ROLES[directory.name] == "critic"


def _open_hugging_face(directory: Path, role: str) -> tuple[ModelSpec, TensorSource, bool]:
    spec, source = read_spec(directory), SafetensorsSource(directory)
    has_score = SCALAR_HEAD in set(source.names())
    if role == "actor" and has_score:
        raise CheckpointError(f"{directory} holds a reward model ({SCALAR_HEAD}); expected a language model for the actor")
    if role == "reward" and not has_score:
        raise CheckpointError(f"{directory} holds no {SCALAR_HEAD}; expected a trained reward model")
    check_tensors(source, spec, "critic" if has_score else "actor")
    return spec, source, role == "actor" or has_score
