"""format="graph": a program of torch.export's that runs where there is torch alone."""

import subprocess
import sys

import pytest
import torch
from program_steps import Rewritten, assert_alike, batches, direct, logits_and_cache, rewritten
from tiny_models import tiny_model

import fastgen
from fastgen.artifact.interop import PASSES_OFF, export_graph
from fastgen.errors import ArtifactError

# What two right engines differ by in fp32, in roundings of the largest logit (see tiny_models).
ROUNDINGS = 64
# Run with torch alone: every program over its steps, and what it leaves in the caches.
_RUN = """
import sys, torch
for path in sys.argv[1:]:
    program = torch.export.load(path + ".pt2")
    step = program.module()
    given = torch.load(path + ".steps", weights_only=True)
    logits = [step(**batch, **given["cache"]) for batch in given["batches"]]
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    result = {"logits": logits, "cache": given["cache"], "targets": sorted(targets)}
    torch.save(result, path + ".result")
assert not {"fastgen", "transformers"} & set(sys.modules), "torch alone was to be imported"
"""


def _exported(case: Rewritten, path) -> None:
    export_graph(case.graph, case.forward.weights, path.with_suffix(".pt2"))
    cache, names = case.cache(), {spec: name for name, spec in case.graph.inputs.items()}
    batch_inputs = [spec for spec in names if spec.kind == "batch"]
    steps = [
        {names[spec]: getattr(batch, spec.target) for spec in batch_inputs} for batch in batches()
    ]
    caches = {names[s]: cache.tensors[s.target] for s in names if s.kind == "cache"}
    torch.save({"batches": steps, "cache": caches}, path.with_suffix(".steps"))


def _with_torch_alone(cases: dict[str, Rewritten], folder) -> dict[str, tuple[list, dict]]:
    """Logits and caches of every case, from a process of their own."""
    for name, case in cases.items():
        _exported(case, folder / name)
    command = [sys.executable, "-c", _RUN, *(str(folder / name) for name in cases)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    found = {}
    for name, case in cases.items():
        result = torch.load(folder / f"{name}.result", weights_only=True)
        others = [t for t in result["targets"] if not t.startswith(("aten.", "<built-in"))]
        assert not others, f"{name} calls {others}"
        targets = {name: spec.target for name, spec in case.graph.inputs.items()}
        cache = {targets[name]: tensor[1:] for name, tensor in result["cache"].items()}
        found[name] = result["logits"], cache
    return found


@pytest.mark.slow
def test_three_families_in_chunks_and_tokens(tmp_path):
    """gemma2: softcaps and windows; gpt_oss: sinks and experts."""
    cases = {
        family: rewritten(family, passes_off=PASSES_OFF)
        for family in ("llama", "gemma2", "gpt_oss")
    }
    for name, found in _with_torch_alone(cases, tmp_path).items():
        assert_alike(found, direct(cases[name]), torch.float32, ROUNDINGS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    ["qwen2", "mistral", "qwen3", "phi3", "gpt_neox", "cohere2", "gpt2", "mixtral", "deepseek_v3"],
)
def test_more_families(family, tmp_path):
    case = rewritten(family, passes_off=PASSES_OFF)
    found = _with_torch_alone({family: case}, tmp_path)[family]
    assert_alike(found, direct(case), torch.float32, ROUNDINGS)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_bf16(family, tmp_path):
    """As near to what the same weights give in fp32 as the direct program is."""
    case = rewritten(family, dtype=torch.bfloat16, passes_off=PASSES_OFF)
    exact = rewritten(tiny_model(family, dtype=torch.bfloat16).float())
    found = _with_torch_alone({family: case}, tmp_path)[family]
    eps = torch.finfo(torch.bfloat16).eps
    for got, wanted, true in zip(found[0], direct(case)[0], direct(exact)[0], strict=True):
        assert got.dtype == torch.bfloat16
        allowed = 2 * ((wanted - true).abs().max() + eps * true.abs().max())
        assert (got - true).abs().max() <= allowed


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A rewritten model, and its program as torch.export loads it."""
    case, path = rewritten("llama", passes_off=PASSES_OFF), tmp_path_factory.mktemp("graph")
    export_graph(case.graph, case.forward.weights, path / "model.pt2")
    return case, torch.export.load(path / "model.pt2")


def test_weights_keep_their_names_and_nothing_is_pickled(llama):
    case, program = llama
    expected = dict(case.model.named_parameters())
    assert {name for name, _ in program.named_parameters()} == set(expected)
    assert all(torch.equal(program.state_dict[name], tensor) for name, tensor in expected.items())
    assert not any(tensor.requires_grad for tensor in program.state_dict.values())
    assert program.example_inputs is None


def test_sizes_that_do_not_fit_each_other_are_refused(llama):
    case, step = llama[0], llama[1].module()
    names = list(case.graph.inputs)

    def run(*arguments):
        given = dict(zip(names, arguments, strict=True))
        kinds = {name: spec.kind for name, spec in case.graph.inputs.items()}
        return step(**{name: t for name, t in given.items() if kinds[name] in ("batch", "cache")})

    assert_alike(logits_and_cache(case, run), direct(case), torch.float32, ROUNDINGS)
    arguments = case.forward.arguments(batches()[1], case.cache())
    for name in ("positions", "seq_lens", "query_start_loc"):
        index = names.index(name)
        with pytest.raises((AssertionError, RuntimeError)):
            run(*arguments[:index], arguments[index][1:], *arguments[index + 1 :])


def test_what_cannot_be_exported_is_refused(llama, tmp_path, monkeypatch):
    case = llama[0]
    monkeypatch.setattr("fastgen.artifact.interop.aten_body", lambda op: None)
    with pytest.raises(fastgen.UnsupportedModelError, match=r"fastgen::\w+, which is no op"):
        export_graph(case.graph, case.forward.weights, tmp_path / "model.pt2")
    assert not (tmp_path / "model.pt2").exists()


def test_through_the_public_function(tmp_path):
    """Of an optimised model, whose weights lie merged."""
    model = fastgen.optimize(tiny_model("llama"))
    report = fastgen.export(model, tmp_path / "model.pt2", format="graph")
    assert report.total_bytes == (tmp_path / "model.pt2").stat().st_size
    program = torch.export.load(tmp_path / "model.pt2")
    case = rewritten("llama", passes_off=PASSES_OFF)
    step, inputs = program.module(), case.graph.inputs
    given = [name for name, spec in inputs.items() if spec.kind in ("batch", "cache")]

    def run(*arguments):
        by_name = dict(zip(inputs, arguments, strict=True))
        return step(**{name: by_name[name] for name in given})

    assert_alike(logits_and_cache(case, run), direct(case), torch.float32, ROUNDINGS)
    with pytest.raises(ArtifactError, match=r"must be a new file \*.pt2"):
        fastgen.export(model, tmp_path / "model.pt2", format="graph")
    fastgen.export(model, tmp_path / "artifact")
    with pytest.raises(ArtifactError, match="export the live model"):
        fastgen.export(fastgen.load(tmp_path / "artifact"), tmp_path / "again.pt2", format="graph")
