"""The house: what is imported when, under which names, in which direction; how files look."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fastgen

ROOT = Path(__file__).parent.parent
FOLDERS = {"fastgen": ROOT / "fastgen", "passes": ROOT / "passes", "kernels": ROOT / "kernels"}
INSTALLED = {"fastgen": "fastgen", "passes": "fastgen.passes", "kernels": "fastgen.kernels"}


def modules() -> dict[str, Path]:
    """Every module of the library under the name it is installed as."""
    found = {}
    for folder, path in FOLDERS.items():
        for file in sorted(path.rglob("*.py")):
            parts = file.relative_to(path).with_suffix("").parts
            name = ".".join((INSTALLED[folder], *parts)).removesuffix(".__init__")
            found[name] = file
    return found


MODULES = modules()
EACH_MODULE = pytest.mark.parametrize("name", sorted(MODULES))


def parse(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def imports_of(name: str, tree: ast.Module | None = None, typing_too: bool = False) -> set[str]:
    """Full names of what a module imports anywhere in its file, `if TYPE_CHECKING` left out."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    stack: list[ast.AST] = [tree or parse(name)]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            stack.extend(node.body if typing_too else [])
            stack.extend(node.orelse)
            continue
        stack.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in MODULES else base)
    return found


def run_python(code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )


# What is imported when.


def test_importing_fastgen_imports_nothing_heavy(tmp_path):
    code = """
import sys
import fastgen
assert fastgen.__version__
assert "optimize" in dir(fastgen)
heavy = {"torch", "transformers", "numpy", "triton", "accelerate", "safetensors", "rich"}
print(sorted(heavy & set(sys.modules)))
"""
    result = run_python(code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_errors_and_settings_need_no_torch(tmp_path):
    code = """
import sys
import fastgen
fastgen.Config(block_size=32), fastgen.SamplingParams(), fastgen.UnsupportedModelError
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""
    result = run_python(code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_the_scheduler_needs_no_torch(tmp_path):
    code = """
import sys
import fastgen.engine.scheduler, fastgen.engine.block_pool, fastgen.engine.request
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""
    result = run_python(code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_the_library_does_not_import_transformers_before_it_needs_it(tmp_path):
    """fastgen.passes and fastgen.kernels are for anybody's graphs."""
    code = """
import sys
import fastgen.passes, fastgen.kernels, fastgen.compiled, fastgen.live
print("transformers" in sys.modules)
"""
    result = run_python(code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize("module", ["fastgen.capture", "fastgen.passes"])
def test_a_module_imports_the_ops_that_it_names(module, tmp_path):
    """Whoever starts there must find `fastgen::attention` registered."""
    code = "import importlib, sys, torch; importlib.import_module(sys.argv[1]); "
    result = run_python(code + "print(torch.ops.fastgen.attention)", module, cwd=tmp_path)
    assert result.returncode == 0, result.stderr.strip().splitlines()[-1]


# Under which names.


@pytest.mark.parametrize(
    "statement",
    [
        "import passes",
        "import passes.graph",
        "from passes import run_passes",
        "import kernels.registry",
        "from kernels import attention",
        "from kernels import implementations",
    ],
)
def test_the_folders_are_no_packages_of_their_own(statement, tmp_path):
    """Found on the path of the repository's root they must not become second copies."""
    code = "import sys; sys.path.insert(0, sys.argv[1])\n" + statement
    result = run_python(code, str(ROOT), cwd=tmp_path)
    last = result.stderr.strip().splitlines()[-1] if result.stderr.strip() else "no error"
    assert result.returncode != 0, f"{statement} went through"
    assert last.startswith(("ImportError", "ModuleNotFoundError")), last


def test_kernels_is_not_taken_for_hugging_faces_package():
    """`python -c` and `python -m pytest` in the root put this folder on transformers' way."""
    code = """
from transformers.utils.import_utils import is_kernels_available
from transformers import LlamaForCausalLM
print(is_kernels_available())
"""
    result = run_python(code, cwd=ROOT)
    assert result.returncode == 0, result.stderr.strip().splitlines()[-1]
    assert result.stdout.strip() == "False"


def test_installed_names_are_mapped_to_the_folders():
    for folder, name in INSTALLED.items():
        module = importlib.import_module(name)
        assert Path(module.__file__).parent == FOLDERS[folder]


@EACH_MODULE
def test_every_file_lies_in_a_package(name):
    package = MODULES[name].parent
    assert (package / "__init__.py").exists() or package.name in FOLDERS


# In which direction.

LAYERS = ("kernels", "passes", "compiled", "engine", "api")  # from the bottom to the top


def layer_of(name: str) -> str | None:
    parts = name.split(".")
    return next((part for part in parts[1:2] if part in LAYERS), None)


def forbidden(name: str, imported: str) -> bool:
    """Whether a module of one layer imports one of a layer above it."""
    here, there = layer_of(name), layer_of(imported)
    return bool(here and there and LAYERS.index(there) > LAYERS.index(here))


@EACH_MODULE
def test_imports_go_one_way(name):
    wrong = {imported for imported in imports_of(name) if forbidden(name, imported)}
    assert not wrong


@pytest.mark.parametrize("name", [name for name in sorted(MODULES) if ".kernels" in name])
def test_kernels_import_kernels_torch_and_triton_only(name):
    roots = {imported.split(".")[0] for imported in imports_of(name)}
    allowed = {"torch", "triton", "numpy", "fastgen"} | sys.stdlib_module_names
    assert roots <= allowed
    ours = {imported for imported in imports_of(name) if imported.startswith("fastgen")}
    assert all(imported.startswith("fastgen.kernels") for imported in ours), ours


@pytest.mark.parametrize("name", [name for name in sorted(MODULES) if ".passes" in name])
def test_passes_import_passes_and_kernels_only(name):
    ours = {imported for imported in imports_of(name) if imported.startswith("fastgen")}
    allowed = ("fastgen.passes", "fastgen.kernels")
    assert all(imported.startswith(allowed) for imported in ours), ours
    assert not {imported for imported in imports_of(name) if imported.startswith("transformers")}


@pytest.mark.parametrize("name", [name for name in sorted(MODULES) if ".engine." in f"{name}."])
def test_the_engine_knows_no_model_and_no_api(name):
    above = {"api", "capture", "generate", "frontend", "live", "cli", "explanation"}
    wrong = {
        imported
        for imported in imports_of(name, typing_too=True)
        if imported.startswith("fastgen.") and imported.split(".")[1] in above
    }
    assert not wrong
    assert not {imported for imported in imports_of(name) if imported.startswith("transformers")}


@pytest.mark.parametrize("name", ["fastgen.engine.scheduler", "fastgen.engine.block_pool"])
def test_who_decides_needs_no_tensors(name):
    assert not {imported for imported in imports_of(name) if imported.split(".")[0] == "torch"}


@EACH_MODULE
def test_only_capture_knows_transformers_attention_and_masks(name):
    if name.startswith("fastgen.capture"):
        return
    names = {"AttentionInterface", "AttentionMaskInterface", "masking_utils"}
    names |= {"ALL_ATTENTION_FUNCTIONS", "ALL_MASK_ATTENTION_FUNCTIONS"}
    said = {
        node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)
        for node in ast.walk(parse(name))
        if isinstance(node, ast.Attribute | ast.Name)
    }
    imported = {part for full in imports_of(name) for part in full.split(".")}
    assert not names & (said | imported)


def test_nothing_imports_in_a_circle():
    """At run time, over the imports that stand at the top of each file."""
    graph = {}
    for name in MODULES:
        tree = parse(name)
        tree.body = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom | ast.If)]
        graph[name] = {other for other in imports_of(name, tree) if other in MODULES} - {name}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name in done:
            return
        for other in sorted(graph[name]):
            if not name.startswith(f"{other}.") and other != "fastgen":
                visit(other, (*path, name))
        done.add(name)

    for name in sorted(graph):
        visit(name, ())


# How files look.


@EACH_MODULE
def test_files_are_short(name):
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= 600


@EACH_MODULE
def test_no_drawer(name):
    drawers = {"utils", "util", "helpers", "misc", "common"}
    assert not drawers & set(name.split("."))


@EACH_MODULE
def test_every_file_says_what_it_is(name):
    if MODULES[name].name != "_version.py":
        assert ast.get_docstring(parse(name))


@EACH_MODULE
def test_only_the_command_line_prints(name):
    if name.startswith("fastgen.cli") or name.endswith(".__main__"):
        return
    printed = [
        node.lineno
        for node in ast.walk(parse(name))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write")
    ]
    assert not printed


# What is public.


@pytest.mark.parametrize("name", fastgen.__all__)
def test_every_public_name_resolves(name):
    assert getattr(fastgen, name) is not None
    assert name in dir(fastgen)


def test_public_names_are_the_lazy_ones():
    homes = [name for names in fastgen._HOMES.values() for name in names]
    assert sorted(homes) == sorted(set(fastgen.__all__) - {"__version__"})
    assert len(set(homes)) == len(homes)


def test_type_checkers_see_the_same_names():
    tree = parse("fastgen")
    block = next(n for n in tree.body if isinstance(n, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    seen = {
        (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == {(home, name) for home, names in fastgen._HOMES.items() for name in names}


@pytest.mark.parametrize(
    "name", [n for n in sorted(MODULES) if "__all__" in MODULES[n].read_text()]
)
def test_every_all_resolves(name):
    module = importlib.import_module(name)
    for public in module.__all__:
        assert hasattr(module, public), f"{name}.{public}"
    assert len(set(module.__all__)) == len(module.__all__)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        fastgen.optimise  # noqa: B018
    assert not hasattr(fastgen, "__no_such_dunder__")


def test_types_are_shipped():
    assert (FOLDERS["fastgen"] / "py.typed").exists()
    files = (ROOT / "pyproject.toml").read_text()
    assert 'fastgen = ["py.typed"]' in files


def test_the_version_is_that_of_the_distribution():
    assert fastgen.__version__ == importlib.metadata.version("torch-fastgen")


def test_every_package_is_listed_for_the_wheel():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {name for name, file in MODULES.items() if file.name == "__init__.py"}
    data_only = {"fastgen.demo_model"}
    assert packages <= set(setup["packages"])
    for name in set(setup["packages"]) - packages - data_only:
        folder = ROOT / Path(*name.split("."))
        assert folder.is_dir(), f"{name} is listed and has no folder"
    for name, folder in setup["package-dir"].items():
        assert (ROOT / folder).is_dir(), f"{name} is mapped to {folder}, which is not there"


# Planted mistakes.


def test_planted_imports_are_seen():
    source = (
        "from ..api import optimize\nimport torch\nif TYPE_CHECKING:\n    from .. import live\n"
    )
    found = imports_of("fastgen.engine.scheduler", ast.parse(source))
    assert found == {"fastgen.api", "torch"}
    assert forbidden("fastgen.engine.scheduler", "fastgen.api")
    assert forbidden("fastgen.kernels.attention", "fastgen.passes.graph")
    assert forbidden("fastgen.passes.graph", "fastgen.compiled")
    assert not forbidden("fastgen.api", "fastgen.engine.engine")
    typing = imports_of("fastgen.engine.scheduler", ast.parse(source), typing_too=True)
    assert typing == {"fastgen.api", "torch", "fastgen.live"}
