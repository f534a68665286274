"""What transformers itself makes of a live model's weights, and how far that is from exact."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .wrappers import copy_of_modules, unwrap

# Of a product's results in half precision, those that another order of the sum may round to the
# neighbour: the sum is in fp32, and most lie far from the middle between two numbers.
_SHARE_ROUNDED_OTHERWISE = 1 / 16
_SEED = 0


class Reference:
    """transformers' own greedy loop and plain forward over the weights of a live model.

    A copy of the modules over the very same parameters and buffers: it takes no memory for
    weights, is not optimised even if the model is, and can be hooked while the model stays as it
    is. Nothing ends a sequence and nothing processes its logits, whatever the model's generation
    config says. For as long as the model's modules stay as they are.

    Raises: UnsupportedModelError if the modules cannot be copied.
    """

    def __init__(self, model: Any) -> None:
        from transformers import GenerationConfig

        model = unwrap(model)
        self.model: Any = copy_of_modules(model)
        self.model.generation_config = GenerationConfig()
        self.device = next(model.parameters()).device

    def generate(self, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], torch.Tensor]:
        """A prompt's greedy continuation, alone, with a cache: tokens, fp32 logits [n, vocab]."""
        ids = torch.tensor([list(prompt)], device=self.device)
        with self._plainly():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),  # else ids of the padding are masked
                max_new_tokens=num_tokens,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)

    def tokens(self, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        """Greedy tokens of each prompt, one after the other."""
        return [
            self.generate(prompt, length)[0]
            for prompt, length in zip(prompts, lengths, strict=True)
        ]

    def forward(
        self,
        token_ids: Sequence[int],
        num_logits: int,
        *,
        copies: int = 1,
        layers: Sequence[str] = (),
        rounded_otherwise: bool = False,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """A plain forward without a cache.

        Args:
            copies: Rows of the batch, all the same. layers: Names of modules.
            rounded_otherwise: What modules with weights return is moved by up to one rounding at
                random, in every row another way.
        Returns: fp32 logits of the last tokens [copies, num_logits, vocab_size], and what each of
            the layers returned, [copies, num_tokens, hidden_size].
        """
        ids = torch.tensor([list(token_ids)] * copies, device=self.device)
        outputs: dict[str, torch.Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                outputs[name] = output[0] if isinstance(output, tuple) else output

            return hook

        with self._plainly(), contextlib.ExitStack() as hooks:
            for name in layers:
                handle = self.model.get_submodule(name).register_forward_hook(keep(name))
                hooks.callback(handle.remove)
            if rounded_otherwise:
                hooks.enter_context(self._rounding_otherwise())
            logits = self.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                position_ids=torch.arange(ids.shape[1], device=self.device).expand_as(ids),
                use_cache=False,
                logits_to_keep=num_logits,
            ).logits
        return logits.float(), outputs

    @contextlib.contextmanager
    def _plainly(self) -> Iterator[None]:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            yield

    @contextlib.contextmanager
    def _rounding_otherwise(self) -> Iterator[None]:
        """A lookup rounds nothing; all other modules with weights of their own do."""
        generator = torch.Generator(self.device).manual_seed(_SEED)

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, torch.Tensor) and output.is_floating_point():
                return _round_otherwise(output, generator)
            return None

        handles = [
            module.register_forward_hook(hook)
            for module in self.model.modules()
            if next(module.parameters(recurse=False), None) is not None
            and not isinstance(module, nn.Embedding)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _round_otherwise(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each value, or a share of them in half precision, moved by up to one rounding."""

    def random() -> torch.Tensor:
        return torch.rand(
            values.shape, generator=generator, device=values.device, dtype=torch.float64
        )

    eps = torch.finfo(values.dtype).eps
    if values.dtype.itemsize >= 4:
        return (values.double() * (1 + eps * (random() - 0.5))).to(values.dtype)
    # Three quarters of eps reach the neighbour, and no further, wherever a number lies.
    moved = values.double() * (1 + 0.75 * eps * (random() - 0.5).sign())
    chosen = random() < _SHARE_ROUNDED_OTHERWISE
    return torch.where(chosen, moved.to(values.dtype), values)
