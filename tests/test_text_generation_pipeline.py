"""transformers' text-generation pipeline and chat templates around an optimised model."""

import asyncio
import copy
import threading
from pathlib import Path

import pytest
import torch
from tiny_models import NativeTokens
from transformers import (
    AsyncTextIteratorStreamer,
    AutoModelForCausalLM,
    AutoTokenizer,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

import fastgen
import fastgen.graphs
from fastgen.graph_key import graph_key

DEMO = Path(__file__).parents[1] / "examples" / "demo_model"
TOKENIZER = AutoTokenizer.from_pretrained(DEMO)
TEXTS = ["def add(a, b):\n    return", "import os\n", "class Point:\n    def"]
CHAT = [
    {"role": "system", "content": "Answer in one line."},
    {"role": "user", "content": "What is a list?"},
]


@pytest.fixture(scope="module")
def pair():
    """The demo model in fp32, plain and optimised."""
    plain = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    fast = copy.deepcopy(plain)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastgen.graphs, "graph_key", graph_key)
        fastgen.optimize(fast)
    return plain, fast


def both(pair, use):
    torch.manual_seed(5)
    expected = use(pair[0])
    after = torch.rand(2)
    with NativeTokens(pair[1]):
        torch.manual_seed(5)
        assert use(pair[1]) == expected
    assert torch.equal(torch.rand(2), after), "the RNG was left in another state"
    return expected


CALLS = {
    "one text": (TEXTS[0], {"do_sample": False}),
    "several, one by one": (TEXTS, {"do_sample": False}),
    "a padded batch": (TEXTS, {"do_sample": False, "batch_size": 3}),
    "only what is new": (TEXTS[0], {"do_sample": False, "return_full_text": False}),
    "ids": (TEXTS[0], {"do_sample": False, "return_tensors": True}),
    "sampled": (TEXTS[0], {"do_sample": True, "top_k": 20, "temperature": 0.8}),
    "several answers": (TEXTS[0], {"do_sample": True, "num_return_sequences": 3}),
    "a prefix": (TEXTS[1], {"do_sample": False, "prefix": "# python\n"}),
    "stop strings": (TEXTS[0], {"do_sample": False, "stop_strings": ["\n"]}),
    "a chat": (CHAT, {"do_sample": False}),
    "two chats in a batch": ([CHAT, CHAT[1:]], {"do_sample": False, "batch_size": 2}),
    "a chat to be continued": (
        [*CHAT, {"role": "assistant", "content": "A list is"}],
        {"do_sample": False, "continue_final_message": True},
    ),
}


@pytest.mark.parametrize(("inputs", "options"), CALLS.values(), ids=CALLS)
def test_pipeline(pair, inputs, options):
    def use(model):
        generator = pipeline("text-generation", model=model, tokenizer=TOKENIZER)
        given = dict(options)
        if "stop_strings" in given:
            given["tokenizer"] = TOKENIZER
        out = generator(copy.deepcopy(inputs), max_new_tokens=16, **given)
        return str(out)

    assert len(both(pair, use)) > 20


def test_chat_template(pair):
    """The ids that apply_chat_template gives, passed on as it gives them."""

    def use(model):
        given = TOKENIZER.apply_chat_template(
            CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**given, do_sample=False, max_new_tokens=16)
        return TOKENIZER.decode(out[0])

    both(pair, use)


def test_text_streamer(pair, capsys):
    def use(model):
        ids = TOKENIZER(TEXTS[0], return_tensors="pt")
        streamer = TextStreamer(TOKENIZER, skip_prompt=True, skip_special_tokens=True)
        model.generate(**ids, do_sample=False, max_new_tokens=24, streamer=streamer)
        return capsys.readouterr().out

    assert both(pair, use)


def test_text_iterator_streamer(pair):
    def use(model):
        ids = TOKENIZER(TEXTS[0], return_tensors="pt")
        streamer = TextIteratorStreamer(TOKENIZER, skip_prompt=True, timeout=60)
        arguments = {**ids, "do_sample": False, "max_new_tokens": 24, "streamer": streamer}
        thread = threading.Thread(target=model.generate, kwargs=arguments)
        thread.start()
        pieces = list(streamer)
        thread.join(timeout=60)
        return pieces

    assert len(both(pair, use)) > 3


def test_async_text_iterator_streamer(pair):
    async def collect(model):
        ids = TOKENIZER(TEXTS[0], return_tensors="pt")
        streamer = AsyncTextIteratorStreamer(TOKENIZER, skip_prompt=True, timeout=60)
        arguments = {**ids, "do_sample": False, "max_new_tokens": 24, "streamer": streamer}
        thread = threading.Thread(target=model.generate, kwargs=arguments)
        thread.start()
        pieces = [piece async for piece in streamer]
        thread.join(timeout=60)
        return pieces

    assert len(both(pair, lambda model: asyncio.run(collect(model)))) > 3


def test_a_text_streamer_takes_one_row(pair):
    ids = TOKENIZER(TEXTS, return_tensors="pt", padding=True)
    for model in pair:
        with pytest.raises(ValueError, match="batch size 1"):
            model.generate(**ids, max_new_tokens=4, streamer=TextStreamer(TOKENIZER))
