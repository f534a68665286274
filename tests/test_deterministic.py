"""deterministic=True: a token's logits are equal to the last bit whatever else is in the batch.

Every step's logits are noted under the tokens they follow. Each of many ways to run the same
requests (alone, beside others, in chunks, over cached prefixes, preempted) must give them again.
"""

import random

import pytest
import torch
from fastgen.kernels import Implementation, registry
from fastgen.kernels.cpu import why_missing
from fastgen.kernels.row_linear import row_linear_reference
from layer_models import MODELS as LAYER_MODELS
from layer_models import layer_model
from test_own_attention import MODELS as OWN_ATTENTION
from test_own_attention import build
from tiny_models import FAMILIES, NativeTokens, left_padded, prompts, tiny_model
from variant_helpers import Beside

import fastgen
from fastgen import Config, SamplingParams, UnsupportedModelError, fix_batch_shapes, graphs
from fastgen.engine.runner import Runner
from fastgen.graphs import check_deterministic

needs_kernels = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))
pytestmark = [needs_kernels, pytest.mark.usefixtures("graphs_of_the_session")]

F32, BF16 = torch.float32, torch.bfloat16
# One longer than the 256 slots that attention sums at a time.
LENGTHS = (1, 2, 5, 16, 17, 33, 70, 290)


class Ledger:
    """The logits that followed each sequence of tokens. differences: how many were others later."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, ...], torch.Tensor] = {}
        self.times_met_again = self.differences = 0

    def note(self, tokens: tuple[int, ...], logits: torch.Tensor) -> None:
        if (known := self.rows.get(tokens)) is None:
            self.rows[tokens] = logits.clone()
            return
        self.times_met_again += 1
        self.differences += not torch.equal(known, logits)

    def note_step(self, output, logits: torch.Tensor) -> None:
        """Rows are in the order of the step: decodes, then items."""
        rows = iter(logits)
        for request, length in zip(output.decodes.requests, output.decodes.seq_lens, strict=True):
            self.note(behind(request, int(length)), next(rows))
        for item in output.items:
            end = item.start if item.query else item.start + item.num_tokens
            for last in range(end - item.num_logits + 1, end + 1):
                self.note(behind(item.request, last), next(rows))
        assert next(rows, None) is None


def behind(request, end: int) -> tuple[int, ...]:
    """What logits stand behind: tokens, which say nothing of prompts that are embeddings."""
    which = () if request.prompt_embeds is None else (request.request_id,)
    return (*request.token_ids(0, end), *which)


@pytest.fixture
def ledger(monkeypatch):
    ledger, run = Ledger(), Runner.run

    def noted(self, output):
        result = run(self, output)
        ledger.note_step(output, result.logits)
        return result

    monkeypatch.setattr(Runner, "run", noted)
    return ledger


def requests(seed: int = 0, longest: int = max(LENGTHS)) -> list[tuple[list[int], SamplingParams]]:
    """Greedy and sampled ones; two with a common prefix, one whose whole prompt is scored."""
    rows = prompts(*(min(length, longest) for length in LENGTHS), seed=seed)
    rows.append(rows[5][:20] + rows[4])
    ways = [{"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.9}]
    params = [
        SamplingParams(max_tokens=6, seed=place, ignore_eos=True, **ways[place % 2])
        for place in range(len(rows))
    ]
    params[3] = SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=0, ignore_eos=True)
    return list(zip(rows, params, strict=True))


def run(model, work, order=None, **fields) -> dict[int, list[int]]:
    """All requests at once, in an order; output tokens by place in `work`."""
    order = range(len(work)) if order is None else order
    with fastgen.Engine(model, **{"deterministic": True, **fields}) as engine:
        outputs = engine.generate(*map(list, zip(*[work[i] for i in order], strict=True)))
        run.metrics = engine.metrics()
    fastgen.restore(model)
    return {place: output.token_ids for place, output in zip(order, outputs, strict=True)}


def run_in_many_ways(model, work, ledger, **fields) -> None:
    """Each way gives the tokens of the first; the ledger compares logits."""
    first = run(model, work, **fields)
    ways = [
        {"max_num_batched_tokens": 7, "max_num_seqs": 3},
        {"max_num_batched_tokens": 64, "prefix_cache": False, "block_size": 32},
        {"max_num_seqs": 1},
    ]
    for way in ways:
        assert run(model, work, **way, **fields) == first, way
    draw = random.Random(0)
    part = draw.sample(range(len(work)), 5)
    made = run(model, work, part, max_num_batched_tokens=40, **fields)
    assert made == {place: first[place] for place in part}
    copies = work * 4  # 36 at once, most of them on cached prefixes
    made = run(model, copies, draw.sample(range(len(copies)), len(copies)), **fields)
    assert made == {place: first[place % len(work)] for place in range(len(copies))}
    assert run.metrics.prefix_cache_hit_tokens


MODELS = {
    **dict.fromkeys(FAMILIES, tiny_model),
    **dict.fromkeys(LAYER_MODELS, layer_model),
    **dict.fromkeys(OWN_ATTENTION, build),
}
# Of what the others are made of: experts, sinks, windows, latents, slopes.
QUICK = {("llama", F32), ("gpt_oss", BF16), ("deepseek_v2", BF16), ("bloom-6-heads", F32)}
CASES = [
    pytest.param(
        name,
        dtype,
        id=f"{name}-{'fp32' if dtype is F32 else 'bf16'}",
        marks=() if (name, dtype) in QUICK else pytest.mark.slow,
    )
    for name in MODELS
    for dtype in (F32, BF16)
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_logits_are_equal_whatever_runs_beside(name, dtype, ledger):
    """Slow for all models: `pytest tests/test_deterministic.py -m slow`."""
    model = MODELS[name](name).to(dtype)
    longest = 60 if name.endswith(("longrope", "dynamic")) else max(LENGTHS)
    run_in_many_ways(model, requests(longest=longest), ledger)
    assert ledger.times_met_again > 400
    assert ledger.differences == 0


def test_unpacked_bf16_and_other_threads(ledger):
    """The number of threads changes no bit either."""
    model, threads = tiny_model("gemma2", dtype=BF16), torch.get_num_threads()
    try:
        for count, budget in ((1, 2048), (2, 33)):
            torch.set_num_threads(count)
            run(model, requests(), pack=False, max_num_batched_tokens=budget)
    finally:
        torch.set_num_threads(threads)
    assert ledger.times_met_again > 50
    assert ledger.differences == 0


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_preempted_requests_compute_the_same_again(dtype, ledger):
    model = tiny_model("llama", dtype=dtype)
    work = [
        (row, SamplingParams(max_tokens=40, temperature=0.5, seed=7, ignore_eos=True))
        for row in prompts(30, 31, 20, 45, 9, seed=3)
    ]
    alone = [run(model, work, [place], prefix_cache=False)[place] for place in range(5)]
    block = 2 * 2 * 2 * 16 * 16 * dtype.itemsize
    small = {"kv_cache_memory_bytes": 12 * block, "prefix_cache": False}
    assert list(run(model, work, **small).values()) == alone
    assert run.metrics.preemptions
    assert ledger.times_met_again >= 200
    assert ledger.differences == 0


# The ledger can see what it looks for.


def test_without_it_logits_differ(ledger):
    model = tiny_model("llama")
    run(model, requests(), deterministic=False)
    run(model, requests(), deterministic=False, max_num_batched_tokens=7, max_num_seqs=3)
    assert ledger.differences > 0


def differences_with(model, ledger, **fields) -> int:
    run(model, requests(), **fields)
    run(model, requests(), max_num_batched_tokens=7, max_num_seqs=3, **fields)
    return ledger.differences


def test_a_kernel_that_claims_too_much_is_noticed(ledger, monkeypatch):
    liar = Implementation(
        "fastgen::row_linear", "torch's", row_linear_reference, lambda _: None, True
    )
    monkeypatch.setitem(registry._IMPLEMENTATIONS, "fastgen::row_linear", [liar])
    assert differences_with(tiny_model("llama"), ledger) > 0


def test_an_operation_that_only_looks_exact_is_noticed(ledger, monkeypatch):
    """torch's sigmoid of [tokens, 1] has other bits at the end of a vector."""
    monkeypatch.setattr(fix_batch_shapes, "_EXACT", fix_batch_shapes._EXACT | {"sigmoid"})
    assert differences_with(tiny_model("qwen2_moe"), ledger) > 0


# generate()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_rows_of_generate_are_equal_alone_and_together(dtype):
    model, rows = tiny_model("llama", dtype=dtype), prompts(33, 5, 18, 60, 7)
    keys = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    fastgen.optimize(model, deterministic=True)
    for sampling in ({"do_sample": False}, {"num_beams": 3}):
        ids, mask = left_padded(rows)
        with NativeTokens(model):
            together = model.generate(ids, attention_mask=mask, **sampling, **keys)
            per_row = len(together.logits[0]) // len(rows)
            for place, row in enumerate(rows):
                alone = model.generate(torch.tensor([row]), **sampling, **keys)
                own = slice(place * per_row, (place + 1) * per_row)
                for mine, all_rows in zip(alone.logits, together.logits, strict=True):
                    assert torch.equal(mine, all_rows[own])
    fastgen.restore(model)


def rows_of(outputs, row: int) -> list[torch.Tensor]:
    """The logits of a row, and its hidden states if there are some."""
    found = [step[row] for step in outputs.logits]
    for step in outputs.hidden_states or ():
        found += [layer[row] for layer in step]
    return found


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(F32, id="fp32"), pytest.param(BF16, id="bf16", marks=pytest.mark.slow)],
)
def test_hidden_states_and_embeddings_change_no_bit(dtype, ledger):
    """They run through other graphs, and so does what runs beside them."""
    model, ids = tiny_model("gemma2", dtype=dtype), torch.tensor(prompts(18, 18, 18))
    keys = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    fastgen.optimize(model, deterministic=True)
    run_plain = model.generate(ids, **keys)
    embedded = {"inputs_embeds": model.get_input_embeddings()(ids).detach()}
    with NativeTokens(model), Beside(model, 30):
        together = model.generate(ids, output_hidden_states=True, **keys)
        from_embeds = model.generate(**embedded, output_hidden_states=True, **keys)
        alone = [model.generate(row[None], output_hidden_states=True, **keys) for row in ids]
    assert len(together.hidden_states) == 6
    for row in range(3):
        wanted = rows_of(together, row)
        others = [rows_of(alone[row], 0), rows_of(from_embeds, row), rows_of(run_plain, row)]
        assert [len(made) for made in others] == [len(wanted), len(wanted), 6]
        for made in others:
            assert all(torch.equal(*pair) for pair in zip(made, wanted, strict=False))
    fastgen.restore(model)
    assert ledger.times_met_again
    assert ledger.differences == 0


def test_a_graph_that_computes_otherwise_is_not_run_beside_the_plain_one(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(graphs, "computations", lambda *_: object())
    fastgen.optimize(model, deterministic=True)
    keys = {"output_hidden_states": True, "return_dict_in_generate": True, "max_new_tokens": 2}
    model.generate(torch.tensor(prompts(5)), **keys)
    (reason,) = fastgen.explain(model).fallbacks
    assert "deterministic=True: the graph with hidden_states computes otherwise" in reason
    fastgen.restore(model)


# What is kept, shown and refused.


def test_the_cached_graph_is_another(graphs_on_disk):
    model = tiny_model("llama")
    kernels = {}
    for deterministic in (False, True, True, False):
        fastgen.optimize(model, deterministic=deterministic)
        found = fastgen.explain(model)
        names = {op: list(chosen) for op, chosen in found.report.kernels.items()}
        assert kernels.setdefault(deterministic, names) == names
        fastgen.restore(model)
    assert found.graph_source == "from the graph cache"
    assert len(list(graphs_on_disk.glob("*.json"))) == 2
    assert kernels[True]["fastgen::paged_attention"] == ["cpu, in order"]
    assert "fastgen::row_linear" not in kernels[False]


def test_explain_says_how_each_operation_is_made_so():
    model = tiny_model("gemma2")
    fastgen.optimize(model, deterministic=True)
    text = str(fastgen.explain(model))
    assert "fastgen::row_linear x 9: cpu" in text
    assert "fastgen::paged_attention x 2: cpu, in order" in text
    assert "by row        aten::tanh x 1: apart from other rows" in text
    fastgen.restore(model)


def test_it_is_off_unless_asked_for_and_takes_a_bool():
    assert Config().deterministic is False
    with pytest.raises(ValueError, match="deterministic must be a bool, got 1"):
        Config(deterministic=1)  # pyright: ignore
    with pytest.raises(ValueError, match="deterministic=True needs codegen 'direct' or 'auto'"):
        Config(deterministic=True, codegen="inductor")


@pytest.mark.parametrize(
    ("family", "op"),
    [("llama", "fastgen::paged_attention"), ("deepseek_v3", "fastgen::paged_latent_attention")],
)
def test_fp16_is_refused_by_the_name_of_what_has_no_kernel(family, op):
    model = tiny_model(family, dtype=torch.float16)
    why = f"deterministic=True needs .*{op}: .*cpu, in order: query is float16"
    with pytest.raises(UnsupportedModelError, match=why):
        fastgen.optimize(model, deterministic=True)


def test_an_operation_for_which_nobody_vouches_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(fix_batch_shapes, "_OF_ROWS", ())
    model = tiny_model("mixtral")
    with pytest.raises(UnsupportedModelError, match="aten::softmax: it may mix rows"):
        fastgen.optimize(model, deterministic=True)
    assert fastgen.api.lookup(model) is None


def test_other_devices_are_refused():
    check_deterministic(torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match="for models on the CPU, this one is on cuda"):
        check_deterministic(torch.device("cuda"))
