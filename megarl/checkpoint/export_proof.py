"""What is proven about a Hugging Face directory, written or to be read: transformers knows every tensor, and computes what we compute."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

from megarl.config import ParallelConfig
from megarl.errors import CheckpointError
from megarl.models.build import build_model
from megarl.models.pieces import TensorSource, load_pieces, source_pieces
from megarl.models.spec import ModelSpec, Role
from megarl.parallel import device, groups
from megarl.parallel.layout import ParallelLayout

Proof = Literal["auto", "logits", "elements"]
LOGITS_PARAMETERS = 300_000_000  # of the largest model whose logits are compared unasked: twice 1.2 GB in float32
TOLERANCE = 1e-3  # of the largest logit; both sides compute in float32
PROMPT_TOKENS = (1, 7, 33)


def check_names(directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Compare tensors named `shapes` with those transformers expects in `directory`, without weights; returns what was found equal.

    Raises `CheckpointError` naming the first tensors that only one side has, or has in another shape.
    """
    expected = names_of_transformers(directory)
    differing = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != _tuple(shapes.get(name)))
    if differing:
        told = [f"{name} {_tuple(shapes.get(name))} instead of {expected.get(name)}" for name in differing[:3]]
        raise CheckpointError(f"{directory}: {len(differing)} tensors are not those transformers expects: {'; '.join(told)}")
    return f"transformers expects exactly these {len(expected)} tensors, by name and shape"


def names_of_transformers(directory: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that transformers would save for the config.json of `directory`: takes no memory for weights."""
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    with torch.device("meta"):
        model = _auto(config.architectures[0]).from_config(config)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}


def compare_logits(directory: Path, spec: ModelSpec, role: Role, source: TensorSource, layout: ParallelLayout | None = None) -> str:
    """Load `directory` with transformers and `source` into Megatron's layers, and compare what they compute; returns the sentence about it.

    Both in float32, `source` rounded to the types of the directory by the caller. `layout` is that of the process, when it has one.
    Raises `CheckpointError` when a tensor was not loaded as it is, or a number differs by more than `TOLERANCE` of the largest.
    """
    prompts = fixed_prompts(spec)
    theirs = _transformers_outputs(directory, prompts)
    ours = _own_outputs(spec, role, source, prompts, layout)
    size = max(float(output.abs().max()) for output in ours)
    difference = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    what = "logits" if role == "actor" else "values of every token"
    if not difference <= TOLERANCE * max(1.0, size):
        raise CheckpointError(
            f"{directory}: {what} of transformers differ from megarl's by {difference:.3g} (largest {size:.3g}); expected at most"
            f" {TOLERANCE:g} of it"
        )
    return f"{what} on {len(prompts)} fixed prompts: transformers and megarl's Megatron layers differ by at most {difference:.2g} (float32)"


def fixed_prompts(spec: ModelSpec) -> list[torch.Tensor]:
    """Rows of token ids i64[1, T], spread over the vocabulary, the same for every model of its size; padding and end tokens left out."""
    special = {*spec.end_ids, spec.hf_config.get("pad_token_id"), spec.hf_config.get("bos_token_id")}
    ids = [(97 + 7919 * i) % spec.vocab_size for i in range(4 * max(PROMPT_TOKENS))]
    ids = [i for i in ids if i not in special] or [0]
    lengths = sorted({min(count, spec.max_positions, len(ids)) for count in PROMPT_TOKENS})
    return [torch.tensor([ids[-length:]]) for length in lengths]


def _auto(architecture: str) -> type:
    return AutoModelForSequenceClassification if architecture.endswith("ForSequenceClassification") else AutoModelForCausalLM


@torch.no_grad()
def _transformers_outputs(directory: Path, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    auto = _auto(config.architectures[0])
    has_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model, info = auto.from_pretrained(directory, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    finally:
        if has_bars:
            transformers_logging.enable_progress_bar()
    model.eval()
    if wrong := [f"{kind} {sorted(map(str, keys))[:3]}" for kind, keys in info.items() if keys]:
        raise CheckpointError(f"{directory}: transformers did not load it as it is: {', '.join(wrong)}")
    if auto is AutoModelForCausalLM:
        return [model(ids).logits[0].float() for ids in prompts]
    values = [model.score(model.base_model(ids).last_hidden_state)[0].float() for ids in prompts]
    for ids, row in zip(prompts, values, strict=True):  # the pooling a user meets: the head at the last token
        if not torch.allclose(model(ids).logits[0], row[-1], rtol=TOLERANCE, atol=TOLERANCE):
            raise CheckpointError(f"{directory}: transformers' score of a text is not the head's value at its last token")
    return values


@torch.no_grad()
def _own_outputs(
    spec: ModelSpec, role: Role, source: TensorSource, prompts: list[torch.Tensor], layout: ParallelLayout | None
) -> list[torch.Tensor]:
    parallel, had_groups = ParallelConfig(), dist.is_initialized()
    layout = layout or groups.initialize(parallel, seed=0)
    try:
        (chunk,) = build_model(spec, role, parallel, "fp32", layout)
        load_pieces(source_pieces([chunk], spec.table(role)), source)
        chunk.eval()
        outputs = []
        for ids in prompts:
            hidden = chunk(ids.to(device.device()), torch.arange(ids.shape[1], device=device.device())[None])
            if role == "actor":
                outputs.append((hidden[:, 0].float() @ chunk.output_weight().float().T)[:, : spec.vocab_size].cpu())
            else:
                outputs.append(chunk.output_layer(hidden)[:, :1].cpu())
        return outputs
    finally:
        if not had_groups:
            groups.shutdown()


def _tuple(shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return None if shape is None else tuple(shape)
