"""A reward model that transformers saved: its scores here are those of transformers, under any layout, and through import and export."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megarl.errors import WeightMapError
from tests.course.lesson_files import reward_run, write_files
from tests.ranks import run_ranks
from tests.tiny_hf import save_tiny

KINDS = ("llama-critic", "qwen3-critic", "gemma3-critic")
SEQUENCES = [[3, 4, 5, 6, 7, 8, 9], [11, 12, 13], [21, 22, 23, 24, 25]]
TOLERANCE = 1e-4


def score_them(rank: int, world_size: int, root: Path) -> dict[str, list]:
    from megarl.checkpoint.sources import open_weights
    from megarl.models.token_stats import ScoreHead
    from megarl.parallel import groups
    from megarl.ppo.roles import RewardModel, build_frozen
    from megarl.ppo.terms import SequenceScores
    from megarl.records import TokenBatch

    run = reward_run(root, "unused", 1, parallel={"tensor": 2, "sequence": True, "microbatch_size": 2})
    layout = groups.initialize(run.parallel, run.seed)
    found = {}
    for path in sorted(root.glob("*-critic*")):
        spec, source = open_weights(path, "reward")
        found[path.name] = SequenceScores(RewardModel(spec, run, layout, source), pad_id=0)(SEQUENCES)
    spec, source = open_weights(root / KINDS[0], "critic")  # the same weights start a critic
    replica, _ = build_frozen(spec, "critic", run, layout, source)
    rows = TokenBatch(torch.tensor([SEQUENCES[0]]), torch.tensor([len(SEQUENCES[0])]))
    return found | {"critic": replica.forward(rows, ScoreHead()).tolist()}


def by_transformers(path: Path) -> list[float]:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return [float(model(torch.tensor([row])).logits) for row in SEQUENCES]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    from megarl.checkpoint.hf_export import export
    from megarl.checkpoint.hf_import import import_hf

    root = write_files(tmp_path_factory.mktemp("classification"))
    for kind in KINDS:
        save_tiny(kind, root)
        imported = import_hf(root / kind, root / f"{kind}-imported", tokenizer=root / "sp.model")
        export(imported, root / f"{kind}-exported")
    return root, run_ranks(score_them, 2, root)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_transformers(scored, kind):
    root, results = scored
    expected = by_transformers(root / kind)
    assert by_transformers(root / f"{kind}-exported") == expected
    assert max(map(abs, expected)) > 100 * TOLERANCE
    for result in results:
        for name in (kind, f"{kind}-imported", f"{kind}-exported"):
            assert result[name] == pytest.approx(expected, abs=TOLERANCE)


def test_the_same_weights_start_a_critic(scored):
    root, results = scored
    assert results[0]["critic"] == pytest.approx(by_transformers(root / KINDS[0])[:1], abs=TOLERANCE)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: {"score.bias": torch.ones(1)}, "score.bias; expected a head without one"),
        (lambda state: {"score.weight": state["score.weight"].repeat(3, 1)}, "score.weight has 3 rows, for 3 labels; expected 1"),
    ],
)
def test_other_heads_are_refused_by_name(tmp_path, change, message):
    from megarl.checkpoint.hf_import import import_hf
    from megarl.checkpoint.sources import open_weights

    path = save_tiny("llama-critic", tmp_path)
    state = load_file(path / "model.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in (state | change(state)).items()}, path / "model.safetensors")
    with pytest.raises(WeightMapError, match=message):
        open_weights(path, "reward")
    with pytest.raises(WeightMapError, match=message):
        import_hf(path, tmp_path / "out")


def test_an_import_says_when_transformers_scores_otherwise(tmp_path, monkeypatch):
    """The proof can fail: with another head under transformers than under us, nothing is written."""
    import transformers

    from megarl.checkpoint.hf_import import import_hf
    from megarl.errors import CheckpointError

    root = write_files(tmp_path)
    path = save_tiny("llama-critic", root)
    right = transformers.LlamaForSequenceClassification.forward
    head = transformers.LlamaForSequenceClassification.__init__

    def other(self, config):
        head(self, config)
        self.model.norm.variance_epsilon = 10.0

    monkeypatch.setattr(transformers.LlamaForSequenceClassification, "__init__", other)
    with pytest.raises(CheckpointError, match="values of every token of transformers differ from megarl's"):
        import_hf(path, root / "out", tokenizer=root / "sp.model")
    assert not (root / "out").exists() and right is transformers.LlamaForSequenceClassification.forward
    import_hf(path, root / "out", tokenizer=root / "sp.model", proof="elements")
