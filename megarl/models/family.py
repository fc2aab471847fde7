"""The families megarl knows, and the way from a Hugging Face directory to a `ModelSpec`. Pure: no torch, no Megatron.

To add a family, write one file like `mistral.py`: a config translation, and a weight table where neither `dense_decoder` nor
`sparse_decoder` serves; then list it in `FAMILIES` (docs/adding_a_model.md).
"""

import json
from pathlib import Path
from typing import Any

from megarl.errors import WeightMapError
from megarl.models.gemma3 import GEMMA3
from megarl.models.hf_config import Family, HfConfig
from megarl.models.llama import LLAMA
from megarl.models.mistral import MISTRAL
from megarl.models.mixtral import MIXTRAL
from megarl.models.qwen2 import QWEN2
from megarl.models.qwen3 import QWEN3
from megarl.models.qwen3_moe import QWEN3_MOE
from megarl.models.spec import Mixture, ModelSpec, Role, Rows, WeightTable, check_layout, end_ids, padded_vocab, stage_layers

__all__ = [
    "FAMILIES",
    "Family",
    "Mixture",
    "ModelSpec",
    "Role",
    "Rows",
    "WeightTable",
    "check_layout",
    "padded_vocab",
    "read_spec",
    "spec_from_hf_config",
    "stage_layers",
]

FAMILIES: dict[str, Family] = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA3, MIXTRAL, QWEN3_MOE)}


def read_spec(directory: Path) -> ModelSpec:
    """The model that `directory`/config.json describes, with the end tokens of a generation_config.json beside it.

    Raises `WeightMapError` for a missing, broken or unknown config.json.
    """
    path = Path(directory) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightMapError(f"{path} cannot be read ({error.strerror}); expected a Hugging Face model directory") from error
    except ValueError as error:
        raise WeightMapError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise WeightMapError(f"{path} holds a {type(values).__name__}; expected a JSON object")
    return spec_from_hf_config(_with_end_tokens(values, path.with_name("generation_config.json")), where=str(path))


def spec_from_hf_config(values: dict[str, Any], where: str = "hf_config") -> ModelSpec:
    """The model that these keys of a config.json describe; `where` names their file in messages."""
    config = HfConfig(values, where)
    config.refuse_what_no_family_computes()
    kind, architectures = values.get("model_type"), values.get("architectures") or []
    if kind not in FAMILIES:
        raise WeightMapError(
            f"{where}: model_type is {kind!r}; megarl has tables for {', '.join(FAMILIES)}:"
            " to add one, a file in megarl/models, see docs/adding_a_model.md"
        )
    family = FAMILIES[kind]
    unknown = [name for name in architectures if name not in family.architectures]
    if unknown:
        raise WeightMapError(f"{where}: architectures holds {unknown[0]!r}; the {kind} table serves {' and '.join(family.architectures)}")
    spec = family.translate(config)
    config.refuse_other_layers(spec)
    return spec


def _with_end_tokens(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """The config with the end-of-text ids of `path` after its own: chat models often name several, and some only there."""
    try:
        generation = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return values
    ends = [*end_ids(values), *end_ids(generation if isinstance(generation, dict) else {})]
    return values | {"eos_token_id": list(dict.fromkeys(ends))} if set(ends) > set(end_ids(values)) else values
