"""Every run in configs/ fits its cluster, finds what it names, and reads its data, in a folder where all of it exists at toy size."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megarl import cli
from megarl.check import inspect
from megarl.config_file import load_run
from tests.recipes import RECIPES, ROOT, kind_of, write_result, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Stand-ins for everything, the results of other recipes included."""
    root = write_world(tmp_path_factory.mktemp("recipes"))
    for recipe in RECIPES:
        write_result(root, kind_of(recipe), load_run(kind_of(recipe), ROOT / recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        yield root


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_recipe_could_start(world: Path, recipe: Path, capsys: pytest.CaptureFixture) -> None:
    run = load_run(kind_of(recipe), ROOT / recipe)
    ranks = run.cluster.world_size if run.cluster is not None else None
    inspection = inspect(kind_of(recipe), ROOT / recipe, [], ranks, is_start=True)
    assert inspection.specs and not inspection.notices
    assert cli.run([kind_of(recipe), str(ROOT / recipe), "--check"]) == 0
    assert f"check passed: {inspection.world_size} ranks" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_the_data_of_a_recipe_is_read(world: Path, recipe: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.run(["data", "inspect", "--config", str(ROOT / recipe), "--examples", "1"]) == 0
    assert "0 malformed" in capsys.readouterr().out


def test_a_wrong_column_in_a_recipe_would_be_seen(world: Path, tmp_path: Path) -> None:
    text = (ROOT / "configs" / "gsm8k_grpo_8b.yaml").read_text(encoding="utf-8")
    (tmp_path / "spoilt.yaml").write_text(text.replace("{prompt: question}", "{prompt: query}"), encoding="utf-8")
    assert cli.run(["data", "inspect", "--config", str(tmp_path / "spoilt.yaml")]) == 65
