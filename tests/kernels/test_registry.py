"""One op, several implementations: asked from the newest to the reference, schema checked."""

from __future__ import annotations

import inspect

import pytest
import torch
from fastgen.kernels import CallSite, registry

OPS = ("fastgen::attention", "fastgen::paged_attention")
CPU = torch.device("cpu")


@torch.library.custom_op("fastgen_test::scaled", mutates_args=())
def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x * factor


def scaled_reference(x, factor):
    return x * factor


def scaled_by_addition(x, factor):
    return x + x * (factor - 1)


@pytest.fixture
def empty_registry(monkeypatch):
    """A registry in which only the reference of `fastgen_test::scaled` is known."""
    monkeypatch.setattr(registry, "_IMPLEMENTATIONS", {})
    registry.register("fastgen_test::scaled", "reference", scaled_reference)


def select(**args):
    return registry.select("fastgen_test::scaled", CallSite(CPU, args))


def names(choice) -> tuple[str, tuple[tuple[str, str], ...]]:
    return choice.implementation.name, choice.refused


@pytest.mark.usefixtures("empty_registry")
def test_the_newest_implementation_is_asked_first():
    registry.register("fastgen_test::scaled", "old", scaled_by_addition)
    registry.register("fastgen_test::scaled", "new", scaled_by_addition)
    order = [item.name for item in registry.implementations("fastgen_test::scaled")]
    assert order == ["new", "old", "reference"]
    assert names(select(factor=2.0)) == ("new", ())


@pytest.mark.usefixtures("empty_registry")
def test_the_choice_is_made_late():
    assert names(select(factor=2.0)) == ("reference", ())
    registry.register("fastgen_test::scaled", "later", scaled_by_addition)
    assert names(select(factor=2.0)) == ("later", ())


@pytest.mark.usefixtures("empty_registry")
def test_refusals_are_kept_with_their_reasons_in_the_order_they_were_given():
    for name in ("first", "second"):
        registry.register(
            "fastgen_test::scaled",
            name,
            scaled_by_addition,
            lambda call, name=name: f"{name}: factor {call.args['factor']} on {call.device}",
        )
    assert names(select(factor=0.5)) == (
        "reference",
        (("second", "second: factor 0.5 on cpu"), ("first", "first: factor 0.5 on cpu")),
    )


@pytest.mark.usefixtures("empty_registry")
def test_refusal_depends_on_the_call_site():
    registry.register(
        "fastgen_test::scaled",
        "halving",
        scaled_by_addition,
        lambda call: None if call.args["factor"] == 0.5 else "factor",
    )
    assert names(select(factor=0.5)) == ("halving", ())
    assert names(select(factor=2.0)) == ("reference", (("halving", "factor"),))


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: x, id="argument-missing"),
        pytest.param(lambda x, factor, extra: x, id="argument-too-many"),
        pytest.param(lambda x, scale: x, id="argument-renamed"),
        pytest.param(lambda factor, x: x, id="arguments-swapped"),
        pytest.param(lambda *args: args[0], id="star-args"),
    ],
)
@pytest.mark.usefixtures("empty_registry")
def test_another_schema_is_a_type_error_and_registers_nothing(function):
    with pytest.raises(TypeError, match=r"fastgen_test::scaled implementation 'wrong'.*factor"):
        registry.register("fastgen_test::scaled", "wrong", function)
    assert len(registry.implementations("fastgen_test::scaled")) == 1


def test_an_op_that_everybody_refuses_is_an_invariant_broken(monkeypatch):
    monkeypatch.setattr(registry, "_IMPLEMENTATIONS", {})
    registry.register("fastgen_test::scaled", "only", scaled_reference, lambda call: "never")
    with pytest.raises(registry.NoImplementationError, match="never"):
        select(factor=1.0)


@pytest.mark.parametrize("op", OPS)
def test_the_reference_is_last_and_refuses_nothing(op):
    *others, last = registry.implementations(op)
    assert last.name == "reference"
    assert "reference" not in [item.name for item in others]
    arguments = dict.fromkeys(registry.schema_argument_names(op), object())
    assert last.refuses(CallSite(torch.device("meta"), arguments)) is None


@pytest.mark.parametrize("op", OPS)
def test_every_implementation_carries_the_schema(op):
    namespace, name = op.split("::")
    schema = getattr(getattr(torch.ops, namespace), name).default._schema
    expected = [argument.name for argument in schema.arguments]
    assert registry.schema_argument_names(op) == expected
    for item in registry.implementations(op):
        assert list(inspect.signature(item.function).parameters) == expected, item.name


@pytest.mark.parametrize("op", OPS)
def test_implementation_names_are_unique(op):
    given = [item.name for item in registry.implementations(op)]
    assert len(set(given)) == len(given)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        pytest.param({}, None, id="plain"),
        pytest.param({"window": 8}, None, id="window"),
        pytest.param({"softcap": 30.0}, "softcap", id="softcap"),
        pytest.param({"sinks": torch.zeros(4)}, "sinks", id="sinks"),
    ],
)
def test_sdpa_says_what_it_cannot_take(op, changed, reason):
    arguments = dict.fromkeys(registry.schema_argument_names(op), None)
    arguments |= {"scale": 0.1, "window": 0, "softcap": 0.0, **changed}
    sdpa = next(item for item in registry.implementations(op) if item.name == "sdpa")
    assert sdpa.refuses(CallSite(CPU, arguments)) == reason


@pytest.mark.usefixtures("empty_registry")
def test_planted_a_registry_that_checks_no_names_is_seen(monkeypatch):
    monkeypatch.setattr(registry, "schema_argument_names", lambda op: ["x", "scale"])
    registry.register("fastgen_test::scaled", "wrong", lambda x, scale: x)
    with pytest.raises(TypeError, match="unexpected keyword"):
        select(factor=1.0).implementation.function(x=torch.ones(2), factor=1.0)
