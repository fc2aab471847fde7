"""`megarl sample` on real ranks: neither layout nor interruption shows in what is written, and lessons read it as it is."""

import json
from pathlib import Path

import pytest

from megarl.config import LessonData, SampleRun
from megarl.data.demonstrations import DemonstrationSet
from megarl.data.rankings import RankingSet
from megarl.data.tokenizers import load_tokenizer
from megarl.errors import RolloutError
from tests.ranks import run_ranks


def sample_run(root: Path, output: str, **changes: object) -> SampleRun:
    """37 prompts of the quickstart in blocks of 8, 3 responses each; the model has random weights."""
    return SampleRun.model_validate(
        {
            "output_dir": root / output,
            "precision": "fp32",
            "tokenizer": root / "data" / "tokenizer.model",
            "actor": {"path": root / "data" / "model", "random_init": True},
            "rewards": [{"kind": "exact"}, {"kind": "length", "target": 2, "weight": 0.5}],
            "data": {"path": root / "data" / "prompts.jsonl", "max_prompt_tokens": 6},
            "rollout": {"prompts_per_step": 8, "samples_per_prompt": 3, "max_response_tokens": 4, "kv_cache_bytes": 8 << 20},
            "sample": {"num_prompts": 37},
            **changes,
        }
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    from megarl.quickstart.make_data import make_data

    root = tmp_path_factory.mktemp("sample")
    make_data(root / "data", seed=0)
    return root


def lines_of(run: SampleRun) -> list[dict]:
    return [json.loads(line) for line in (run.output_dir / "samples.jsonl").read_text().splitlines()]


def scripted(rank: int, world_size: int, run: SampleRun, blocks: int) -> list[int]:
    """The run with a sampler whose responses follow from the requests alone, and which fails after so many `blocks`."""
    from megarl.data.prompts import PromptSet
    from megarl.parallel import groups
    from megarl.parallel.memory import Phases
    from megarl.rewards.exact import ExactAnswer
    from megarl.rewards.rules import Length
    from megarl.rewards.scorer import Term, WeightedSum
    from megarl.rollout.scripted import ScriptedEngine
    from megarl.sampling.part_files import SampleFiles
    from megarl.sampling.sampler import SamplingParts, sample

    layout = groups.initialize(run.parallel, run.seed)
    tokenizer = load_tokenizer(run.tokenizer)

    class Failing(ScriptedEngine):
        calls = 0

        def generate(self, requests, on_finished=None):
            self.calls += 1
            if self.calls > blocks:
                raise RolloutError("the power went")
            return super().generate(requests, on_finished)

    def script(request):
        digits = tuple(3 + (request.seed >> shift) % 10 for shift in (0, 8, 16))
        return ((*digits, 1) if request.seed % 3 else (*digits, 9)), (-1.0,) * 4

    engine = Failing(script)
    terms = (Term("exact", 1.0, ExactAnswer()), Term("length", 0.5, Length(2, 4)))
    parts = SamplingParts(
        prompts=PromptSet(run.data, tokenizer, needs_answers=True).prompts[: run.sample.num_prompts],
        stop_token_ids=(1,),
        tokenizer=tokenizer,
        engine=engine,
        memory=Phases(engine),
        scores=WeightedSum(terms),
        files=SampleFiles(run.output_dir, layout.dp_rank),
    )
    try:
        answered = sample(run, layout, parts)
    except RolloutError:
        return [-1]
    return [answered.step, answered.total]


@pytest.mark.slow
def test_layout_and_interruption_do_not_show(root):
    alone, together = sample_run(root, "alone"), sample_run(root, "together", parallel={"tensor": 2})
    assert run_ranks(scripted, 1, alone, 99) == [[37, 37]]
    lines = lines_of(alone)
    assert [line["prompt_id"] for line in lines] == list(range(37))
    assert all(len(line[key]) == 3 for line in lines for key in ("responses", "scores", "scores/exact", "num_tokens", "finish_reasons"))
    assert {reason for line in lines for reason in line["finish_reasons"]} == {"stop", "length"}
    assert len({text for line in lines for text in line["responses"]}) > 50
    assert run_ranks(scripted, 2, together, 99) == [[37, 37]] * 2
    torn = sample_run(root, "torn")
    assert run_ranks(scripted, 2, torn, 3) == [[-1]] * 2  # two replicas, three of five blocks
    assert not (torn.output_dir / "samples.jsonl").exists()
    assert run_ranks(scripted, 1, torn, 99) == [[37, 37]]
    assert lines_of(torn) == lines_of(together) == lines


def test_the_best_responses_are_demonstrations_and_all_of_them_rankings(root):
    tokenizer = load_tokenizer(root / "data" / "tokenizer.model")
    best, ranked = (
        sample_run(root, "best", sample={"num_prompts": 5, "keep": "best"}),
        sample_run(root, "ranked", sample={"num_prompts": 5}),
    )
    for run in (best, ranked):
        run_ranks(scripted, 1, run, 99)
    file, lists = (run.output_dir / "samples.jsonl" for run in (best, ranked))
    demonstrations = DemonstrationSet(LessonData(path=file, max_tokens=12), tokenizer)
    rankings = RankingSet(LessonData(path=lists, max_tokens=12), tokenizer)
    assert len(demonstrations) == len(rankings) == 5
    assert [max(line["scores"]) for line in lines_of(ranked)] == [line["score"] for line in lines_of(best)]
    assert [len(ranking.responses) for ranking in rankings.rankings] == [3] * 5


def sampled(rank: int, world_size: int, runs: list[SampleRun]) -> list[list[int]]:
    from megarl.parallel import groups
    from megarl.sampling.assembly import sample_responses

    answered = [sample_responses(run, groups.initialize(run.parallel, run.seed)) for run in runs]
    return [[one.step, one.total] for one in answered]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_vllm_answers_under_two_layouts(root):
    small = {"num_prompts": 11}
    data, tensor = sample_run(root, "vllm-dp2", sample=small), sample_run(root, "vllm-tp2", sample=small, parallel={"tensor": 2})
    greedy = sample_run(
        root,
        "vllm-greedy",
        sample=small | {"greedy": True},
        rollout={"prompts_per_step": 8, "max_response_tokens": 4, "kv_cache_bytes": 8 << 20, "tensor_parallel": 2},
    )
    assert run_ranks(sampled, 2, [data, tensor]) == [[[11, 11]] * 2] * 2
    assert run_ranks(sampled, 2, [greedy]) == [[[11, 11]]] * 2  # a process has one vLLM layout
    assert lines_of(data) == lines_of(tensor)
    assert len({text for line in lines_of(data) for text in line["responses"]}) > 20
    assert all(len(line["responses"]) == 1 for line in lines_of(greedy))
