"""Nothing in the package runs what it reads: no pickle, no eval, no torch.load of anything."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path for folder in ("fastgen", "passes", "kernels") for path in (ROOT / folder).rglob("*.py")
)
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


def findings(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names]
            found += [
                f"imports {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES
            ]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS or name.split(".")[0] in FORBIDDEN_MODULES:
                found.append(f"calls {name}")
            safe = any(
                key.arg == "weights_only" and ast.unparse(key.value) == "True"
                for key in node.keywords
            )
            if name == "torch.load" and not safe:
                found.append("calls torch.load without weights_only=True")
            if name in ("np.load", "numpy.load") and any(
                k.arg == "allow_pickle" for k in node.keywords
            ):
                found.append("lets numpy unpickle")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file(path):
    assert findings(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import a, marshal as b",
        "eval('1')",
        "exec(code)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_planted(source):
    assert findings(source)


@pytest.mark.parametrize(
    "source", ["model.eval()", "torch.load(p, weights_only=True)", "torch.compile(model)"]
)
def test_what_is_fine(source):
    assert findings(source) == []
