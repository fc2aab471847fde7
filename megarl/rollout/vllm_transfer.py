"""megarl's bridge as a vLLM weight-transfer backend, by vLLM's public extension points.

An engine built with load format `megarl` and `weight_transfer_config={"backend": "megarl"}` takes weights through vLLM's own calls:
`init_weight_transfer_engine` (once: this worker's `Delivery`), then for each sync `start_weight_update`, `update_weights` and
`finish_weight_update`. Generation must be paused meanwhile. `rollout.worker` drives it in generators of their own.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megarl.bridge.plan import Op, TargetBox
from megarl.bridge.sync import slice_of_parameter
from megarl.bridge.transport import BufferedTransport
from megarl.bridge.verify import digest
from megarl.bridge.wires import Delivery, SyncWire, receiving_wire
from megarl.parallel import device
from megarl.rollout import vllm_platform
from megarl.rollout.vllm_endpoint import Endpoint

vllm_platform.import_vllm()

from vllm.distributed.weight_transfer.base import (  # noqa: E402  (the process is prepared first)
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory  # noqa: E402

BACKEND = "megarl"


@dataclass
class DeliveryInfo(WeightTransferInitInfo):
    """`deliveries[rank]` is the JSON form of the `Delivery` of the engine's tensor-parallel rank."""

    deliveries: list[dict[str, Any]] = field(default_factory=list)
    timeout_s: float = 600.0


@dataclass
class SyncInfo(WeightTransferUpdateInfo):
    """Number of the sync, how long it may take, and whether slices are digested."""

    sync: int = 0
    timeout_s: float = 600.0
    is_verified: bool = False


class MegarlWeightTransfer(WeightTransferEngine[DeliveryInfo, SyncInfo]):
    """The receiving side of one vLLM worker."""

    init_info_cls, update_info_cls = DeliveryInfo, SyncInfo
    supports_draft_weight_update = False

    _endpoint: Endpoint | None = None
    _delivery: Delivery | None = None
    _wire: SyncWire | None = None
    digests: list[int] = []  # of the last sync, of every slice in the order of the delivery; empty when it was not verified

    @property
    def endpoint(self) -> Endpoint:
        """The writing side of this worker's model. It exists from the moment the model is loaded."""
        if self._endpoint is None:
            self._endpoint = Endpoint(self.model)
        return self._endpoint

    def init_transfer_engine(self, init_info: DeliveryInfo) -> None:
        """Connect to the trainer ranks."""
        self.shutdown()
        self._delivery = Delivery.from_json(init_info.deliveries[self.parallel_config.rank])
        self._wire = receiving_wire(self._delivery, init_info.timeout_s)

    def start_weight_update(self) -> None:
        """From here to `finish_weight_update` the weights are a mixture."""
        self.endpoint.begin()

    def receive_weights(self, update_info: SyncInfo) -> None:
        """All rounds of one sync."""
        assert self._delivery is not None and self._wire is not None, "init_weight_transfer_engine comes first"
        ends = _Arrivals(self.endpoint, self._delivery.ops, update_info.is_verified)
        self._wire.begin(update_info.sync, update_info.timeout_s)
        try:
            BufferedTransport(self._delivery.rank, self.endpoint.dtype, device.device(), self._wire).run(self._delivery.rounds, ends)
        except BaseException:
            self.shutdown()  # whoever waits for this process learns of it
            raise
        self.digests = [ends.digests[op] for op in self._delivery.ops] if update_info.is_verified else []

    def finish_weight_update(self) -> None:
        """Refresh what vLLM derived from the parameters."""
        self.endpoint.finish()

    def shutdown(self) -> None:
        """Disconnect. Harmless when nothing is connected."""
        if self._wire is not None:
            self._wire.close()
        self._wire = None


class _Arrivals:
    """The ends of a sync that only receives: `transport.Ends`."""

    def __init__(self, endpoint: Endpoint, ops: Sequence[Op], is_verified: bool):
        self.endpoint, self.is_verified = endpoint, is_verified
        self.digests: dict[Op, int] = {}
        self._missing = Counter(self._target(op).parameter for op in ops)

    def _target(self, op: Op) -> TargetBox:
        return self.endpoint.targets[op.target_index]

    def read(self, op: Op) -> Tensor:
        raise AssertionError(f"a generator holds no source pieces: {op}")

    def write(self, op: Op) -> Tensor:
        target = self._target(op)
        return slice_of_parameter(self.endpoint.target(target.parameter), target, op.box)

    def is_live(self, op: Op) -> bool:
        return self.endpoint.is_live(self._target(op).parameter)

    def landed(self, op: Op) -> None:
        if self.is_verified:
            self.digests[op] = int(digest(self.write(op)))
        parameter = self._target(op).parameter
        self._missing[parameter] -= 1
        if not self._missing[parameter]:
            self.endpoint.commit([parameter])


def register() -> None:
    """Make the backend known to vLLM under the name `megarl`. Harmless when called twice."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, MegarlWeightTransfer)
