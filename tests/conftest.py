"""Fixtures shared by all tests. Nothing here needs a network or a GPU."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import shutil

import pytest
import torch
from fastgen.kernels.cpu import why_missing
from fastgen.kernels.cpu.build import cache_dir
from interpreted import pytest_collection_modifyitems  # noqa: F401 - a hook of pytest
from tiny_models import tiny_model

import fastgen
import fastgen.api
import fastgen.graphs
from fastgen.graph_key import NotCacheableError, graph_key

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """A cache folder of the session's own; only the compiled kernels are the user's.

    In this process graphs are cached where a test takes `graphs_on_disk` or
    `graphs_of_the_session`: everywhere else it is the capture that is tested.
    """

    def traced(*_):
        raise NotCacheableError("in tests graphs are traced")

    folder = tmp_path_factory.mktemp("cache")
    if why_missing() is None:  # compiled where the next session finds it
        for library in cache_dir().glob("kernels-*.so"):
            shutil.copy2(library, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTGEN_CACHE_DIR", str(folder))
        patch.setattr(fastgen.graphs, "graph_key", traced)
        yield folder


@pytest.fixture
def graphs_on_disk(tmp_path, monkeypatch):
    """An empty folder where this test's graphs are cached."""
    monkeypatch.setenv("FASTGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(fastgen.graphs, "graph_key", graph_key)
    return tmp_path / "graphs"


@pytest.fixture
def graphs_of_the_session(monkeypatch):
    """Models of this test may take the graph that an equal one had before: nothing is traced twice.

    For tests that are not about capture.
    """
    monkeypatch.setattr(fastgen.graphs, "graph_key", graph_key)


# What a test of the engine or of generate() runs on; tests/test_families.py is about all families.
PAIR = ("llama", "qwen2")


@pytest.fixture(params=PAIR)
def family(request) -> str:
    return request.param


@pytest.fixture
def model(family):
    """A fresh tiny random fp32 model."""
    return tiny_model(family)


@pytest.fixture
def optimized(model, graphs_of_the_session):
    """The same, optimised with NaN in every freed block; restored afterwards."""
    fastgen.optimize(model)
    poison(model)
    yield model
    if fastgen.api.lookup(model) is not None:
        fastgen.restore(model)


@pytest.fixture(scope="module", params=PAIR)
def pair(request):
    """Two equal models, plain and optimised, for tests that only generate."""
    plain, fast = tiny_model(request.param), tiny_model(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastgen.graphs, "graph_key", graph_key)
        fastgen.optimize(fast)
    poison(fast)
    return plain, fast


def poison(model) -> None:
    """From now on, whoever reads a freed block of this model's cache sees NaN."""
    fastgen.api.require(model).engine().poison_freed_blocks = True


# Exports that several tests read and none changes.


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """A tiny fp32 llama, exported; tests that change it take `folder`."""
    path = tmp_path_factory.mktemp("export") / "llama"
    fastgen.export(tiny_model("llama"), path)
    return path


@pytest.fixture
def folder(llama_folder, tmp_path):
    """A copy of it that a test may damage."""
    return shutil.copytree(llama_folder, tmp_path / "folder")


@pytest.fixture(scope="module")
def loaded(llama_folder):
    """It, loaded, for tests that change nothing."""
    return fastgen.load(llama_folder)
