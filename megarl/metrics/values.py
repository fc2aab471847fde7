"""Values that carry how they combine: over microbatches, minibatches and data-parallel ranks the same addition.

A metric is a sum and a count (or more sums), never a mean already taken, so that any cut of the work gives the same number.
Fields may be scalar tensors: they stay on their device until the step's one reduction.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megarl.operations import heartbeat

Number = float | Tensor


class Additive:
    """A metric whose fields all add up."""

    def __add__(self, other):
        return type(self)(*(a + b for a, b in zip(numbers_of(self), numbers_of(other), strict=True)))


@dataclass(frozen=True)
class Metric(Additive):
    """A mean: `sum` over `count` things."""

    sum: Number
    count: Number = 1.0

    @property
    def value(self) -> float:
        return self.sum / self.count if self.count else 0.0


@dataclass(frozen=True)
class Total(Additive):
    """A sum over all data-parallel ranks and all contributions: tokens, skipped updates."""

    sum: Number

    @property
    def value(self) -> float:
        return self.sum


@dataclass(frozen=True)
class Largest:
    """The largest contribution: seconds of the slowest rank, the highest gradient norm."""

    largest: Number

    def __add__(self, other: "Largest") -> "Largest":
        return Largest(max(self.largest, other.largest))

    @property
    def value(self) -> float:
        return self.largest


@dataclass(frozen=True)
class Deviation(Additive):
    """An unbiased standard deviation, from the first two moments."""

    sum: Number
    squares: Number
    count: Number

    @property
    def value(self) -> float:
        return self.variance**0.5

    @property
    def variance(self) -> float:
        if self.count < 2:
            return 0.0
        return max((self.squares - self.sum * self.sum / self.count) / (self.count - 1), 0.0)

    @classmethod
    def of(cls, numbers: Tensor) -> "Deviation":
        """Of all elements of a tensor, accumulated in float64."""
        numbers = numbers.double()
        return cls(numbers.sum(), numbers.square().sum(), float(numbers.numel()))


@dataclass(frozen=True)
class ExplainedVariance(Additive):
    """1 - Var(return - value) / Var(return): 1 for a perfect critic, 0 for a constant one; 0 when the returns do not vary."""

    residual_sum: Number
    residual_squares: Number
    return_sum: Number
    return_squares: Number
    count: Number

    @property
    def value(self) -> float:
        returns = Deviation(self.return_sum, self.return_squares, self.count).variance
        residuals = Deviation(self.residual_sum, self.residual_squares, self.count).variance
        return 1.0 - residuals / returns if returns > 0 else 0.0

    @classmethod
    def of(cls, values: Tensor, returns: Tensor) -> "ExplainedVariance":
        """Of values and returns, f32[n] each."""
        residual, target = Deviation.of(returns - values), Deviation.of(returns)
        return cls(residual.sum, residual.squares, target.sum, target.squares, target.count)


def numbers_of(metric) -> tuple[Number, ...]:
    """The fields of a metric, in order."""
    return tuple(getattr(metric, field.name) for field in fields(metric))


AnyMetric = Metric | Total | Largest | Deviation | ExplainedVariance
KINDS = {kind.__name__: kind for kind in (Metric, Total, Largest, Deviation, ExplainedVariance)}


def mean_of(numbers: Tensor) -> Metric:
    """The mean of all elements of a tensor, accumulated in float64."""
    return Metric(numbers.double().sum(), float(numbers.numel()))


class Metrics(Mapping[str, AnyMetric]):
    """An immutable mapping from a name such as `actor/loss` to a metric; `+` combines metrics of equal names."""

    def __init__(self, entries: Mapping[str, AnyMetric] | Iterable[tuple[str, AnyMetric]] = ()):
        self._entries: dict[str, AnyMetric] = dict(entries)

    def __getitem__(self, name: str) -> AnyMetric:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Metrics({self._entries})"

    def __add__(self, other: "Metrics") -> "Metrics":
        entries = dict(self._entries)
        for name, metric in other.items():
            entries[name] = entries[name] + metric if name in entries else metric
        return Metrics(entries)

    def under(self, prefix: str) -> "Metrics":
        """The same metrics under the names `prefix/name`."""
        return Metrics({f"{prefix}/{name}": metric for name, metric in self.items()})

    def reduced(self, gather: Callable[[dict], list[dict]]) -> "Metrics":
        """Combined over ranks: the one reduction of a step, entered by every rank of the group.

        `gather` takes this rank's JSON value and returns every rank's in rank order (`collectives.gather_json` on the data-parallel
        group), so all ranks hold bitwise the same result. Names may be missing on some ranks.
        """
        total = Metrics()
        for entries in gather(self.to_json()):
            total = total + Metrics.from_json(entries)
        return total

    def values_by_name(self) -> dict[str, float]:
        """What the metrics are worth, as plain numbers in order of their names."""
        plain = Metrics.from_json(self.to_json())
        return {name: float(plain[name].value) for name in sorted(plain)}

    def to_json(self) -> dict[str, list]:
        """`{name: [kind, field, ...]}`; tensors (all on one device) are read in one copy."""
        flat = [number for metric in self.values() for number in numbers_of(metric)]
        tensors = [number.detach().double().reshape(()) for number in flat if isinstance(number, Tensor)]
        read = iter(torch.stack(tensors).tolist() if tensors else [])
        numbers = iter([next(read) if isinstance(number, Tensor) else float(number) for number in flat])
        return {name: [type(metric).__name__, *(next(numbers) for _ in numbers_of(metric))] for name, metric in self.items()}

    @classmethod
    def from_json(cls, entries: dict[str, list]) -> "Metrics":
        """What `to_json` wrote."""
        return cls({name: KINDS[kind](*numbers) for name, (kind, *numbers) in entries.items()})


class StepMetrics:
    """Collects the metrics of one step: `step_metrics += metrics`, `with step_metrics.time("score")`, then `reduced`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._metrics = Metrics()
        self._clock = clock
        self._start = clock()

    def __iadd__(self, metrics: Metrics) -> "StepMetrics":
        self._metrics = self._metrics + metrics
        return self

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Adds the seconds of the block to `seconds/<name>`; the reduction keeps those of the slowest rank."""
        start = self._clock()
        with heartbeat.phase(name):
            yield
        name = f"seconds/{name}"
        before = self._metrics[name].largest if name in self._metrics else 0.0
        self._metrics = Metrics({**self._metrics, name: Largest(before + self._clock() - start)})

    def reduced(self, gather: Callable[[dict], list[dict]]) -> Metrics:
        """All collected metrics and `seconds/step`, combined over ranks. Entered by every rank of `gather`'s group."""
        return (self._metrics + Metrics({"seconds/step": Largest(self._clock() - self._start)})).reduced(gather)
