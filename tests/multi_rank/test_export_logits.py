"""Trained under TP x PP, exported, read by transformers: the numbers are those of the ranks. And any layout reads the checkpoint."""

import json
from pathlib import Path

import pytest
import torch

from tests.course.lesson_files import reward_run, sft_run, write_files
from tests.ranks import run_ranks
from tests.tiny_hf import KINDS, MIXTURES, save_tiny, tiny_config

ACTORS = tuple(kind for kind in KINDS | MIXTURES if not kind.endswith("critic"))
REWARD_MODELS = ("llama3-tied", "gemma3")  # made of these language models
TOKENS = torch.arange(3, 3 + 2 * 12).view(2, 12)
TP2PP2 = {"tensor": 2, "pipeline": 2, "sequence": True, "microbatch_size": 2}
OTHER = {"tensor": 1, "pipeline": 2, "microbatch_size": 2}
TOLERANCE = 1e-4


def train_and_read(rank: int, world_size: int, root: Path) -> dict[str, torch.Tensor]:
    from megarl.checkpoint.sources import open_weights
    from megarl.course.reward_model import train_reward
    from megarl.course.sft import train_sft
    from megarl.models.token_stats import LogprobHead, ScoreHead
    from megarl.parallel import groups
    from megarl.ppo.roles import build_frozen
    from megarl.records import TokenBatch

    for kind in ACTORS:
        parallel = TP2PP2 | ({"expert": 2} if kind in MIXTURES else {})
        run = sft_run(root, f"out-{kind}", 1, parallel=parallel, model={"path": root / kind, "optimizer": {"lr": 1e-3}})
        train_sft(run, groups.initialize(run.parallel, run.seed))
    for kind in REWARD_MODELS:
        run = reward_run(root, f"out-reward-{kind}", 1, parallel=TP2PP2, model={"path": root / kind, "optimizer": {"lr": 1e-3}})
        train_reward(run, groups.initialize(run.parallel, run.seed))

    run = run.model_copy(update={"parallel": run.parallel.model_validate(OTHER)})
    layout = groups.initialize(run.parallel, run.seed)
    batch = TokenBatch(TOKENS, torch.full((2,), TOKENS.shape[1]))
    results = {}
    for kind in ACTORS:
        spec, source = open_weights(root / f"out-{kind}", "actor")
        replica, _ = build_frozen(spec, "actor", run, layout, source)
        results[kind] = replica.forward(batch, LogprobHead(run.parallel.logits_bytes))
    for kind in REWARD_MODELS:
        spec, source = open_weights(root / f"out-reward-{kind}", "reward")
        replica, _ = build_frozen(spec, "critic", run, layout, source)
        results[f"reward-{kind}"] = replica.forward(batch, ScoreHead())
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    root = write_files(tmp_path_factory.mktemp("export"))
    for kind in ACTORS:
        path = save_tiny(kind, root) / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": True, "temperature": 0.6}))
    return root, run_ranks(train_and_read, 4, root)


@pytest.mark.parametrize("kind", ACTORS)
def test_transformers_computes_the_same_logprobs(ranks, tmp_path, kind):
    from transformers import AutoModelForCausalLM

    from megarl.checkpoint.hf_export import export

    root, results = ranks
    model = AutoModelForCausalLM.from_pretrained(export(root / f"out-{kind}", tmp_path / "hf"), dtype=torch.float32)
    assert model.generation_config.temperature == 0.6, "what the model came with is kept through training"
    assert ("lm_head.weight" in model.state_dict()) and model.config.tie_word_embeddings == tiny_config(kind).tie_word_embeddings
    with torch.no_grad():
        logprobs = model(TOKENS).logits.log_softmax(-1)[:, :-1].gather(2, TOKENS[:, 1:, None]).squeeze(2)
        start = AutoModelForCausalLM.from_pretrained(root / kind, dtype=torch.float32)(TOKENS).logits.log_softmax(-1)
    for result in results:
        assert (result[kind][:, 1:] - logprobs).abs().max() < TOLERANCE
    untrained = start[:, :-1].gather(2, TOKENS[:, 1:, None]).squeeze(2)
    assert (untrained - logprobs).abs().max() > 10 * TOLERANCE, "the step of training is part of the export"


@pytest.mark.parametrize("kind", REWARD_MODELS)
def test_transformers_computes_the_same_scores(ranks, tmp_path, kind):
    from transformers import AutoModelForSequenceClassification

    from megarl.checkpoint.hf_export import export

    root, results = ranks
    model = AutoModelForSequenceClassification.from_pretrained(export(root / f"out-reward-{kind}", tmp_path / "hf"), dtype=torch.float32)
    with torch.no_grad():
        scores = model(TOKENS).logits.squeeze(1)
    for result in results:
        assert (result[f"reward-{kind}"] - scores).abs().max() < TOLERANCE
