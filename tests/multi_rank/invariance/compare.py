"""Largest differences between what a layout computed and the reference, and how large they may be."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.metrics import Metrics
from megarl.models.family import spec_from_hf_config
from tests.multi_rank.invariance.layouts import Layout
from tests.multi_rank.invariance.reference import ROLES, SEEDS, computed_for
from tests.multi_rank.role_cases import rows_of, weights
from tests.ranks import run_ranks

TOLERANCE = 1e-5  # of the tensor's largest element
# Where float32 needs more. Both are about what two steps added to a weight, of which float32 keeps little: a norm's weight near 1 is
# rounded to 6e-8, and an update of 5e-3 is known to 1e-5 of itself.
TOLERANCES = {
    "update": 1e-4,  # of the tensor's largest update
    "metrics": 2e-5,  # of the second step: means of few numbers of both signs, at weights that differ already
}
SMALLEST = 1e-4  # an update whose largest element is smaller tells nothing

Results = list[dict]  # of every rank


@dataclass(frozen=True)
class Difference:
    """The largest relative difference of a quantity, and the tensor that has it."""

    size: float
    tensor: str


def computed_by(layouts: list[Layout], timeout_s: float = 390) -> list[Results]:
    """What every rank computed, for each layout. Layouts with equally many ranks share one group of ranks."""
    found: dict[int, Results] = {}
    for ranks in sorted({layout.ranks for layout in layouts}):
        mine = [number for number, layout in enumerate(layouts) if layout.ranks == ranks]
        by_rank = run_ranks(computed_for, ranks, [layouts[number] for number in mine], timeout_s=timeout_s)
        found |= dict(zip(mine, (list(results) for results in zip(*by_rank, strict=True)), strict=True))
    return [found[number] for number in range(len(layouts))]


def compared(layouts: list[Layout], timeout_s: float = 390) -> Iterator[tuple[Layout, dict[str, Difference]]]:
    """Every layout's largest differences from its reference."""
    references = {str(layout.reference): layout.reference for layout in layouts}
    results = computed_by([*references.values(), *layouts], timeout_s)
    expected = dict(zip(references, results))
    for layout, found in zip(layouts, results[len(references) :], strict=True):
        yield layout, differences(layout, found, expected[str(layout.reference)])


def differences(layout: Layout, found: Results, expected: Results) -> dict[str, Difference]:
    """The largest difference of each quantity, over all tensors that are of its kind."""
    largest: dict[str, Difference] = {}
    for quantity, tensor, size in _sizes(layout, found, expected):
        if quantity not in largest or not size <= largest[quantity].size:  # also when it is not a number
            largest[quantity] = Difference(size, tensor)
    return largest


def tolerance(quantity: str) -> float:
    """The largest difference that is allowed."""
    return TOLERANCES.get(quantity, TOLERANCE)


def faults(layout: Layout, largest: dict[str, Difference]) -> list[str]:
    """What is too large, each in a line with layout, tensor and difference."""
    return [
        f"{layout}: {quantity} differs by {difference.size:.2e} in {difference.tensor}; allowed is {tolerance(quantity):.0e}"
        for quantity, difference in largest.items()
        if not difference.size <= tolerance(quantity)
    ]


def _sizes(layout: Layout, found: Results, expected: Results) -> Iterator[tuple[str, str, float]]:
    """(quantity, tensor, relative difference); the gradient is the update of a step with a very large learning rate."""
    for name in expected[0]["answers"]:
        whole, right = (rows_of(_within(results, "answers"), name) for results in (found, expected))
        yield name, name, _relative(whole, right)
    for job in layout.learners:
        for when in ("first", "second"):
            metrics, right = (_total(results, job, when) for results in (found, expected))
            assert metrics.keys() == right.keys()
            for name, value in right.items():
                kind = "gradient norm" if name.endswith("grad_norm") else "loss" if name.endswith("loss") else "metrics"
                yield kind, f"{name} of {job}, {when} step", abs(metrics[name] - value) / max(abs(value), 0.1)
        spec = spec_from_hf_config(layout.hf_config)
        start = weights(spec, ROLES[job], SEEDS[job])
        for key, quantity in (("gradient", "gradient"), ("weights", "update")):
            whole, right = (_assembled(results, job, key, start) for results in (found, expected))
            for name, before in start.items():
                update, right_update = whole[name] - before, right[name] - before
                assert right_update.abs().max() > SMALLEST, f"{job}: {name} does not learn"
                yield quantity, f"{name} of {job}", _relative(update, right_update)
                if key == "weights":
                    yield "weights", f"{name} of {job}", _relative(whole[name], right[name])


def _within(results: Results, key: str) -> Results:
    return [result[key] | {"dp_rank": result["dp_rank"]} for result in results]


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _total(results: Results, job: str, when: str) -> dict[str, float]:
    """Metrics added over replicas; ranks of one replica hold equal ones."""
    by_replica: dict[int, dict] = {}
    for result in results:
        entries = result["learned"][job][when]
        assert by_replica.setdefault(result["dp_rank"], entries) == entries, f"ranks of one replica differ in metrics of {job}"
    total = Metrics()
    for entries in by_replica.values():
        total = total + Metrics.from_json(entries)
    return total.values_by_name()


def _assembled(results: Results, job: str, quantity: str, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole Hugging Face tensors from every rank's pieces; every element comes from exactly one rank."""
    whole = {name: torch.full(tensor.shape, float("nan")) for name, tensor in start.items()}
    for result in results:
        for name, box, view in result["learned"][job][quantity]:
            target = whole[name][tuple(slice(offset, offset + size) for offset, size in box)]
            assert torch.isnan(target).all(), f"{name} {box} is owned twice"
            target.copy_(view)
    assert not any(torch.isnan(tensor).any() for tensor in whole.values()), f"a part of {job} is owned by no rank"
    return whole
