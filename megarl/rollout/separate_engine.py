"""A sampler in processes of its own, as the trainer's ranks see it: the same engine protocol, the work done elsewhere.

Some trainer ranks speak for generators (`placement.GeneratorLayout`); every rank makes every call, and a generator's failure is raised on
all of them. Weights come through `bridge.separate_sync.SeparateSync`.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megarl.config import RolloutConfig
from megarl.errors import RolloutError
from megarl.models.family import ModelSpec
from megarl.parallel import device, groups
from megarl.parallel.collectives import Group, gather_json, meet, together
from megarl.parallel.layout import ParallelLayout
from megarl.records import Completion, RolloutRequest
from megarl.rollout.children import devices_of
from megarl.rollout.dealing import Dealer
from megarl.rollout.engine import OnFinished, check_completions, check_requests
from megarl.rollout.generators import JOIN_FILE, START_TIMEOUT_S, Generators, Peer, start_here, this_host, wait_for, wait_for_joining
from megarl.rollout.placement import GeneratorLayout
from megarl.rollout.worker import request_to_json

_serials = itertools.count()  # of the engines of a process: equal on all ranks
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Underway:
    """Requests that generators work on: what `collect` needs to know of a `submit`."""

    everyone: list[RolloutRequest]
    own: slice
    hands: list[list[RolloutRequest]]
    questions: list[tuple[Peer, int]]


class SeparateEngine:
    """Generators that are processes of their own. Every rank of the world creates it, after `groups.initialize`.

    Args: `generators` are those this rank speaks for, if any; `timeout_s` is how long an answer may take, a whole generation included.
    It starts without weights. Raises on all ranks what any generator raises.
    """

    def __init__(
        self,
        spec: ModelSpec,
        rollout: RolloutConfig,
        layout: GeneratorLayout,
        precision: str,
        max_len: int,
        generators: Generators | None,
        timeout_s: float,
    ):
        assert bool(layout.spoken_for) == (generators is not None)
        self.spec, self.layout, self.max_len, self.timeout_s = spec, layout, max_len, timeout_s
        self.tensor = rollout.tensor_parallel
        self.dtype = DTYPES[precision]
        self.policy_version: int | None = None
        self._serial, self._num_generations = next(_serials), 0
        self.targets = ()  # this rank's own; the generators' are in `descriptions`
        self.generators = generators or Generators([], self.tensor)
        self._world = groups.group(layout.training, "world")
        self._dealer = Dealer(layout, groups.new_group_of(layout.groups()))
        share = -(-rollout.prompts_per_step // layout.num_replicas)
        self.descriptions = self.ask_all(
            START_TIMEOUT_S,
            "start",
            model=spec.hf_config | {"tie_word_embeddings": spec.tied, "vocab_size": spec.vocab_size},
            rollout=rollout.model_copy(update={"prompts_per_step": share}).model_dump(mode="json"),
            precision=precision,
            max_len=max_len,
            timeout_s=timeout_s,
        )

    def ask_all(self, patience_s: float, do: str, **fields: Any) -> list[dict[str, Any]]:
        """The answers of this rank's generators to one question. Every rank calls it; a failure of any of them is raised on all."""
        return together(lambda: self.generators.ask_all(patience_s, do, **fields), self._world)

    @property
    def process_numbers(self) -> list[int]:
        """Numbers, among those of all replicas, of the processes this rank speaks for."""
        return [replica * self.tensor + rank for replica in self.layout.spoken_for for rank in range(self.tensor)]

    # --- sampling ---

    @property
    def group(self) -> Group:
        """The ranks whose responses a rank may sample."""
        return self._dealer.group

    def generate(self, requests: Sequence[RolloutRequest], on_finished: OnFinished | None = None) -> list[Completion]:
        """Completions of this data rank's requests, in their order. Every rank calls it with its own.

        `on_finished` hears of what the generators sampled that this rank speaks for.

        Ranks of one data-parallel replica pass equal requests. Raises `RolloutError` before the first sync, for a request that does
        not fit, for an answer that is not a completion, and for a generator that is gone.
        """
        return self.collect(self.submit(requests, on_finished))

    def submit(self, requests: Sequence[RolloutRequest], on_finished: OnFinished | None = None) -> Underway:
        """Start sampling and return at once; weights may be pushed before `collect`. Every rank calls it."""
        self._num_generations += 1
        meet(f"generation {self._num_generations}", self._world, self.timeout_s, key=f"generation/{self._serial}/{self._num_generations}")
        if self.policy_version is None:
            raise RolloutError("the sampler has no weights yet; push the actor's weights before generating")
        everyone, own = self._dealer.gather(requests)
        check_requests(everyone, self.max_len)
        hands = self._dealer.hands(everyone)

        def ask() -> list[tuple[Peer, int]]:
            tells = on_finished is not None
            questions = [
                (peer, peer.ask("generate", requests=[request_to_json(request) for request in hand], tells=tells))
                for index, hand in enumerate(hands)
                for peer in self.generators.of(index)
            ]
            dealt = [hand for hand in hands for _ in range(self.tensor)]
            for (peer, number), hand in zip(questions, dealt, strict=True):
                if on_finished is not None:
                    peer.on_news[number] = partial(_tell, hand, on_finished)
            return questions

        return Underway(everyone, own, hands, together(ask, self._world))

    def collect(self, underway: Underway) -> list[Completion]:
        """Wait for the completions of a `submit`. Every rank calls it."""

        def hear() -> list[list[Completion]]:
            answers = wait_for(underway.questions, self.timeout_s)
            sampled = [[completion_from_json(item) for item in answer["completions"]] for answer in answers[:: self.tensor]]
            for hand, completions in zip(underway.hands, sampled, strict=True):
                check_completions(hand, completions, self.spec.vocab_size)
            return sampled

        return self._dealer.collect(together(hear, self._world), underway.everyone)[underway.own]

    # --- weights ---

    def begin_update(self) -> None:
        """From here to `end_update` the weights are a mixture; generators are paused and refuse new requests. Every rank calls it."""
        self.policy_version = None
        self.ask_all(self.timeout_s, "begin")

    def ask_to_connect(self, deliveries: Sequence[dict[str, Any]], timeout_s: float) -> list[tuple[Peer, int]]:
        """Tell each of this rank's generator processes what it will receive over which wires. What to `wait_for`, on this rank alone."""
        peers = zip(self.generators.peers, deliveries, strict=True)
        return [(peer, peer.ask("connect", delivery=delivery, timeout_s=timeout_s)) for peer, delivery in peers]

    def ask_to_receive(self, sync: int, is_verified: bool, timeout_s: float) -> list[tuple[Peer, int]]:
        """Tell this rank's generators to take their weights. What to `wait_for`, on this rank alone."""
        return [(peer, peer.ask("receive", sync=sync, is_verified=is_verified, timeout_s=timeout_s)) for peer in self.generators.peers]

    def wait_for(self, questions: list[tuple[Peer, int]], timeout_s: float) -> list[dict[str, Any]]:
        """The answers, in order. Raises on this rank alone."""
        return wait_for(questions, timeout_s)

    def end_update(self, version: int) -> None:
        """All generators have all weights: they sample with them from now on, under `version`. Every rank calls it."""
        self.ask_all(self.timeout_s, "publish", version=version)
        self.policy_version = version

    # --- memory: nothing is shared with the trainer ---

    def sleep(self) -> None:
        """Nothing to give back."""

    def wake(self, part: str) -> None:
        """Nothing has left."""

    def close(self) -> None:
        """Dismiss the generators."""
        self.generators.close()


def _tell(hand: Sequence[RolloutRequest], on_finished: OnFinished, news: Sequence[list]) -> None:
    for index, item in news:
        on_finished(hand[index], completion_from_json(item))


def completion_from_json(item: list) -> Completion:
    """A completion as a generator tells it. Raises `RolloutError` for anything else."""
    try:
        prompt_id, sample_index, token_ids, logprobs, reason, version, later = item
        return Completion(
            int(prompt_id),
            int(sample_index),
            tuple(int(token) for token in token_ids),
            tuple(float(value) for value in logprobs),
            str(reason),
            int(version),
            tuple((int(start), int(newer)) for start, newer in later),
        )
    except (TypeError, ValueError) as error:
        raise RolloutError(f"a generator answered with something that is no completion ({error})") from None


def start_separate(
    spec: ModelSpec, rollout: RolloutConfig, training: ParallelLayout, precision: str, max_len: int, timeout_s: float
) -> SeparateEngine:
    """Generators on the trainer's nodes, started by the first rank of each. Every rank calls it."""
    world = groups.group(training, "world")
    hosts = gather_json(this_host(), world)
    layout = GeneratorLayout.on_hosts(training, hosts, rollout.replicas or 1)
    num_devices = torch.cuda.device_count() if device.is_cuda() else 0
    num_trainers = hosts.count(hosts[training.rank])

    def start() -> Generators | None:
        if not layout.spoken_for:
            return None
        devices = [devices_of(index, rollout.tensor_parallel, num_trainers, num_devices) for index in range(len(layout.spoken_for))]
        return start_here(layout.spoken_for[0], devices)

    return SeparateEngine(spec, rollout, layout, precision, max_len, together(start, world), timeout_s)


def start_remote(
    spec: ModelSpec, rollout: RolloutConfig, training: ParallelLayout, precision: str, max_len: int, timeout_s: float, output_dir: Path
) -> SeparateEngine:
    """Generators that other nodes bring with `--join`. Every rank calls it; rank 0 waits for them."""
    layout = GeneratorLayout.elsewhere(training, rollout.replicas)
    world = groups.group(training, "world")

    def wait() -> Generators | None:
        if not layout.spoken_for:
            return None
        output_dir.mkdir(parents=True, exist_ok=True)
        return wait_for_joining(output_dir / JOIN_FILE, rollout.listen, rollout.replicas, rollout.tensor_parallel, timeout_s)

    return SeparateEngine(spec, rollout, layout, precision, max_len, together(wait, world), timeout_s)
