"""The package's shape, read from the syntax tree: layers, who may import what, no cycles, nothing that unpickles."""

import ast
import graphlib
from pathlib import Path

import pytest

import megarl
from megarl.models.family import FAMILIES

ROOT = Path(megarl.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Longest prefix wins. Imports point down or sideways.
LAYERS = {
    "megarl": 0,  # the empty package itself
    "megarl.errors": 0,
    "megarl.config": 0,
    "megarl.config_file": 0,
    "megarl.yaml_document": 0,
    "megarl.knobs": 0,
    "megarl.launcher": 0,
    "megarl.operations.events": 0,
    "megarl.operations.faults": 0,
    "megarl.operations.heartbeat": 0,
    "megarl.operations.drain": 0,
    "megarl.operations.outcome": 0,
    "megarl.operations.verdict": 0,
    "megarl.operations.stacks": 0,
    "megarl.operations.stragglers": 0,
    "megarl.operations.watching": 0,
    "megarl.operations.watchdog": 0,
    "megarl.parallel.layout": 0,
    "megarl.parallel.torchrun": 0,
    "megarl.records": 1,
    "megarl.cross_check": 1,
    "megarl.metrics": 1,
    "megarl.data": 1,
    "megarl.rewards": 1,
    "megarl.bridge.boxes": 1,
    "megarl.bridge.demand": 1,
    "megarl.bridge.plan": 1,
    "megarl.bridge.rounds": 1,
    "megarl.bridge.senders": 1,
    "megarl.models.spec": 1,
    "megarl.models.decoder_table": 1,
    "megarl.models.hf_config": 1,
    "megarl.models.family": 1,
    **{family.translate.__module__: 1 for family in FAMILIES.values()},
    "megarl.ppo.advantages": 1,
    "megarl.ppo.algorithms": 1,
    "megarl.ppo.check": 1,
    "megarl.ppo.estimators": 1,
    "megarl.ppo.eval_sets": 1,
    "megarl.ppo.reward_shaping": 1,
    "megarl.ppo.losses": 1,
    "megarl.ppo.kl": 1,
    "megarl.parallel": 2,
    "megarl.models": 3,
    "megarl.bridge": 4,
    "megarl.rollout": 4,
    "megarl.rollout.check": 1,
    "megarl.checkpoint": 5,
    "megarl.ppo.ptx": 5,
    "megarl.ppo.roles": 5,
    "megarl.ppo": 6,
    "megarl.course": 6,
    "megarl.sampling": 6,
    "megarl.sampling.check": 1,
    "megarl.run_files": 7,
    "megarl.run_folder": 7,
    "megarl.check": 7,
    "megarl.planner": 7,
    "megarl.cli": 7,
    "megarl.data_commands": 7,
    "megarl.file_commands": 7,
    "megarl.operations": 7,
    "megarl.quickstart": 7,
    "megarl.serving": 7,
}
FORBIDDEN = {
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "pickletools", "marshal", "shelve", "joblib", "jsonpickle"),
    *("allow_pickle", "weights_only", "all_gather_object", "broadcast_object_list", "gather_object", "trust_remote_code"),
}
PICKLE_READER = "megarl.checkpoint.pickle_data"  # takes opcodes apart with pickletools and runs none


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def layer(name: str) -> int | None:
    while name:
        if name in LAYERS and name != "megarl":
            return LAYERS[name]
        name = name.rpartition(".")[0]
    return None


def imports(path: Path) -> list[tuple[str, int]]:
    """(module, line) of every import, also inside functions; `from package import module` names the module."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.append((inner if inner in MODULES else node.module, node.lineno))
    return found


def offences(rule) -> list[str]:
    """`file:line module` of every import that `rule(importing module, imported module)` refuses."""
    return [
        f"{path.relative_to(ROOT.parent)}:{line} imports {imported}"
        for name, path in MODULES.items()
        for imported, line in imports(path)
        if rule(name, imported)
    ]


def test_every_module_has_a_layer():
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py" and not path.read_text().strip()}
    above = {"megarl", "megarl.__main__"}
    assert not [name for name in MODULES if layer(name) is None and name not in packages | above]


def test_imports_point_down_or_sideways():
    def points_up(name: str, imported: str) -> bool:
        mine, theirs = layer(name), layer(imported)
        return imported.startswith("megarl.") and mine is not None and theirs is not None and theirs > mine

    assert offences(points_up) == []


def test_there_is_no_import_cycle():
    graph = {name: {i for i, _ in imports(path) if i in MODULES and i != name} for name, path in MODULES.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_only_three_rooms_know_megatron():
    rooms = ("megarl.parallel", "megarl.models", "megarl.checkpoint")
    assert offences(lambda name, imported: imported.split(".")[0] == "megatron" and not name.startswith(rooms)) == []


def test_only_the_adapter_knows_vllm():
    assert offences(lambda name, imported: imported.split(".")[0] == "vllm" and not name.startswith("megarl.rollout.vllm_")) == []


def test_the_pure_layers_stay_pure():
    """No torch where plans are made for a cluster on a laptop; no torch.distributed in the formulas."""
    no_torch = ("megarl.errors", "megarl.config", "megarl.parallel.layout", "megarl.models.spec", "megarl.models.family")
    no_distributed = ("megarl.ppo.advantages", "megarl.ppo.losses", "megarl.ppo.kl", "megarl.metrics", "megarl.records")
    assert offences(lambda name, imported: imported.split(".")[0] == "torch" and name in no_torch) == []
    assert offences(lambda name, imported: imported.startswith("torch.distributed") and name.startswith(no_distributed)) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path))
def test_nothing_unpickles_or_runs_foreign_code(path):
    forbidden = FORBIDDEN - {"pickletools"} if module_name(path) == PICKLE_READER else FORBIDDEN
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        where = f"{path}:{getattr(node, 'lineno', '?')}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name.split(".")[0] for alias in node.names} | {(getattr(node, "module", None) or "").split(".")[0]}
            assert not names & forbidden, where
            assert (getattr(node, "module", None), "load") not in {("torch", alias.name) for alias in node.names}, where
        elif isinstance(node, ast.Attribute):
            is_load = node.attr == "load" and isinstance(node.value, ast.Name) and node.value.id == "torch"
            assert node.attr not in forbidden and not is_load, where
        elif isinstance(node, ast.Name):
            assert node.id not in forbidden, where
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant) and node.value.value is False, where
        elif isinstance(node, ast.keyword):
            assert node.arg not in ("allow_pickle", "weights_only"), where
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), where


def test_the_loop_fits_one_screen():
    tree = ast.parse((ROOT / "ppo" / "loop.py").read_text(encoding="utf-8"))
    train = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    assert train.end_lineno - train.lineno < 60
    names = {node.attr for node in ast.walk(train) if isinstance(node, ast.Attribute)}
    assert not names & {"rank", "tp_rank", "dp_rank", "pp_rank", "is_last_stage", "is_first_stage"}, "the loop holds no rank test"


def test_files_and_functions_stay_small():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}:{node.lineno} {node.name}"
