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
from tiny_models import NativeTokens, left_padded, prompts, tiny_model

import fastgen
from fastgen import Config, SamplingParams, UnsupportedModelError, fix_batch_shapes
from fastgen.engine.runner import Runner
from fastgen.graphs import check_deterministic

needs_kernels = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))
pytestmark = [needs_kernels, pytest.mark.usefixtures("graphs_of_the_session")]

F32, BF16 = torch.float32, torch.bfloat16
FAMILIES = ("llama", "qwen2", "gemma2", "gpt_oss", "mixtral")
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
            self.note(tuple(request.token_ids(0, int(length))), next(rows))
        for item in output.items:
            end = item.start if item.query else item.start + item.num_tokens
            for last in range(end - item.num_logits + 1, end + 1):
                self.note(tuple(item.request.token_ids(0, last)), next(rows))
        assert next(rows, None) is None


@pytest.fixture
def ledger(monkeypatch):
    ledger, run = Ledger(), Runner.run

    def noted(self, output):
        result = run(self, output)
        ledger.note_step(output, result.logits)
        return result

    monkeypatch.setattr(Runner, "run", noted)
    return ledger


def requests(seed: int = 0) -> list[tuple[list[int], SamplingParams]]:
    """Greedy and sampled ones; two with a common prefix, one whose whole prompt is scored."""
    rows = prompts(*LENGTHS, seed=seed)
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


QUICK = {("llama", F32), ("qwen2", BF16), ("gpt_oss", F32), ("mixtral", BF16)}
CASES = [
    pytest.param(
        family,
        dtype,
        id=f"{family}-{'fp32' if dtype is F32 else 'bf16'}",
        marks=() if (family, dtype) in QUICK else pytest.mark.slow,
    )
    for family in FAMILIES
    for dtype in (F32, BF16)
]


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_logits_are_equal_whatever_runs_beside(family, dtype, ledger):
    run_in_many_ways(tiny_model(family, dtype=dtype), requests(), ledger)
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


def test_hidden_states_go_to_transformers_loop():
    """A graph with them beside the other could fuse other operations."""
    model = tiny_model("llama")
    fastgen.optimize(model, deterministic=True)
    keys = {"output_hidden_states": True, "return_dict_in_generate": True, "max_new_tokens": 2}
    model.generate(torch.tensor(prompts(5)), **keys)
    (reason,) = fastgen.explain(model).fallbacks
    assert "deterministic=True" in reason
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
    assert "by row        aten::tanh x 1: once for each row" in text
    fastgen.restore(model)


def test_it_is_off_unless_asked_for_and_takes_a_bool():
    assert Config().deterministic is False
    with pytest.raises(ValueError, match="deterministic must be a bool, got 1"):
        Config(deterministic=1)  # pyright: ignore
    with pytest.raises(ValueError, match="deterministic=True needs codegen 'direct' or 'auto'"):
        Config(deterministic=True, codegen="inductor")


@pytest.mark.parametrize(
    ("family", "dtype", "why"),
    [
        ("deepseek_v3", F32, "fastgen::paged_latent_attention: cpu: its result depends on what"),
        ("llama", torch.float16, "fastgen::paged_attention: .*cpu, in order: query is float16"),
    ],
    ids=["latent attention", "fp16"],
)
def test_models_for_which_it_cannot_be_promised_are_refused(family, dtype, why):
    model = tiny_model(family, dtype=dtype)
    with pytest.raises(UnsupportedModelError, match=f"deterministic=True needs .*{why}"):
        fastgen.optimize(model, deterministic=True)


def test_other_devices_are_refused():
    check_deterministic(torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match="for models on the CPU, this one is on cuda"):
        check_deterministic(torch.device("cuda"))
