"""Generators in processes of their own: they follow the trainer, over shared memory and over a joint group, as the colocated ones do."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megarl.config import ParallelConfig, RolloutConfig
from megarl.errors import RolloutError
from tests.ranks import run_ranks
from tests.rollout.tiny_models import greedy_difference, save_tiny

MAX_LEN, TIMEOUT_S = 64, 60.0
TP2, PP2 = ParallelConfig(tensor=2), ParallelConfig(pipeline=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [save_tiny("llama", seed, folder) for seed in (0, 1)]


class Trainer:
    """The trainer's side of a world: pieces of an actor, a separate engine, a sync."""

    def __init__(self, folders, parallel, tensor, joint: bool, replicas: int = 1, timeout_s: float = TIMEOUT_S, remote: Path | None = None):
        from megarl.bridge.separate_sync import SeparateSync
        from megarl.models.build import build_model
        from megarl.models.family import read_spec
        from megarl.models.pieces import source_pieces
        from megarl.parallel import groups
        from megarl.rollout.separate_engine import start_remote, start_separate

        self.layout = groups.initialize(parallel, seed=0)
        spec = read_spec(folders[0])
        self.rollout = RolloutConfig(
            prompts_per_step=8,
            max_response_tokens=12,
            kv_cache_bytes=8 << 20,
            placement="remote" if remote else "separate",
            replicas=replicas,
            tensor_parallel=tensor,
        )
        start = time.perf_counter()
        arguments = (spec, self.rollout, self.layout, "fp32", MAX_LEN, timeout_s)
        self.engine = start_remote(*arguments, remote) if remote else start_separate(*arguments)
        self.start_s = time.perf_counter() - start
        self.pieces = source_pieces(build_model(spec, "actor", parallel, "fp32", self.layout), spec.table("actor"))
        self.sync = SeparateSync(self.engine, self.layout, bucket_bytes=40_000, verify_first=1, timeout_s=timeout_s, always_joint=joint)

    def load(self, folder: Path) -> None:
        from megarl.checkpoint.sources import SafetensorsSource
        from megarl.models.pieces import load_pieces

        load_pieces(self.pieces, SafetensorsSource(folder))

    def prompts(self) -> list:
        from megarl.records import Prompt

        prompts = [Prompt(index, tuple((7 * index + 3 * position) % 201 for position in range(1 + 4 * index))) for index in range(7)]
        return prompts if self.layout.data == 1 else prompts[self.layout.dp_rank :: self.layout.data]


def follow(rank: int, world_size: int, folders, parallel, tensor: int, joint: bool, replicas: int, remote: Path | None = None) -> dict:
    """Two syncs with greedy responses after each."""
    from megarl.rollout.engine import make_greedy_requests, make_requests

    trainer = Trainer(folders, parallel, tensor, joint, replicas, remote=remote)
    greedy = make_greedy_requests(trainer.prompts(), trainer.rollout, stop_token_ids=(3,))
    report: dict = {"start_s": trainer.start_s, "greedy": [], "push_ms": []}
    for version, folder in enumerate(folders, 5):
        trainer.load(folder)
        pushed = trainer.sync.push(trainer, version)
        completions = trainer.engine.generate(greedy)
        assert [(c.policy_version, c.later_versions) for c in completions] == [(version, ())] * len(greedy)
        report["greedy"].append(greedy_difference(folder, completions, greedy))
        report["push_ms"].append(round(pushed.seconds * 1e3, 1))
        report["num_rounds"], report["sent_bytes"] = pushed.num_rounds, pushed.sent_bytes
    sampled = make_requests(trainer.prompts(), trainer.rollout, stop_token_ids=(3,), seed=(0, 1))
    report["repeats"] = trainer.engine.generate(sampled) == trainer.engine.generate(sampled)
    report["wire"] = type(trainer.sync.wire).__name__
    report["corrupted"] = corrupted(trainer, greedy)
    trainer.engine.close()
    return report


def corrupted(trainer: Trainer, requests: list) -> str:
    """The message of a sync whose first message from rank 0 has one wrong element; afterwards a good sync makes up for it."""
    trainer.sync.verify_first = 99
    wire = trainer.sync.transport.wire
    if trainer.layout.rank == 0:
        trainer.sync.transport.wire = Flip(wire)
    with pytest.raises(RolloutError) as caught:
        trainer.sync.push(trainer, 8)
    with pytest.raises(RolloutError, match="no weights yet"):
        trainer.engine.generate(requests)
    trainer.sync.transport.wire = wire
    trainer.sync.push(trainer, 9)
    assert {completion.policy_version for completion in trainer.engine.generate(requests)} == {9}
    return str(caught.value)


class Flip:
    """A wire that changes one element of the first message it sends."""

    def __init__(self, wire):
        self.wire, self.done = wire, False

    def post(self, sends, receives):
        if sends and not self.done:
            self.done = True
            sends[0][1].view(-1)[3] += 1e-3
        return self.wire.post(sends, receives)

    def __getattr__(self, name):
        return getattr(self.wire, name)


def assert_follows(reports: list[dict], joint: bool) -> None:
    for report in reports:
        print(report)
        assert all(worst < 1e-4 and agreement == 1.0 for worst, agreement in report["greedy"])
        assert report["repeats"] and report["num_rounds"] > 2
        assert report["wire"] == ("JointWire" if joint else "RingWire")
        assert "1 of " in report["corrupted"] and "from rank 0 to generator 0" in report["corrupted"]


def test_a_generator_of_its_own_follows_the_trainer_through_shared_memory(models):
    assert_follows(run_ranks(follow, 2, models, TP2, 1, False, 1, timeout_s=200), joint=False)


def follow_cases(rank: int, world_size: int, folders, cases) -> list[dict]:
    return [follow(rank, world_size, folders, *case) for case in cases]


@pytest.mark.slow
def test_every_wire_and_layout(models):
    cases = [(parallel, tensor, joint, 1) for parallel in (TP2, PP2) for tensor in (1, 2) for joint in (False, True)]
    cases.append((ParallelConfig(), 1, False, 3))  # more generators than trainer ranks
    reports = run_ranks(follow_cases, 2, models, cases, timeout_s=580)
    for case, per_rank in zip(cases, zip(*reports, strict=True)):
        print(case)
        assert_follows(list(per_rank), joint=case[2])


def overtake(rank: int, world_size: int, folders, tensor: int) -> dict:
    """Weights arrive while responses are on their way."""
    from dataclasses import replace

    from megarl.rollout.engine import make_greedy_requests

    trainer = Trainer(folders, TP2, tensor, joint=False)
    requests = make_greedy_requests(trainer.prompts(), trainer.rollout, stop_token_ids=())
    requests = [replace(r, sampling=replace(r.sampling, max_tokens=MAX_LEN - len(r.token_ids))) for r in requests]
    for version, folder in enumerate(folders):
        trainer.load(folder)
        trainer.sync.push(trainer, version)
        start = time.perf_counter()
        settled = trainer.engine.generate(requests)
        took = time.perf_counter() - start
    underway = trainer.engine.submit(requests)
    time.sleep(took / 3)
    trainer.load(folders[0])
    trainer.sync.push(trainer, 7)
    completions = trainer.engine.collect(underway)
    trainer.engine.close()
    assert all(completion.policy_version == 1 for completion in settled)
    spans = [(c.policy_version, c.later_versions) for c in completions]
    return {"spans": spans, "worst": max(span_difference(folders, r, c) for r, c in zip(requests, completions))}


def span_difference(folders, request, completion) -> float:
    """Largest difference to transformers, each token on the weights that its span names (1: the second folder, 7: the first)."""
    import torch
    import transformers

    folder_of = {1: folders[1], 7: folders[0]}
    starts = [(0, completion.policy_version), *completion.later_versions]
    ends = [start for start, _ in starts[1:]] + [len(completion.token_ids)]
    worst = 0.0
    for (start, version), end in zip(starts, ends, strict=True):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder_of[version], dtype=torch.float32, attn_implementation="eager"
        ).eval()
        with torch.no_grad():
            logits = model(torch.tensor([[*request.token_ids, *completion.token_ids]])).logits[0].float()
        logprobs = logits.log_softmax(-1)
        for offset in range(start, end):
            value = float(logprobs[len(request.token_ids) - 1 + offset, completion.token_ids[offset]])
            worst = max(worst, abs(value - completion.rollout_logprobs[offset]))
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2])
def test_weights_that_arrive_on_the_way_are_told_token_by_token(models, tensor):
    reports = run_ranks(overtake, 2, models, tensor, timeout_s=300)
    print(reports[0])
    assert reports[0] == reports[1]
    assert reports[0]["worst"] < 1e-4
    spanning = [later for version, later in reports[0]["spans"] if version == 1 and later]
    assert spanning and all(newer == 7 and start > 0 for later in spanning for start, newer in later)


def join_when_invited(file: Path, replicas: int, ended: list[int]) -> None:
    """What a user's job script does on the generators' node."""
    deadline = time.monotonic() + 60
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert file.stat().st_mode & 0o077 == 0
    command = [sys.executable, "-m", "megarl.rollout.worker", "--join", str(file), "--replicas", str(replicas)]
    ended.append(subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=150).returncode)


@pytest.mark.slow
def test_generators_that_join_from_elsewhere(models, tmp_path):
    ended: list[int] = []
    joiner = threading.Thread(target=join_when_invited, args=(tmp_path / "generators.json", 2, ended))
    joiner.start()
    reports = run_ranks(follow, 2, models, TP2, 1, True, 2, tmp_path, timeout_s=200)
    assert_follows(reports, joint=True)
    joiner.join()
    assert ended == [0] and not (tmp_path / "generators.json").exists()


def nobody_joins(rank: int, world_size: int, folders, output_dir: Path) -> str:
    with pytest.raises(RolloutError) as caught:
        Trainer(folders, TP2, 1, True, 2, timeout_s=3.0, remote=output_dir)
    return str(caught.value)


@pytest.mark.slow
def test_a_trainer_that_nobody_joins(models, tmp_path):
    for message in run_ranks(nobody_joins, 2, models, tmp_path, timeout_s=100):
        assert "0 of 2 generator replicas joined within 3 s" in message and "--join" in message
