"""Masked slots within a row: exact on the engine as long as no window is shorter than the row."""

import pytest
import torch
from tiny_models import WINDOW, prompts, tiny_model

import fastgen

pytestmark = pytest.mark.usefixtures("graphs_of_the_session")


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
@pytest.mark.parametrize("side", ["right", "hole"])
@pytest.mark.parametrize(("longest", "native"), [(WINDOW, True), (WINDOW + 1, False)])
def test_masked_slots_under_a_window(family, side, longest, native):
    plain, fast = tiny_model(family), tiny_model(family)
    fastgen.optimize(fast)
    ids, mask = torch.tensor(prompts(7, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[0, {"right": slice(4, 7), "hole": slice(2, 5)}[side]] = 0
    arguments = {"attention_mask": mask, "do_sample": False, "max_length": longest}
    assert torch.equal(fast.generate(ids, **arguments), plain.generate(ids, **arguments))
    explanation = fastgen.explain(fast)
    counts = "attention counts tokens (a sliding window, chunks, ALiBi)"
    reason = f"{counts}, and some within a row are masked"
    assert dict(explanation.fallbacks) == ({} if native else {reason: 1})
    assert not native or explanation.metrics.output_tokens == 2 * (longest - 7)
