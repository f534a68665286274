"""Generating inside a training loop, as trainers for reinforcement learning do."""

import contextlib
import copy

import pytest
import torch
from following import small_model
from tiny_models import NativeTokens, prompts

import fastgen

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("graphs_of_the_session")

PROMPTS = torch.tensor(prompts(8, 8, seed=3))
PAD, EOS, NUM_NEW = 0, 5, 12


def adapted(model):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=32, target_modules=["q_proj", "v_proj", "up_proj"]
    )
    return peft.get_peft_model(model, config)


def rollout(model, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Two completions for each prompt, and the log-probabilities they were drawn by."""
    out = model.generate(
        PROMPTS,
        do_sample=True,
        temperature=0.9,
        num_return_sequences=2,
        max_new_tokens=NUM_NEW,
        eos_token_id=EOS,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    scores = model.base_model if hasattr(model, "peft_config") else model
    logprobs = scores.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    return out.sequences, logprobs


def logprobs_of(model, sequences: torch.Tensor) -> torch.Tensor:
    """Of the completions, by a forward of the trained model."""
    logits = model(input_ids=sequences).logits[:, PROMPTS.shape[1] - 1 : -1] / 0.9
    completions = sequences[:, PROMPTS.shape[1] :]
    return torch.log_softmax(logits, -1).gather(2, completions[..., None]).squeeze(2)


def reward(sequences: torch.Tensor) -> torch.Tensor:
    """[rows, 1]: even tokens are good."""
    return (sequences[:, PROMPTS.shape[1] :] % 2 == 0).float().mean(1, keepdim=True) - 0.5


def train(model, steps: int, rollouts=contextlib.nullcontext, **options) -> list:
    """Policy gradients: what was generated in each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    seen = []
    torch.manual_seed(11)
    for _ in range(steps):
        with rollouts():
            sequences, drawn_by = rollout(model, **options)
        computed = logprobs_of(model, sequences)
        mask = (sequences[:, PROMPTS.shape[1] :] != PAD).float()
        ratio = torch.exp(computed - computed.detach())
        (-(reward(sequences) * ratio * mask).sum() / mask.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        difference = ((computed.detach() - drawn_by) * mask).abs().max()
        seen.append((sequences.tolist(), float(difference)))
    return seen


@pytest.mark.parametrize("lora", [False, True], ids=["all-weights", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient-checkpointing"])
def test_rollouts_are_those_of_transformers(lora, checkpointing):
    """Same completions, same training, step by step; modes and flags stay as they were.

    A model in training mode with gradient checkpointing drops the cache of transformers' loop
    without telling it, which then shows the model nothing but the last token: what is right there
    is what that loop gives without a cache.
    """
    models = []
    for optimised in (False, True):
        model = small_model()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model = adapted(model) if lora else model
        model.train()
        models.append(fastgen.optimize(model) if optimised else model)
    plain, fast = models
    inner = fast.get_base_model() if lora else fast
    expected = train(plain, 4, **({"use_cache": False} if checkpointing else {}))
    got = train(fast, 4, rollouts=lambda: NativeTokens(inner))
    assert [tokens for tokens, _ in got] == [tokens for tokens, _ in expected]
    assert len({str(tokens) for tokens, _ in got}) == 4, "training shows nothing"
    noise = max(difference for _, difference in expected)
    assert max(difference for _, difference in got) <= 2 * noise
    for (name, one), (_, other) in zip(
        fast.named_parameters(), plain.named_parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)
    assert all(module.training for module in fast.modules())
    assert inner.is_gradient_checkpointing == checkpointing


def test_unwrapped_and_wrapped_models_share_the_engine():
    """A trainer unwraps the model to generate, and trains through the wrapper."""
    model = small_model()
    wrapper = adapted(model)
    fastgen.optimize(wrapper)
    for each in (wrapper, wrapper.get_base_model()):
        with NativeTokens(model):
            torch.manual_seed(1)
            each.generate(PROMPTS, max_new_tokens=4)
    assert fastgen.api.require(wrapper) is fastgen.api.require(model)


def test_a_reference_model_beside_the_trained_one():
    """A frozen copy goes on as it was while the other is trained."""
    model = small_model()
    reference = copy.deepcopy(model)
    for each in (model, reference):
        fastgen.optimize(each)
    greedy = {"do_sample": False, "max_new_tokens": 8}
    before = reference.generate(PROMPTS, **greedy)
    train(model.train(), 3)
    model.eval()
    assert torch.equal(reference.generate(PROMPTS, **greedy), before)
    assert not torch.equal(model.generate(PROMPTS, **greedy), before)
