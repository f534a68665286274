"""Prompts of embeddings: tokens, output classes and RNG as transformers', made by the engine."""

import threading

import pytest
import torch
from conftest import poison
from test_graph_cache import no_export
from tiny_models import NativeTokens, has_clear_margin, prompts, tiny_model
from transformers import LlamaForCausalLM, LlamaModel
from variant_helpers import EVERYTHING, HIDDEN, Beside, assert_equal, blocks, both, weights_of

import fastgen
from fastgen.engine import runner

pytestmark = pytest.mark.usefixtures("graphs_of_the_session")
GREEDY = {"do_sample": False, "max_new_tokens": 12}
SAMPLED = {"do_sample": True, "top_k": 30, "max_new_tokens": 12}
MASK = torch.ones(3, 15, dtype=torch.long)
MASK[0, :6], MASK[2, :14] = 0, 0


def embeddings(model, rows: int = 3, length: int = 15, num_tokens: int = 12, seed: int = 0):
    """Of no tokens; those whose greedy continuation comes near a tie are passed over."""
    scale = float(model.get_input_embeddings()(torch.arange(2, 60)).detach().std())
    for attempt in range(seed, seed + 20):
        generator = torch.Generator().manual_seed(attempt)
        embeds = torch.randn(rows, length, model.config.hidden_size, generator=generator) * scale
        options = {"max_new_tokens": num_tokens, "do_sample": False, "output_logits": True}
        out = model.generate(inputs_embeds=embeds, return_dict_in_generate=True, **options)
        if has_clear_margin(out.logits):
            return embeds
    raise AssertionError("every prompt comes near a tie")


@pytest.fixture(scope="module")
def pair():
    plain, fast = tiny_model("llama"), tiny_model("llama")
    fastgen.optimize(fast)
    poison(fast)
    return plain, fast


@pytest.fixture(scope="module")
def embeds(pair):
    return embeddings(pair[0])


@pytest.mark.parametrize(
    "family",
    ["llama", "gemma2", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gpt_oss", "gpt2"))],
)
def test_families(family):
    pair = tiny_model(family), fastgen.optimize(tiny_model(family))
    embeds = embeddings(pair[0])
    expected, got = both(pair, inputs_embeds=embeds[:1], **GREEDY)
    assert_equal(expected, got)
    assert got.shape == (1, 12), "the output holds new tokens only"
    assert_equal(*both(pair, inputs_embeds=embeds, attention_mask=MASK, **GREEDY))
    sampled = {**SAMPLED, **EVERYTHING, "num_return_sequences": 2}
    assert_equal(*both(pair, inputs_embeds=embeds, **sampled))
    assert len(fastgen.explain(pair[1]).variants) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 5},
        {"max_length": 25},
        {"min_new_tokens": 6, "eos_token_id": 5, "pad_token_id": 0, "max_new_tokens": 9},
        {"repetition_penalty": 1.3, "max_new_tokens": 9},
        {"num_return_sequences": 2, "max_new_tokens": 9},
        {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 9},
    ],
    ids=str,
)
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("with_ids", [False, True], ids=["alone", "with ids"])
def test_options(pair, embeds, options, sampled, with_ids):
    if not sampled and "num_return_sequences" in options:
        pytest.skip("transformers refuses it")
    given = {"input_ids": torch.tensor(prompts(15, 15, 15))} if with_ids else {}
    for mask in ({}, {"attention_mask": MASK}):
        arguments = {**given, **mask, **options, "do_sample": sampled}
        assert_equal(*both(pair, inputs_embeds=embeds, **arguments))


def test_ids_of_another_length_with_a_mask_of_the_embeddings(pair, embeds):
    arguments = {"input_ids": torch.tensor(prompts(4, 4, 4)), "attention_mask": MASK, **GREEDY}
    expected, got = both(pair, inputs_embeds=embeds, **arguments)
    assert_equal(expected, got)
    assert got.shape == (3, 16), "the output begins with the ids"


def test_embeddings_of_tokens_give_what_the_tokens_give(pair):
    plain, fast = pair
    ids = torch.tensor(prompts(15, 15, 15))
    embeds = fast.get_input_embeddings()(ids)
    assert embeds.requires_grad
    with NativeTokens(fast):
        got = fast.generate(inputs_embeds=embeds, **GREEDY)
    assert torch.equal(got, plain.generate(ids, **GREEDY)[:, 15:])


def test_streamer(pair, embeds):
    class Recorder(list):
        def put(self, value):
            self.append(value.tolist())

        def end(self):
            self.append("end")

    plain, fast = pair
    for options in (GREEDY, SAMPLED):
        recorders = Recorder(), Recorder()
        torch.manual_seed(1)
        plain.generate(inputs_embeds=embeds[:1], streamer=recorders[0], **options)
        with NativeTokens(fast):
            torch.manual_seed(1)
            fast.generate(inputs_embeds=embeds[:1], streamer=recorders[1], **options)
        assert recorders[0] == recorders[1]


def test_the_returned_cache(pair, embeds):
    arguments = {"inputs_embeds": embeds, "attention_mask": MASK, **GREEDY}
    expected, got = both(pair, **arguments, return_dict_in_generate=True)
    visible = torch.cat([MASK, torch.ones(3, 11, dtype=torch.long)], dim=1).bool()
    layers = zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True)
    for ours, theirs in layers:
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            assert a.shape == b.shape
            a, b = a.transpose(1, 2)[visible], b.transpose(1, 2)[visible]
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_they_share_no_blocks(pair):
    """Prompts of one length, and token ids that the engine might take them for."""
    plain, fast = pair
    first, second = (embeddings(plain, 1, 40, seed=seed) for seed in (0, 100))
    ids = torch.zeros(1, 40, dtype=torch.long)
    before = fastgen.explain(fast).metrics.prefix_cache_hit_tokens
    outputs = []
    for _ in range(2):
        outputs += [both(pair, inputs_embeds=given, **GREEDY) for given in (first, second)]
    outputs.append(both(pair, input_ids=ids, pad_token_id=1, **GREEDY))
    for expected, got in outputs:
        assert_equal(expected, got)
    assert not torch.equal(outputs[0][0], outputs[1][0])
    assert fastgen.explain(fast).metrics.prefix_cache_hit_tokens == before


@pytest.mark.parametrize("budget", [1, 7, 32])
def test_chunked_prompts(budget):
    """15 embeddings by 7 end with one that runs alone, as a generated token does."""
    plain, fast = tiny_model("llama"), tiny_model("llama")
    embeds = embeddings(plain)
    fastgen.optimize(fast, max_num_batched_tokens=budget)
    poison(fast)
    for mask in ({}, {"attention_mask": MASK}):
        assert_equal(*both((plain, fast), inputs_embeds=embeds, **mask, **GREEDY))


@pytest.mark.parametrize("together", [False, True], ids=["free running", "lockstep"])
def test_preempted_rows_start_over_from_their_embeddings(together):
    plain, fast = tiny_model("llama"), tiny_model("llama")
    embeds = embeddings(plain, 2, 30, num_tokens=60)
    fastgen.optimize(fast, max_num_batched_tokens=7, **blocks(fast, 28))
    poison(fast)
    arguments = {"inputs_embeds": embeds, "do_sample": False, **(HIDDEN if together else {})}
    fast.generate(**arguments, max_new_tokens=2)  # makes the graph
    arguments["max_new_tokens"] = 60
    expected = plain.generate(**arguments)
    with Beside(fast, num_tokens=400, started=200), NativeTokens(fast):
        got = fast.generate(**arguments)
    assert fastgen.explain(fast).metrics.preemptions > 0, "nothing was preempted"
    assert_equal(expected, got)


def test_beside_calls_that_need_another_graph():
    """Embeddings, hidden states and plain tokens in the same steps, from three threads."""
    pair = tiny_model("llama"), fastgen.optimize(tiny_model("llama"))
    plain, fast = pair
    embeds, ids = embeddings(plain, num_tokens=60), torch.tensor(prompts(20, 20))
    long = {"do_sample": False, "max_new_tokens": 60}
    calls = [{"inputs_embeds": embeds}, {"input_ids": ids, **HIDDEN}, {"input_ids": ids}]
    expected = [plain.generate(**call, **long) for call in calls]
    for call in calls:
        fast.generate(**call, do_sample=False, max_new_tokens=2)
    names = set(fastgen.explain(fast).variants)
    assert names == {"prompt_embeds", "hidden_states", "prompt_embeds and hidden_states"}
    results: list = [None] * 3

    def run(index):
        for _ in range(3):
            results[index] = fast.generate(**calls[index], **long)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    with NativeTokens(fast):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    for wanted, got in zip(expected, results, strict=True):
        assert_equal(wanted, got)


def test_weights_that_change_change_all_graphs():
    """An optimizer's step, weights that move, and restore, which is bit-equal."""
    pair = tiny_model("llama"), fastgen.optimize(tiny_model("llama"))
    state = {name: tensor.clone() for name, tensor in pair[1].state_dict().items()}
    nbytes = sum(parameter.nbytes for parameter in pair[1].parameters())
    ids, embeds = torch.tensor(prompts(12)), embeddings(pair[0], 1)
    calls = [
        {"input_ids": ids, **HIDDEN},
        {"inputs_embeds": embeds, **HIDDEN},
        {"inputs_embeds": embeds},
        {"input_ids": ids},
    ]
    before = [both(pair, **call, **GREEDY) for call in calls]
    for model in pair:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    pair[0].load_state_dict(pair[1].state_dict())
    after = [both(pair, **call, **GREEDY) for call in calls]
    for parameter in (*pair[0].parameters(), *pair[1].parameters()):
        parameter.data = parameter.data * 1.1  # other memory, other values
    moved = [both(pair, **call, **GREEDY) for call in calls]
    for outputs in (before, after, moved):
        for expected, got in outputs:
            assert_equal(expected, got)
    assert not torch.equal(before[2][1], after[2][1]), "the step changed nothing"
    plain, *variants = weights_of(pair[1])
    assert len(variants) == 2
    for weights in variants:
        assert all(tensor is plain[spec] for spec, tensor in weights.items())
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in plain.values()}
    assert sum(memory.values()) <= nbytes + sum(b.nbytes for b in pair[1].buffers())
    pair[1].load_state_dict(state)
    fastgen.restore(pair[1])
    assert all(torch.equal(tensor, state[name]) for name, tensor in pair[1].state_dict().items())


def test_a_changed_model_has_graphs_of_its_own():
    pair = tiny_model("llama"), fastgen.optimize(tiny_model("llama"))
    embeds = embeddings(pair[0])
    for scale in (None, 2.0, None):
        for model in pair:
            attention = model.model.layers[0].self_attn
            attention.scaling = scale or attention.head_dim**-0.5
        assert_equal(*both(pair, inputs_embeds=embeds, **GREEDY))
    fast = fastgen.api.require(pair[1])
    assert [len(graph.variants) for graph in fast._graphs.values()] == [1, 1]
    fast.close_engine()  # the next one has the variant, too
    assert_equal(*both(pair, inputs_embeds=embeds, **GREEDY))


def test_an_adapter():
    peft = pytest.importorskip("peft")

    def adapted():
        torch.manual_seed(3)
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        return peft.get_peft_model(tiny_model("llama"), config).eval()

    pair = adapted(), fastgen.optimize(adapted())
    embeds = embeddings(pair[0])
    assert_equal(*both(pair, inputs_embeds=embeds, **GREEDY))
    assert_equal(*both(pair, inputs_embeds=embeds, **GREEDY, **HIDDEN))


def test_graphs_on_disk_have_a_key_of_their_own(graphs_on_disk, monkeypatch):
    first = fastgen.optimize(tiny_model("llama"))
    embeds = embeddings(tiny_model("llama"))
    outputs = [first.generate(inputs_embeds=embeds, **GREEDY, **more) for more in ({}, HIDDEN)]
    assert len(list(graphs_on_disk.glob("*.json"))) == 3
    no_export(monkeypatch)
    second = fastgen.optimize(tiny_model("llama"))
    for more, expected in zip(({}, HIDDEN), outputs, strict=True):
        with NativeTokens(second):
            assert_equal(expected, second.generate(inputs_embeds=embeds, **GREEDY, **more))


class Twice(LlamaModel):
    """Token ids are embedded twice; embeddings that are given are taken as they are."""

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids) + self.embed_tokens(input_ids + 1)
        return super().forward(inputs_embeds=inputs_embeds, **kwargs)


class Scaled(LlamaModel):
    """Only the embeddings of token ids are scaled."""

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids) * 3.0
        return super().forward(inputs_embeds=inputs_embeds, **kwargs)


class TwiceForCausalLM(LlamaForCausalLM):
    pass


@pytest.mark.parametrize(
    ("inner", "reason"),
    [(Twice, "the model does more with them than embed them"), (Scaled, "other logits")],
)
def test_models_that_do_more_with_token_ids(inner, reason, monkeypatch):
    models = []
    for _ in range(2):
        model = tiny_model("llama", vocab_size=130)
        model.__class__ = TwiceForCausalLM
        model.model.__class__ = inner
        models.append(model)
    plain, fast = models[0], fastgen.optimize(models[1])
    embeds = torch.randn(2, 9, 64)
    expected = plain.generate(inputs_embeds=embeds, **GREEDY)
    assert torch.equal(fast.generate(inputs_embeds=embeds, **GREEDY), expected)
    (why,) = fastgen.explain(fast).fallbacks
    assert why.startswith("prompt_embeds is not supported: with prompt_embeds")
    assert reason in why
    assert fastgen.explain(fast).variants == {}


@pytest.mark.parametrize(
    "arguments",
    [
        {"inputs_embeds": torch.randn(1, 5, 32)},
        {"inputs_embeds": torch.randn(1, 5, 64, dtype=torch.float64)},
        {"inputs_embeds": torch.randn(5, 64)},
        {"inputs_embeds": torch.randn(2, 0, 64)},
        {"inputs_embeds": torch.randn(1, 5, 64), "input_ids": torch.tensor([[1, 2, 3]])},
        {"inputs_embeds": torch.randn(1, 5, 64), "attention_mask": torch.tensor([[1] * 4 + [0]])},
        {"inputs_embeds": torch.randn(1, 5, 64), "prefill_chunk_size": 2},
    ],
    ids=["width", "dtype", "2-D", "empty", "other ids", "right-padded", "prefill_chunk_size"],
)
def test_the_rest_is_as_in_transformers(pair, arguments):
    plain, fast = pair
    try:
        expected = plain.generate(**arguments, **GREEDY)
    except Exception as error:
        with pytest.raises(type(error)):
            fast.generate(**arguments, **GREEDY)
    else:
        assert torch.equal(fast.generate(**arguments, **GREEDY), expected)


def test_a_planted_mistake_is_seen(pair, embeds, monkeypatch):
    """The comparisons of this file can fail: embeddings that are one token late."""
    add_embeds = runner.add_embeds

    def late(batch, output, like):
        add_embeds(batch, output, like)
        batch.prompt_embeds = batch.prompt_embeds.roll(1, dims=0)

    monkeypatch.setattr(runner, "add_embeds", late)
    expected, got = both(pair, inputs_embeds=embeds, **GREEDY)
    assert not torch.equal(expected, got)
