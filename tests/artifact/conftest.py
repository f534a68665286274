"""Exports that several tests read and none changes."""

from __future__ import annotations

import shutil

import pytest
from tiny_models import tiny_model

import fastgen


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
