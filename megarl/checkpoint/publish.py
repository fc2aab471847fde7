"""The last act of writing a checkpoint: what lies beside the weights, the manifest, and the rename that makes it count."""

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

from megarl.checkpoint.manifest import LATEST, MANIFEST, MANIFEST_HASH, Manifest, StoredFile, StoredTokenizer, manifest_hash_line
from megarl.checkpoint.sharded import WrittenFile, sync, write_bytes, write_text
from megarl.data.tokenizers import Tokenizer
from megarl.errors import SetupError

STAGING, TRASH = ".staging-", ".trash-"
GENERATION = "generation_config.json"
SPARE_BYTES = 64 << 20  # left free beside what is written: small files, file system overhead
NOT_WRITTEN = WrittenFile(0, "")


def check_room(directory: Path, needed: int, what: str, remedy: str) -> None:
    """Raise `SetupError` naming needed and free bytes when the file system of `directory` has no room."""
    free = shutil.disk_usage(directory).free
    if free < needed + SPARE_BYTES:
        raise SetupError(f"{directory} has {free} bytes free; {what} {needed + SPARE_BYTES}: free some disk, {remedy}")


def start_output(out: Path, needed: int, what: str, verb: str) -> Path:
    """A new, empty staging directory beside `out`, which will become `out`.

    Raises `SetupError` when `out` exists and is not empty, its place cannot be written, or its disk has no room for `needed` bytes.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SetupError(f"{out} exists and is not an empty directory: choose another directory to {verb} to")
    staging = out.with_name(STAGING + out.name)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        check_room(out.parent, needed, f"{what} needs", f"or {verb} to another disk")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
    except OSError as error:
        raise SetupError(f"{error.filename or out}: {error.strerror}: choose another directory to {verb} to") from error
    return staging


def stored(kind: str, written: WrittenFile, **fields) -> StoredFile:
    """The manifest's entry of a file."""
    return StoredFile(kind=kind, num_bytes=written.num_bytes, blake3=written.digest, **fields)


def with_digest(file: StoredFile, written: WrittenFile) -> StoredFile:
    """The same entry with size and hash of what was written."""
    return file.model_copy(update={"num_bytes": written.num_bytes, "blake3": written.digest})


def publish(staging: Path, final: Path, manifest: Manifest, check: Callable[[], None] = lambda: None) -> None:
    """Make a finished staging directory the checkpoint `final`: manifest last, everything on disk, one rename.

    `check` is asked in the last moment whether it may be published; it raises where not.
    """
    text = manifest.model_dump_json()
    write_text(staging / MANIFEST_HASH, manifest_hash_line(hashlib.sha256(text.encode()).hexdigest()).decode())
    write_text(staging / MANIFEST, text)
    for path in sorted({(staging / name).parent for name in manifest.files} | {staging}):
        sync(path)
    check()
    if final.exists():
        discard(final)
    os.rename(staging, final)
    sync(final.parent)


def point_to(final: Path) -> None:
    """Replace the pointer `latest` beside a published checkpoint, for people and other programs; megarl itself reads manifests."""
    pointer = final.with_name(STAGING + LATEST)
    write_text(pointer, final.name + "\n")
    os.replace(pointer, final.with_name(LATEST))
    sync(final.parent)


def write_config(staging: Path, model: str, hf_config: dict, generation: str = "") -> dict[str, StoredFile]:
    """Write the model's Hugging Face configuration into the checkpoint, and the text of its generation_config.json when there is one."""
    texts = {f"{model}/config.json": json.dumps(hf_config, indent=1)} | ({f"{model}/{GENERATION}": generation} if generation else {})
    return {path: stored("config", write_text(staging / path, text), model=model) for path, text in texts.items()}


def write_files(staging: Path, folder: str, texts: Mapping[str, bytes]) -> dict[str, StoredFile]:
    """Write small files, given by their paths in `folder`, into the checkpoint; they are of the kind that the folder is called."""
    files = {}
    for name, data in texts.items():
        path = staging / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        files[f"{folder}/{name}"] = stored(folder, write_bytes(path, data))
    return files


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The tokenizer's files by their paths, so that an export of the checkpoint needs nothing else."""
    with tempfile.TemporaryDirectory(prefix="megarl-tokenizer-") as place:
        directory = Path(place)
        tokenizer.save_for_export(directory)
        found = sorted(path for path in directory.rglob("*") if path.is_file())
        return {path.relative_to(directory).as_posix(): path.read_bytes() for path in found}


def write_tokenizer(staging: Path, tokenizer: Tokenizer) -> dict[str, StoredFile]:
    """Write the tokenizer's files into the checkpoint."""
    return write_files(staging, "tokenizer", tokenizer_files(tokenizer))


def special_tokens(tokenizer: Tokenizer) -> StoredTokenizer:
    """Ids of the special tokens, for the exported configuration."""
    return StoredTokenizer(eos_id=tokenizer.eos_id, bos_id=tokenizer.bos_id, pad_id=tokenizer.pad_id)


def versions() -> dict[str, str]:
    """Versions of what decides the numbers of a run."""
    found = {"python": platform.python_version()}
    for package in ("megarl", "torch", "megatron-core"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def discard(directory: Path) -> None:
    """Remove a checkpoint so that a half-removed one is never taken for a whole one."""
    trash = directory.with_name(TRASH + directory.name)
    os.rename(directory, trash)
    shutil.rmtree(trash)
