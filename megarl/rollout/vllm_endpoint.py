"""Writes weights into a running vLLM model, whatever vLLM did to them after loading.

The sync fills tensors in the layout of vLLM's loader. On a GPU the parameters of unquantised models keep that layout (those of experts
with the Triton kernels, which `vllm_engine` asks for) and are written in place. On a CPU vLLM packs every linear weight and leaves an
empty parameter, and packs experts into parameters of the same shape; there the sync fills a staging tensor and vLLM's own post-load
processing runs again. Which case applies is decided once for each parameter; unknown cases are refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megarl.bridge.plan import TargetBox
from megarl.errors import WeightMapError
from megarl.rollout import vllm_platform
from megarl.rollout.vllm_loader import TRACE_ATTRIBUTE, CanonicalParameter, LoadTrace

vllm_platform.import_vllm()

from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend  # noqa: E402  (the process is prepared first)
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod  # noqa: E402
from vllm.model_executor.layers.linear import UnquantizedLinearMethod  # noqa: E402
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402

KNOWN_METHODS = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod, UnquantizedFusedMoEMethod)
PACKED_ON_CPU = (UnquantizedLinearMethod, UnquantizedFusedMoEMethod)


@dataclass(frozen=True)
class _Place:
    """Where a canonical parameter lives in the running model."""

    module: nn.Module
    attribute: str
    canonical: CanonicalParameter
    address: int | None  # of a parameter written in place: CUDA graphs remember it, so it must never move


class Endpoint:
    """The writing side of one rank's vLLM model that was loaded with load format `megarl`.

    A sync calls `begin`, `target` for the tensors to fill, `commit` as parameters become complete, and `finish` at the end.
    Raises `WeightMapError` when the model holds a layer whose processed weights cannot be written.
    """

    def __init__(self, model: nn.Module):
        trace: LoadTrace | None = getattr(model, TRACE_ATTRIBUTE, None)
        assert trace is not None, "the model was not loaded with load format megarl"
        self.targets: tuple[TargetBox, ...] = trace.targets
        self._places = {name: self._locate(model, name, canonical) for name, canonical in trace.parameters.items()}
        dtypes = {canonical.dtype for canonical in trace.parameters.values()}
        if len(dtypes) != 1:
            raise WeightMapError(f"vLLM's parameters have several types ({', '.join(map(str, dtypes))}); expected one")
        self.dtype: torch.dtype = dtypes.pop()
        self._staged: dict[str, Tensor] = {}
        self._waiting: dict[nn.Module, set[str]] = {}
        self._with_derived_copies = [module for module in model.modules() if _keeps_derived_copy(module)]

    def _locate(self, model: nn.Module, name: str, canonical: CanonicalParameter) -> _Place:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        live, method = getattr(module, attribute), getattr(module, "quant_method", None)
        in_place = tuple(live.shape) == canonical.shape and live.dtype == canonical.dtype and live.is_contiguous()
        if method is not None and type(method) not in KNOWN_METHODS:
            raise WeightMapError(
                f"vLLM processes {name} with {type(method).__name__}; megarl can update weights of {_names(KNOWN_METHODS)} only:"
                " serve the model unquantised"
            )
        if type(method) is UnquantizedFusedMoEMethod:
            in_place = self._experts_stay(name, method)
        if not in_place and not (current_platform.is_cpu() and type(method) in PACKED_ON_CPU):
            raise WeightMapError(
                f"vLLM keeps {name} of {type(module).__name__} as {live.dtype} {tuple(live.shape)}, loaded as {canonical.dtype}"
                f" {canonical.shape}; megarl does not know how to update it on {current_platform.device_name}"
            )
        return _Place(module, attribute, canonical, live.data_ptr() if in_place else None)

    @staticmethod
    def _experts_stay(name: str, method: UnquantizedFusedMoEMethod) -> bool:
        """False where experts are packed; shapes do not tell."""
        if current_platform.is_cpu():
            return False
        if method.unquantized_backend is not UnquantizedMoeBackend.TRITON:
            raise WeightMapError(
                f"vLLM computes {name} with its {method.unquantized_backend.name} kernels, which keep experts in a layout of their own;"
                " megarl can update those of TRITON"
            )
        return True

    def begin(self) -> None:
        """The first call of a sync: forget what an interrupted one left behind."""
        self._staged.clear()
        self._waiting.clear()

    def target(self, parameter: str) -> Tensor:
        """The tensor to copy slices of `parameter` into: the live parameter, or a staging tensor of its layout (padding is zero)."""
        place = self._places[parameter]
        if place.address is not None:
            live = getattr(place.module, place.attribute).data
            assert live.data_ptr() == place.address, f"{parameter} moved"
            return live
        if parameter not in self._staged:
            self._staged[parameter] = torch.zeros(place.canonical.shape, dtype=place.canonical.dtype)
        return self._staged[parameter]

    def is_live(self, parameter: str) -> bool:
        """True when the parameter is written in place, without staging."""
        return self._places[parameter].address is not None

    def commit(self, parameters: Sequence[str]) -> None:
        """These parameters are complete. A packed module is processed, and its staging freed, when all its packed parameters are."""
        for name in parameters:
            place = self._places[name]
            if place.address is None:
                waiting = self._waiting.setdefault(place.module, self._packed_parameters(place.module))
                waiting.remove(name)
                if not waiting:
                    self._process(place.module)

    def finish(self) -> None:
        """The last call of a sync: refresh copies that vLLM derived from live parameters."""
        assert not self._waiting and not self._staged, f"parameters never completed: {sorted(self._staged)}"
        for module in self._with_derived_copies:  # output layer and embedding on a CPU, tied ones included
            module.quant_method.process_weights_after_loading(module)

    def _packed_parameters(self, module: nn.Module) -> set[str]:
        return {name for name, place in self._places.items() if place.module is module and place.address is None}

    def _process(self, module: nn.Module) -> None:
        for name in self._packed_parameters(module):
            getattr(module, self._places[name].attribute).data = self._staged.pop(name)
        method = module.quant_method
        if isinstance(method, UnquantizedFusedMoEMethod):  # processed a second time, the method itself would leave the packing out
            method.moe_kernel.fused_experts.process_weights_after_loading(module)
        else:
            method.process_weights_after_loading(module)
        del self._waiting[module]


def _keeps_derived_copy(module: nn.Module) -> bool:
    """True for layers whose parameter is live while a packed copy of it does the work."""
    return current_platform.is_cpu() and isinstance(getattr(module, "quant_method", None), UnquantizedEmbeddingMethod)


def _names(kinds: Sequence[type]) -> str:
    return ", ".join(kind.__name__ for kind in kinds)
