"""The same call on a plain and on an optimised model, and everything that it returns compared."""

import threading

import torch
from tiny_models import NativeTokens, prompts

import fastgen

HIDDEN = {"return_dict_in_generate": True, "output_hidden_states": True}
# transformers' own hidden states differ by 45 roundings between a row in a batch and the row alone;
# so do those of every step here, and their differences go on through the cache.
ROUNDINGS = 4 * 45
EVERYTHING = {**HIDDEN, "output_scores": True, "output_logits": True}


def both(pair, **arguments):
    """Of transformers and of the engine, which must make the tokens; the RNG is set alike."""
    plain, fast = pair
    torch.manual_seed(7)
    expected = plain.generate(**arguments)
    after = torch.rand(2)
    with NativeTokens(fast):
        torch.manual_seed(7)
        got = fast.generate(**arguments)
        assert torch.equal(torch.rand(2), after), "the RNG was left in another state"
    return expected, got


def assert_equal(expected, got):
    """Tokens; of an output object also its class and keys, scores, logits and hidden states."""
    assert type(got) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected), f"{expected}\n{got}"
        return
    assert list(got.keys()) == list(expected.keys())
    assert_equal(expected.sequences, got.sequences)
    for name in ("scores", "logits"):
        if (wanted := getattr(expected, name)) is not None:
            assert_close(wanted, getattr(got, name))
    if expected.hidden_states is not None:
        assert_hidden_states(expected.hidden_states, got.hidden_states)


def assert_hidden_states(expected, got):
    """A tuple of every step, of each layer's tensor."""
    assert type(got) is type(expected) is tuple
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert type(ours) is type(theirs) is tuple
        assert len(ours) == len(theirs)
        assert_close(theirs, ours)


def assert_close(expected, got):
    """Within ROUNDINGS of the largest."""
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
        assert ours.requires_grad == theirs.requires_grad
        assert ours.is_inference() == theirs.is_inference()
        finite = theirs[theirs.isfinite()]
        allowed = ROUNDINGS * torch.finfo(theirs.dtype).eps * finite.abs().max()
        assert torch.equal(ours.isfinite(), theirs.isfinite())
        difference = (ours[theirs.isfinite()] - finite).abs().max()
        assert difference <= allowed, f"{float(difference)} > {float(allowed)}"


def blocks(model, count: int, block_size: int = 16) -> dict[str, int]:
    """Settings of a pool of so many blocks, the null block not counted."""
    fastgen.optimize(model)
    per_block = fastgen.explain(model).spec.bytes_per_token * block_size
    fastgen.restore(model)
    return {"kv_cache_memory_bytes": (count + 1) * per_block}


class Beside:
    """A long request of the engine's own, older than what runs in the block.

    started: How many tokens it has when the block begins.
    """

    def __init__(self, model, num_tokens: int, started: int = 1) -> None:
        self.params = fastgen.SamplingParams(
            max_tokens=num_tokens, temperature=0.0, ignore_eos=True
        )
        self.engine, self.started = fastgen.Engine(model), threading.Event()
        self.needed, (self.row,) = started, prompts(16, seed=5)
        self.token_ids: list[int] = []

    def __enter__(self) -> "Beside":
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        assert self.started.wait(60)
        return self

    def _read(self) -> None:
        for event in self.engine.stream(self.engine.submit(self.row, self.params)):
            self.token_ids += event.token_ids
            if len(self.token_ids) >= self.needed:
                self.started.set()

    def __exit__(self, *_) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()


def weights_of(model) -> list[dict]:
    """The weights that each of a model's graphs reads, the plain graph's first."""
    optimized = fastgen.api.require(model)
    graph = optimized._graphs[optimized.fingerprint]
    return [forward.weights for forward in (graph.compiled, *graph.variants.values())]
