"""Which slice of which Hugging Face tensor goes where in vLLM's parameters, found by watching vLLM load tensors without contents.

Instead of reading a checkpoint, the load format `megarl` runs the model's own `load_weights` on meta tensors and records every copy
as a pair of boxes. So there are no tensor-parallel rules of ours for vLLM's side, and vLLM needs no weight files at all.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megarl.bridge.plan import Box, TargetBox, intersect, num_elements
from megarl.errors import WeightMapError
from megarl.rollout import vllm_platform

vllm_platform.import_vllm()

from vllm.config import ModelConfig  # noqa: E402  (the process is prepared first)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding  # noqa: E402
from vllm.model_executor.model_loader import register_model_loader  # noqa: E402
from vllm.model_executor.model_loader.base_loader import BaseModelLoader  # noqa: E402

LOAD_FORMAT = "megarl"
TRACE_ATTRIBUTE = "megarl_trace"


@dataclass(frozen=True)
class CanonicalParameter:
    """A parameter as the loader fills it, before vLLM packs it for the platform."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    num_elements_loaded: int  # the rest is vocabulary padding and stays zero


@dataclass(frozen=True)
class LoadTrace:
    """What one rank's model takes from which Hugging Face tensors."""

    targets: tuple[TargetBox, ...]
    parameters: dict[str, CanonicalParameter]


@register_model_loader(LOAD_FORMAT)
class TracingLoader(BaseModelLoader):
    """Leaves every parameter zero and the trace in the model's attribute `megarl_trace`; the first sync brings the weights.

    Reads `model_loader_extra_config["hf_shapes"]`: name -> shape of every tensor of the checkpoint that is not there.
    """

    def download_model(self, model_config: ModelConfig) -> None:
        pass

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        shapes = {name: tuple(shape) for name, shape in self.load_config.model_loader_extra_config["hf_shapes"].items()}
        setattr(model, TRACE_ATTRIBUTE, trace_loading(model, shapes, model_config.dtype))
        for parameter in model.parameters():
            parameter.data.zero_()


def trace_loading(model: nn.Module, hf_shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> LoadTrace:
    """Run `model.load_weights` on meta tensors of these shapes and say what it copies where.

    Raises `WeightMapError` for anything but copies of boxes, for a tensor the model does not take, and for parameter elements that
    nothing fills (other than vocabulary padding).
    """
    sources = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in hf_shapes.items()}
    parameters = dict(model.named_parameters())
    with _CopyRecorder(parameters, sources) as recorder:
        model.load_weights(iter(sources.items()))
    unused = sorted(set(sources) - recorder.sources_used)
    if unused:
        raise WeightMapError(
            f"vLLM's {type(model).__name__} takes nothing from {_some(unused)}: the family's weight table and vLLM disagree"
        )
    boxes: dict[str, list[TargetBox]] = defaultdict(list)
    for target in dict.fromkeys(recorder.targets):
        boxes[target.parameter].append(target)
    padding = _vocabulary_padding(model, parameters)
    canonical = {name: _check_cover(name, parameter, boxes[name], padding.get(name, 0)) for name, parameter in parameters.items()}
    return LoadTrace(tuple(target for name in parameters for target in boxes[name]), canonical)


class _CopyRecorder(TorchDispatchMode):
    """Records copies from `sources` into `parameters` instead of executing them. Other operations run."""

    def __init__(self, parameters: dict[str, Tensor], sources: dict[str, Tensor]):
        super().__init__()
        self.targets: list[TargetBox] = []
        self.sources_used: set[str] = set()
        self._parameters = {_storage(tensor): (name, tensor) for name, tensor in parameters.items()}
        self._sources = {_storage(tensor): (name, tensor) for name, tensor in sources.items()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default and args[1].is_meta:
            self._record(args[0], args[1])
            return args[0]
        return function(*args, **(kwargs or {}))

    def _record(self, target: Tensor, source: Tensor) -> None:
        parameter, base = self._parameters.get(_storage(target), (None, None))
        hf_name, full = self._sources.get(_storage(source), (None, None))
        if parameter is None or hf_name is None:
            what, where = hf_name or "a tensor it computed", parameter or "something that is no parameter"
            raise WeightMapError(f"vLLM's loader copies {what} {tuple(source.shape)} into {where} {tuple(target.shape)}; expected a slice")
        self.sources_used.add(hf_name)
        if target.numel() == 0:
            return
        hf_box, box = box_of(source, full), box_of(target, base)
        if hf_box is None or box is None or [n for _, n in hf_box if n > 1] != [n for _, n in box if n > 1]:
            raise WeightMapError(f"vLLM's loader copies {hf_name} into {parameter} by a view that is not a box (transposed or strided)")
        self.targets.append(TargetBox(hf_name, hf_box, parameter, box))


def box_of(view: Tensor, base: Tensor) -> Box | None:
    """The box of the contiguous tensor `base` that `view` looks at, or None when it is not one (strided, transposed, repeated)."""
    offsets, rest = [], view.storage_offset() - base.storage_offset()
    for stride in base.stride():
        offsets.append(rest // max(stride, 1))
        rest %= max(stride, 1)
    sizes, previous = [1] * base.dim(), -1
    for size, stride in zip(view.shape, view.stride()):
        if size == 1:
            continue
        axis = next((i for i in range(base.dim()) if base.shape[i] > 1 and base.stride(i) == stride), None)
        if axis is None or axis <= previous:
            return None
        sizes[axis], previous = size, axis
    if rest or any(offset + size > limit for offset, size, limit in zip(offsets, sizes, base.shape)):
        return None
    return tuple(zip(offsets, sizes))


def _vocabulary_padding(model: nn.Module, parameters: dict[str, Tensor]) -> dict[str, int]:
    """Trailing rows of vocabulary-parallel parameters that stand for no token."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    return {
        names[id(module.weight)]: module.weight.shape[0] - module.shard_indices.num_org_elements
        for module in model.modules()
        if isinstance(module, VocabParallelEmbedding)
    }


def _check_cover(name: str, parameter: Tensor, boxes: list[TargetBox], padding_rows: int) -> CanonicalParameter:
    for index, first in enumerate(boxes):
        for second in boxes[:index]:
            if intersect(first.parameter_box, second.parameter_box):
                raise WeightMapError(f"vLLM's loader fills a part of {name} twice: {first.hf_name} and {second.hf_name}")
    expected = (parameter.shape[0] - padding_rows) * math.prod(parameter.shape[1:])
    loaded = sum(num_elements(box.parameter_box) for box in boxes)
    beyond = any(box.parameter_box[0][0] + box.parameter_box[0][1] > parameter.shape[0] - padding_rows for box in boxes)
    if loaded != expected or beyond:
        raise WeightMapError(
            f"vLLM's parameter {name} {tuple(parameter.shape)} gets {loaded} elements from {_some([box.hf_name for box in boxes])};"
            f" expected {expected}: the family's weight table lacks a tensor"
        )
    return CanonicalParameter(tuple(parameter.shape), parameter.dtype, loaded)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") or "nothing"
