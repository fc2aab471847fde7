"""What the accelerator holds in each phase of a step, as a table. Pure: no torch.

`parallel.memory` moves what a phase does without; `docs/bridge.md` shows the table with bytes.
"""

from typing import Literal

from megarl.config import PpoRun, SampleRun

Offload = Literal["none", "frozen", "all"]
Phase = Literal["publishing", "generating", "scoring", "learning", "exchanging", "saving"]

TRAINED = ("actor", "critic")
FROZEN = "frozen"  # reference and reward models
REFERENCE = "reference"  # one that is refreshed: its weights change, and are saved
RESIDENT: dict[Phase, frozenset[tuple[str, str]]] = {
    "publishing": frozenset({("actor", "weights")}),
    "generating": frozenset(),
    "scoring": frozenset({(owner, "weights") for owner in (*TRAINED, FROZEN, REFERENCE)}),
    "learning": frozenset({(owner, part) for owner in TRAINED for part in ("weights", "gradients", "optimizer", "ema")}),
    "exchanging": frozenset({("actor", part) for part in ("weights", "optimizer", "ema")} | {(REFERENCE, "weights")}),
    "saving": frozenset({(owner, part) for owner in TRAINED for part in ("weights", "optimizer", "ema")} | {(REFERENCE, "weights")}),
}
"""(owner, part) of what a phase computes with."""


def offload_of(run: PpoRun | SampleRun, is_cuda: bool) -> Offload:
    """What may leave the device between phases: as the run says, or what suits this host and where its generators are."""
    if run.memory.offload != "auto":
        return run.memory.offload
    if not is_cuda:
        return "none"
    return "frozen" if run.rollout.placement == "remote" else "all"
