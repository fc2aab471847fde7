"""What a run needs on disk: model directories and their shapes, tokenizer, datasets, packages. Reads headers, no weights.

Something that is *missing* is a fault where the run starts and a warning where it is only checked, because a configuration for a cluster is
also read on a laptop. Something that is there and *wrong* is a fault everywhere.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path

from megarl.config import DpoRun, LessonRun, ModelConfig, PpoRun, Run, SampleRun
from megarl.config_file import RUNS, Fault
from megarl.data.check import missing_files
from megarl.errors import DamageError, MegarlError
from megarl.models.family import ModelSpec, read_spec
from megarl.planner.models import needs_reference
from megarl.rewards.check import missing_for_rewards, parts_of

_NOT_SHAPE = ("hf_config", "max_positions", "tied")  # differ between a model and its fine-tuned copies without harm


@dataclass(frozen=True)
class ModelUse:
    """A model of a run. `role` is the one its weights are opened for: `actor`, `critic` or `reward`."""

    key: str
    role: str
    path: Path
    shape: Path | None
    random_init: bool


@dataclass(frozen=True)
class Survey:
    """What was found on disk. `specs` by the model's key; `missing` and `wrong` as described above."""

    specs: dict[str, ModelSpec]
    missing: list[Fault]
    wrong: list[Fault]


def model_uses(run: Run) -> list[ModelUse]:
    """The models of a run in the order they are loaded."""
    if isinstance(run, PpoRun | SampleRun):
        configs: dict[str, tuple[str, ModelConfig]] = {"actor": ("actor", run.actor)}
        if isinstance(run, PpoRun) and run.critic is not None:
            configs["critic"] = ("critic", run.critic)
        if isinstance(run, PpoRun) and run.reference is not None:
            configs["reference"] = ("actor", run.reference)
        uses = [ModelUse(key, role, model.path, model.shape, model.random_init) for key, (role, model) in configs.items()]
        parts = [(key, part) for key, part in parts_of(run) if part.kind == "model" and part.path is not None]
        return uses + [ModelUse(key, "reward", part.path, part.shape, False) for key, part in parts]
    assert isinstance(run, LessonRun)
    models = {"model": run.model}
    if isinstance(run, DpoRun) and run.reference is not None:
        models["reference"] = run.reference
    return [ModelUse(key, run.role, model.path, model.shape, model.random_init) for key, model in models.items()]


def survey(run: Run) -> Survey:
    """Look at everything the run names."""
    found = Survey({}, [], [])
    for use in model_uses(run):
        _survey_model(use, found)
    found.missing.extend(_missing_files(run))
    found.missing.extend(_missing_packages(run))
    if isinstance(run, PpoRun | SampleRun):
        found.missing.extend(missing_for_rewards(run))
    if run.output_dir.exists() and not run.output_dir.is_dir():
        found.wrong.append(Fault(("output_dir",), f"output_dir: {run.output_dir} is a file; expected a directory or nothing there yet"))
    found.wrong.extend(_vocabulary(run, found.specs))
    found.wrong.extend(_kept_by_another(run, found.specs))
    return found


def _survey_model(use: ModelUse, found: Survey) -> None:
    declared = _spec(f"{use.key}.shape", use.shape, use.role, found) if use.shape is not None else None
    actual = _spec(f"{use.key}.path", use.path, use.role, found)
    if actual is not None and declared is not None and (differences := _differences(actual, declared)):
        key = f"{use.key}.path"
        text = f"{key}: {use.path} is another model than {use.key}.shape {use.shape} says: {differences}; expected the same shape"
        found.wrong.append(Fault((key, f"{use.key}.shape"), text))
    if actual is not None and not use.random_init:
        _survey_weights(use, found)
    if (spec := actual or declared) is not None:
        found.specs[use.key] = spec


def _survey_weights(use: ModelUse, found: Survey) -> None:
    key = f"{use.key}.path"
    if (use.path / "config.json").is_file() and not any(use.path.glob("*.safetensors")):
        remedy = f"weights, or {use.key}.random_init: true" if use.role != "reward" else "a trained reward model"
        found.missing.append(Fault((key,), f"{key}: {use.path} holds no *.safetensors; expected {remedy}"))
        return
    from megarl.checkpoint.sources import open_weights  # imports torch, so only where there are weights; reads their headers

    try:
        open_weights(use.path, use.role)
    except MegarlError as error:
        found.wrong.append(Fault((key,), f"{key}: {error}"))


def _spec(key: str, path: Path, role: str, found: Survey) -> ModelSpec | None:
    if not path.exists():
        text = f"{key}: {path} does not exist; expected a Hugging Face directory or a megarl checkpoint"
        found.missing.append(Fault((key,), text))
        return None
    if _is_run_under_way(path):
        found.missing.append(
            Fault((key,), f"{key}: {path} is the folder of a run that has published no checkpoint; expected one, or a model")
        )
        return None
    try:
        return read_spec(_spec_directory(path, role))
    except MegarlError as error:
        found.wrong.append(Fault((key,), f"{key}: {error}"))
        return None


def _is_run_under_way(path: Path) -> bool:
    """Whether this is the folder of a run, submitted or started, that has no checkpoint yet."""
    if (path / "config.json").is_file() or not any((path / name).exists() for name in ("submitted", "events.jsonl")):
        return False
    return not any((path / "checkpoints").glob("step-*"))


def _spec_directory(path: Path, role: str) -> Path:
    """The directory that holds `config.json`: `path`, or the model of this role in the newest checkpoint below it."""
    if (path / "config.json").is_file() or not path.is_dir():
        return path
    # Reading checkpoints imports torch: only when there may be one.
    from megarl.checkpoint.manifest import find_checkpoint
    from megarl.checkpoint.sources import find_model

    checkpoint = find_checkpoint(path)
    return path if checkpoint is None else find_model(checkpoint, role)


def _kept_by_another(run: Run, specs: Mapping[str, ModelSpec]) -> Iterator[Fault]:
    """The newest checkpoint in `output_dir`, if the run could not continue from it: what it would say itself, with its models loaded."""
    if isinstance(run, SampleRun) or not (run.output_dir / "checkpoints").is_dir():
        return
    # Reading checkpoints imports torch: only when there may be one.
    from megarl.checkpoint.manifest import read_manifest, step_directories
    from megarl.checkpoint.restore import check_same_run

    course = next(kind for kind, run_type in RUNS.items() if type(run) is run_type)
    for directory in reversed(step_directories(run.output_dir / "checkpoints")):
        try:
            check_same_run(directory, read_manifest(directory), course, run.precision, _kept_models(run, specs))
        except DamageError:
            continue  # the run tells, and falls back to the one before
        except MegarlError as error:
            yield Fault(("output_dir",), f"output_dir: {error}")
        return


def _kept_models(run: Run, specs: Mapping[str, ModelSpec]) -> dict[str, ModelSpec | None]:
    """The models that a run saves, by their name in checkpoints, with their shapes as far as they are known."""
    if isinstance(run, LessonRun):
        return {"actor" if run.role == "actor" else "reward": specs.get("model")}
    assert isinstance(run, PpoRun)
    kept = {"actor": specs.get("actor")} | ({"critic": specs.get("critic")} if run.critic is not None else {})
    if run.ppo.reference_refresh is not None and needs_reference(run):
        kept["reference"] = specs.get("actor" if run.reference is None else "reference")
    return kept


def _differences(actual: ModelSpec, declared: ModelSpec) -> str:
    names = [field.name for field in fields(ModelSpec) if field.name not in _NOT_SHAPE]
    differing = [name for name in names if getattr(actual, name) != getattr(declared, name)]
    return ", ".join(f"{name} {getattr(actual, name)} instead of {getattr(declared, name)}" for name in differing)


def _missing_files(run: Run) -> Iterator[Fault]:
    if not run.tokenizer.exists():
        text = f"{run.tokenizer} does not exist; expected a sentencepiece .model file or a Hugging Face directory"
        yield Fault(("tokenizer",), f"tokenizer: {text}")
    yield from missing_files(run)
    for source in run.ppo.ptx.data.files() if isinstance(run, PpoRun) and run.ppo.ptx is not None else ():
        if source.path is not None and not source.path.exists():
            yield Fault(("ppo.ptx.data.path",), f"ppo.ptx.data.path: {source.path} does not exist; expected a file of demonstrations")


def _missing_packages(run: Run) -> Iterator[Fault]:
    wanted = {"log.tensorboard": ("tensorboard", run.log.tensorboard), "log.wandb_project": ("wandb", run.log.wandb_project is not None)}
    for key, (package, is_wanted) in wanted.items():
        if is_wanted and find_spec(package) is None:
            yield Fault((key,), f"{key}: needs the package {package}, which is not installed here; run pip install {package}")


def _vocabulary(run: Run, specs: dict[str, ModelSpec]) -> Iterator[Fault]:
    size = _tokenizer_size(run.tokenizer)
    for key, spec in specs.items():
        if size is not None and size > spec.vocab_size:
            text = (
                f"tokenizer: {run.tokenizer} has {size} tokens but {key} has a vocabulary of {spec.vocab_size};"
                f" expected the tokenizer that {key} was trained with"
            )
            yield Fault(("tokenizer", key), text)


def _tokenizer_size(path: Path) -> int | None:
    """Number of tokens, as far as it can be read without loading transformers; None when that needs the real loader."""
    if path.is_dir() and not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        path = path / "tokenizer.model"
    if path.is_file() and path.suffix == ".model":
        import sentencepiece

        try:
            return sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()
        except (RuntimeError, OSError):
            return None
    try:
        content = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
        return max(ids + [token["id"] for token in content.get("added_tokens", [])]) + 1
    except (OSError, ValueError, KeyError, TypeError):
        return None
