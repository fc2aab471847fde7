"""Rank arithmetic: where a rank stands on the tensor, pipeline and data axes. Pure Python, no torch.

Rank order is Megatron's default (`tp-cp-ep-dp-pp`): the tensor rank changes fastest, the pipeline rank slowest.
"""

from dataclasses import dataclass, replace

from megarl.errors import LayoutError

# Experts stay whole: Megatron could cut each over tensor-parallel ranks, too, but the experts of today's mixtures are narrow, and a
# mixture with wide ones gets the same memory from more expert-parallel ranks, which may be tensor-parallel neighbours.
EXPERT_TENSOR_PARALLEL_SIZE = 1


@dataclass(frozen=True)
class ParallelLayout:
    """A parallel layout seen from one rank.

    Args: `tensor`, `pipeline`, `context`, `expert` are axis sizes, `world_size` the number of ranks, `rank` this rank.
    Raises `LayoutError` when tensor x pipeline x context does not divide the world.
    """

    tensor: int
    pipeline: int
    world_size: int
    rank: int = 0
    context: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        for axis in ("tensor", "pipeline", "context", "expert", "world_size"):
            if getattr(self, axis) < 1:
                raise LayoutError(f"parallel axis {axis} is {getattr(self, axis)}; expected at least 1")
        if self.world_size % self.model_size:
            raise LayoutError(
                f"tensor {self.tensor} x pipeline {self.pipeline} x context {self.context} = {self.model_size} ranks a replica"
                f" does not divide the world of {self.world_size} ranks: change parallel.tensor, parallel.pipeline or parallel.context, or"
                " the number of ranks"
            )
        if self.stage_size % self.expert:
            raise LayoutError(
                f"expert {self.expert} does not divide the {self.stage_size} ranks of a pipeline stage (tensor {self.tensor} x context"
                f" {self.context} x data {self.data}), over which the experts are spread: change parallel.expert"
            )
        if not 0 <= self.rank < self.world_size:
            raise LayoutError(f"rank {self.rank} is outside the world of {self.world_size}")

    @property
    def model_size(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.tensor * self.pipeline * self.context

    @property
    def data(self) -> int:
        """Number of data-parallel replicas."""
        return self.world_size // self.model_size

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage, of all replicas. Consecutive ones share out the experts of a mixture."""
        return self.world_size // self.pipeline

    @property
    def ep_rank(self) -> int:
        return self.rank % self.stage_size % self.expert

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tensor

    @property
    def cp_rank(self) -> int:
        return self.rank // self.tensor % self.context

    @property
    def dp_rank(self) -> int:
        return self.rank // (self.tensor * self.context) % self.data

    @property
    def pp_rank(self) -> int:
        return self.rank // (self.tensor * self.context * self.data)

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pipeline - 1

    def data_offset(self, share: int) -> int:
        """Where this data rank's rows begin when every data rank holds `share` of them."""
        return self.dp_rank * share

    def at(self, rank: int) -> "ParallelLayout":
        """The same layout seen from another rank."""
        return replace(self, rank=rank)

    def rank_at(self, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0) -> int:
        """The rank that stands at these coordinates."""
        return ((pp * self.data + dp) * self.context + cp) * self.tensor + tp

    def ranks_along(self, axis: str) -> tuple[int, ...]:
        """Ranks that differ from this one only on `axis`: `tp`, `cp`, `dp`, `pp`, or `model` (the whole replica).

        With `ep`: those among which the experts of a layer are shared out.
        """
        mine = {"tp": self.tp_rank, "cp": self.cp_rank, "dp": self.dp_rank, "pp": self.pp_rank}
        sizes = {"tp": self.tensor, "cp": self.context, "dp": self.data, "pp": self.pipeline}
        if axis == "model":
            return tuple(
                self.rank_at(tp, cp, self.dp_rank, pp)
                for pp in range(self.pipeline)
                for cp in range(self.context)
                for tp in range(self.tensor)
            )
        if axis == "ep":
            return tuple(range(self.rank - self.ep_rank, self.rank - self.ep_rank + self.expert))
        return tuple(self.rank_at(**{**mine, axis: i}) for i in range(sizes[axis]))

    def __str__(self) -> str:
        text = f"tp{self.tensor} pp{self.pipeline} dp{self.data}"
        return text + (f" cp{self.context}" if self.context > 1 else "") + (f" ep{self.expert}" if self.expert > 1 else "")


@dataclass(frozen=True)
class RolloutLayout:
    """How generator replicas lie on the training ranks, and which ranks exchange samples.

    vLLM numbers its tensor-parallel ranks as blocks of consecutive global ranks, so replica g holds the ranks
    [g * tensor, (g + 1) * tensor). A *rollout group* is a smallest set of ranks closed under both "same generator
    replica" and "same model replica": prompts are dealt and completions gathered inside it, never across the world.
    """

    training: ParallelLayout
    tensor: int

    def __post_init__(self) -> None:
        if self.tensor < 1 or self.training.world_size % self.tensor:
            raise LayoutError(
                f"rollout.tensor_parallel is {self.tensor}; expected a divisor of the world of {self.training.world_size} ranks"
            )

    @property
    def num_replicas(self) -> int:
        return self.training.world_size // self.tensor

    @property
    def replica(self) -> int:
        return self.training.rank // self.tensor

    @property
    def is_leader(self) -> bool:
        """True on the one rank of each generator replica that speaks for it."""
        return self.training.rank % self.tensor == 0

    def groups(self) -> tuple[tuple[int, ...], ...]:
        """All rollout groups, each sorted, in order of their smallest rank."""
        parent = list(range(self.training.world_size))

        def root(rank: int) -> int:
            while parent[rank] != rank:
                parent[rank] = parent[parent[rank]]
                rank = parent[rank]
            return rank

        for rank in range(self.training.world_size):
            here = self.training.at(rank)
            parent[root(rank)] = root(rank - rank % self.tensor)
            parent[root(rank)] = root(here.rank_at(dp=here.dp_rank))
        members: dict[int, list[int]] = {}
        for rank in range(self.training.world_size):
            members.setdefault(root(rank), []).append(rank)
        return tuple(sorted(tuple(group) for group in members.values()))

    @property
    def group(self) -> tuple[int, ...]:
        """The rollout group of this rank."""
        return next(group for group in self.groups() if self.training.rank in group)

    def replicas_in(self, group: tuple[int, ...]) -> tuple[int, ...]:
        """Generator replicas whose ranks lie in `group`."""
        return tuple(sorted({rank // self.tensor for rank in group}))

    def data_ranks_in(self, group: tuple[int, ...]) -> tuple[int, ...]:
        """Data-parallel ranks of the model replicas in `group`."""
        return tuple(sorted({self.training.at(rank).dp_rank for rank in group}))
