"""The house: ideas stand on the engine, the laboratory on the ideas, and arrows go down only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALONE = "bpe", "optim", "evals", "layers", "posenc", "masks"  # on the engine alone
IDEAS = [*ALONE, "attention", "latent", "moe", "architectures", "checkpoint", "model", "mtp", "train", "finetune"]
IDEAS += ["rlhf", "cot"]  # from below to above
FILES = sorted(path for zone in ("*.py", "engine/*.py", "lab/**/*.py") for path in ROOT.glob(zone))


def imports(tree):
    """The modules that are imported anywhere but under __main__."""
    under_main = {id(n) for top in tree.body if isinstance(top, ast.If) for n in ast.walk(top)}
    for node in ast.walk(tree):
        if id(node) not in under_main and isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_go_down(path):
    zone, own = path.relative_to(ROOT).parts[0], {p.stem for p in ROOT.glob("*.py")}
    found = {module.split(".")[0] for module in imports(ast.parse(path.read_text(encoding="utf-8")))}
    assert "lecture" not in found, "the front door stands above everything"
    if path.parent == ROOT and path.stem != "lecture":
        assert path.stem in IDEAS, "a new idea: where does it stand?"
        below = {"engine"} if path.stem in ALONE else {"engine", *IDEAS[: IDEAS.index(path.stem)]}
        assert found & (own | {"lab", "engine"}) <= below
        assert not found & {"numpy", "cupy"}, "through the engine"
    if zone == "engine":
        assert not found & (own | {"lab"})
