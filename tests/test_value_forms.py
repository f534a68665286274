"""Forms of values: a graph that was read with them runs the very same code."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from tiny_models import FAMILIES, QUICK_FAMILIES, tiny_model

import fastgen
from fastgen.compiled import CompiledForward
from fastgen.graph_json import graph_from, written
from fastgen.graphs import GraphMaker
from fastgen.value_forms import ValueForms

CPU = torch.device("cpu")


def graph_of(family: str, dtype: torch.dtype) -> dict:
    graphs = GraphMaker(fastgen.Config(), family).make(tiny_model(family, dtype=dtype))
    return json.loads(json.dumps(written(graphs.rewritten, graphs.compiled.report)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in QUICK_FAMILIES else pytest.mark.slow)
        for name in FAMILIES
    ],
)
def test_the_same_kernels_and_programs(family, dtype):
    data = graph_of(family, dtype)
    plain, traced = (
        CompiledForward(*graph_from(data, CPU, traceable=traceable)) for traceable in (False, True)
    )
    assert plain.lowered.code == traced.lowered.code
    assert plain.report == traced.report
    assert plain.spec == traced.spec
    assert plain.inputs == traced.inputs
    for mine, other in zip(plain._programs, traced._programs, strict=True):
        assert mine.num_calls == other.num_calls


def test_it_is_written_as_it_was_read():
    data = graph_of("llama", torch.float32)
    graph, report = graph_from(data, CPU, traceable=False)
    assert json.loads(json.dumps(written(graph, report))) == data


def test_a_tensor_says_what_it_is_like():
    forms = ValueForms()
    rows = forms.size(8)
    tensor = forms.tensor([rows, 64], [64, 1], torch.bfloat16, "cuda:1")
    assert (tensor.dim(), tensor.dtype, str(tensor.device)) == (2, torch.bfloat16, "cuda:1")
    assert tensor.is_contiguous()
    assert not forms.tensor([2, rows], [1, 2], torch.float32, "cpu").is_contiguous()
    assert tensor.shape[1] == 64
    assert str(tensor.shape[0]) == "s0"
    with pytest.raises(NotImplementedError, match="stands for a value"):
        tensor + 1


def test_sizes_of_one_example_are_the_same():
    forms = ValueForms()
    assert forms.size(8) is forms.size(8)
    assert str(forms.size(8) * 2) != str(forms.size(16))
    assert int(forms.size(8) + 3) == 11
    assert forms.size(8) > 7
    assert "8" not in str(forms.size(8))


def test_torchs_compiler_is_not_imported(tmp_path):
    import subprocess

    code = "import sys, fastgen.artifact.assemble; print('torch._dynamo' in sys.modules)"
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert child.stdout.strip() == "False"
