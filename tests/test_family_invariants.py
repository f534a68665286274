"""What must hold of an optimised model whatever its family: memory, restoring, saving, changing."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import pytest
import torch
from following import assert_follows, epoch_of, tokens_of
from safetensors.torch import load_model, save_model
from test_families import family_params
from tiny_models import NativeTokens, left_padded, prompts, tiny_model

import fastgen

ROW = prompts(20)[0]
IDS = torch.tensor([ROW])


@pytest.fixture(params=family_params(), scope="module")
def pair(request):
    """A model as it is, and an equal one that is optimised and has generated."""
    plain, fast = tiny_model(request.param), tiny_model(request.param)
    fastgen.optimize(fast)
    tokens_of(fast, ROW, 3)
    yield plain, fast
    fastgen.restore(fast)


def bytes_of_memory(tensors: Iterable[torch.Tensor]) -> int:
    """Of all tensors together, what several share counted once."""
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.numel())
    total = end = 0
    for first, last in spans:
        total += max(0, last - max(first, end))
        end = max(end, last)
    return total


def assert_equal_states(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_weights_exist_once(pair):
    """I3: what the graph reads and what the model holds is one memory."""
    plain, fast = pair
    compiled = fastgen.api.require(fast).compiled
    bound = [
        compiled._arguments[index]
        for index, spec in enumerate(compiled.inputs.values())
        if spec.kind in ("parameter", "merged", "packed")
    ]
    assert bound
    assert bytes_of_memory([*fast.parameters(), *bound]) == bytes_of_memory(plain.parameters())


def test_forward_and_backward_are_as_before(pair):
    """I10: while the model is optimised."""
    plain, fast = pair
    with torch.no_grad():
        assert torch.equal(fast(IDS).logits, plain(IDS).logits)
    expected, found = gradients(plain), gradients(fast)
    assert_equal_states(found, expected)


def test_every_refused_site_is_explained(pair):
    """I9, and every op says what runs it."""
    _, fast = pair
    text = str(fastgen.explain(fast))
    report = fastgen.api.require(fast).compiled.report
    for item in report.passes:
        assert f"pass          {item.name}: {item.matches}" in text
        for where, why in item.refused:
            lines = [line for line in text.splitlines() if line.endswith(f": {why}")]
            named = [line.removeprefix("    refused     ").split(":")[0] for line in lines]
            assert any(where in names.split(", ") for names in named)
    for op, chosen in report.kernels.items():
        for name, entry in chosen.items():
            assert f"kernel        {op} x {entry['calls']}: {name}" in text
            for who, why in entry["refused"].items():
                assert f"not {who}: {why}" in text


def test_every_block_comes_back(pair):
    """I11: after every step of a mixed load."""
    _, fast = pair
    core = fastgen.api.require(fast).engine()
    runner, counts = core._runner, []
    run = runner.run

    def checked(output):
        pool = core._scheduler.pool
        held = {block for request in core._scheduler.running for block in request.block_ids}
        counts.append((pool.num_free + pool.num_used, pool.num_used - len(held)))
        return run(output)

    runner.run = checked
    ids, mask = left_padded(prompts(5, 17, 40))
    with NativeTokens(fast):
        fast.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    del runner.run
    metrics = core.metrics()
    assert counts
    assert set(counts) == {(metrics.num_blocks, 0)}
    assert metrics.num_free_blocks == metrics.num_blocks


def test_saved_models_reload_bit_equal(pair, tmp_path):
    """I13; tests/test_saving.py tries every other way."""
    plain, fast = pair
    expected = plain.state_dict()
    fast.save_pretrained(tmp_path / "pretrained")
    assert_equal_states(type(fast).from_pretrained(tmp_path / "pretrained").state_dict(), expected)
    other = copy.deepcopy(fast)
    assert fastgen.api.lookup(other) is None
    assert_equal_states(other.state_dict(), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    save_model(fast, str(tmp_path / "model.safetensors"))
    load_model(other, tmp_path / "model.safetensors")
    assert_equal_states(other.state_dict(), expected)
    torch.save(fast.state_dict(), tmp_path / "model.pt")
    assert_equal_states(torch.load(tmp_path / "model.pt"), expected)
    for name, parameter in fast.named_parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, name


def fused_step(model) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.zero_grad()


def copy_data(model) -> None:
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.copy_(parameter.data.roll(1, 0))


def assign_state(model) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        if tensor.ndim == 2:
            state[name] = tensor.roll(3, 0)
    model.load_state_dict(state, assign=True)


@pytest.mark.parametrize("change", [fused_step, copy_data, assign_state], ids=lambda f: f.__name__)
@pytest.mark.parametrize("family", family_params())
def test_changed_weights_are_followed(family, change):
    """I14; tests/test_weight_epoch.py tries every other way."""
    model = fastgen.optimize(tiny_model(family))
    before, epoch = tokens_of(model, ROW, 8), epoch_of(model)
    change(model)
    assert_follows(model, num_tokens=4)
    assert tokens_of(model, ROW, 8) != before, "the change shows nothing"
    assert epoch_of(model) > epoch


@pytest.mark.parametrize("family", family_params())
def test_restore_is_bit_equal(family):
    """I4."""
    plain, fast = tiny_model(family), tiny_model(family)
    fastgen.optimize(fast)
    tokens_of(fast, ROW, 3)
    fastgen.restore(fast)
    assert_equal_states(fast.state_dict(), plain.state_dict())
    with torch.no_grad():
        assert torch.equal(fast(IDS).logits, plain(IDS).logits)
    assert fastgen.api.lookup(fast) is None
