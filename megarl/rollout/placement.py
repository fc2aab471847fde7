"""Which trainer rank speaks for which generator, and between whom requests and completions travel. Pure: no torch, no processes."""

from collections.abc import Sequence
from dataclasses import dataclass

from megarl.parallel.layout import ParallelLayout


@dataclass(frozen=True)
class GeneratorLayout:
    """Generator replicas in processes of their own, seen from one trainer rank.

    `speakers[g]` is the trainer rank that talks to replica g, in ascending order; `served[g]` are the trainer ranks whose prompts the
    replica may get. A *rollout group* is a smallest set of trainer ranks closed under both "served by one replica" and "same model
    replica": prompts are dealt and completions gathered inside it.
    """

    training: ParallelLayout
    speakers: tuple[int, ...]
    served: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        assert self.speakers and list(self.speakers) == sorted(self.speakers) and len(self.speakers) == len(self.served), self
        assert all(speaker in ranks for speaker, ranks in zip(self.speakers, self.served)), self

    @classmethod
    def on_hosts(cls, training: ParallelLayout, hosts: Sequence[str], replicas_per_host: int) -> "GeneratorLayout":
        """So many replicas on each trainer host, spoken for by its first rank. `hosts[rank]` names the host of each trainer rank."""
        speakers, served = [], []
        for first, host in enumerate(hosts):
            if host not in hosts[:first]:
                ranks = tuple(rank for rank, other in enumerate(hosts) if other == host)
                speakers += [first] * replicas_per_host
                served += [ranks] * replicas_per_host
        return cls(training, tuple(speakers), tuple(served))

    @classmethod
    def elsewhere(cls, training: ParallelLayout, num_replicas: int) -> "GeneratorLayout":
        """Replicas on other hosts, spoken for by rank 0, where they report."""
        everyone = tuple(range(training.world_size))
        return cls(training, (0,) * num_replicas, (everyone,) * num_replicas)

    @property
    def num_replicas(self) -> int:
        return len(self.speakers)

    @property
    def spoken_for(self) -> tuple[int, ...]:
        """The replicas that this rank speaks for."""
        return tuple(replica for replica, speaker in enumerate(self.speakers) if speaker == self.training.rank)

    def groups(self) -> tuple[tuple[int, ...], ...]:
        """All rollout groups, each sorted, in order of their smallest rank."""
        group_of = list(range(self.training.world_size))
        together = {tuple(sorted(ranks)) for ranks in self.served}
        together |= {tuple(sorted(self.training.at(rank).ranks_along("model"))) for rank in range(self.training.world_size)}
        for ranks in sorted(together):
            merged = {group_of[rank] for rank in ranks}
            group_of = [min(merged) if group in merged else group for group in group_of]
        return tuple(tuple(rank for rank, group in enumerate(group_of) if group == first) for first in sorted(set(group_of)))

    @property
    def group(self) -> tuple[int, ...]:
        """The rollout group of this rank."""
        return next(group for group in self.groups() if self.training.rank in group)

    def replicas_in(self, group: Sequence[int]) -> tuple[int, ...]:
        """Replicas whose speakers are in `group`."""
        return tuple(replica for replica, speaker in enumerate(self.speakers) if speaker in group)

    def data_ranks_in(self, group: Sequence[int]) -> tuple[int, ...]:
        """Data-parallel ranks of the model replicas in `group`."""
        return tuple(sorted({self.training.at(rank).dp_rank for rank in group}))
