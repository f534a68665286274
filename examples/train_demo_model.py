"""Train the tiny Llama of examples/demo_model from Python's own standard library, on a CPU.

    python examples/train_demo_model.py --minutes 13

The text is the running interpreter's standard library, plus chat examples cut from it: a request
that names a function and its first docstring line, answered by the function's source.
Training stops by the clock; the learning rate decays to zero with it.
"""

import argparse
import ast
import datetime
import hashlib
import inspect
import math
import platform
import random
import sys
import sysconfig
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [PAD, BOS, EOS, IM_START, IM_END]  # ids 0 to 4, in this order

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SYSTEM_PROMPT = "You are a helpful assistant."

# A newline is always a token of its own and indentation is never glued to a word, so a prompt may
# end after "):\n" or after an indent and still be cut as the training text was.
PIECES = r"\n| {2,}| ?[\p{L}_]+| ?\p{N}| ?[^\s\p{L}\p{N}_]+|\s"

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
SKIPPED_FOLDERS |= {"encodings", "pydoc_data"}  # tables, not code
SKIPPED_FILES = {"entities.py", "locale.py", "stringprep.py", "this.py"}  # tables too

MAX_CHAT_CHARS = 1000  # of the function's source
WARMUP = 0.03  # of the training time
CONSOLE = Console()


@dataclass(frozen=True)
class Corpus:
    """Texts of one side of the split; a chat is (request, answer)."""

    files: list[str]
    chats: list[tuple[str, str]]


@dataclass(frozen=True)
class Stream:
    """Tokens laid end to end.

    Attributes:
        input_ids: [num_tokens] int32.
        row_start: [num_tokens] int64; where a row asked for at this token begins, which is
            the start of its line, or of its conversation.
    """

    input_ids: np.ndarray
    row_start: np.ndarray


def read_standard_library() -> tuple[Corpus, Corpus]:
    """Returns: (training, held-out); one file in twenty is held out, chosen by its name's hash."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sides = Corpus([], []), Corpus([], [])
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED_FOLDERS & set(name.parts) or name.name in SKIPPED_FILES:
            continue
        if name.name.startswith("_sysconfigdata") or name.parts[0].startswith("config-"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if not text.strip() or text in seen:
            continue
        seen.add(text)
        digest = hashlib.sha256(name.as_posix().encode()).digest()
        side = sides[1 if digest[0] % 20 == 0 else 0]
        side.files.append(text)
        for request, answer in chats_of(text):
            if answer not in seen:
                seen.add(answer)
                side.chats.append((request, answer))
    return sides


def chats_of(text: str) -> Iterator[tuple[str, str]]:
    """Yields (request, answer) for each short function of a source file."""
    lines = text.splitlines()
    scopes: list[tuple[ast.AST, str]] = [(ast.parse(text), "")]
    while scopes:
        scope, class_name = scopes.pop()
        for node in ast.iter_child_nodes(scope):
            if isinstance(node, ast.ClassDef):
                scopes.append((node, node.name))
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
            if len(source) > MAX_CHAT_CHARS or source.count("\n") < 1:
                continue
            kind = f"method of class `{class_name}`" if class_name else "function"
            doc = inspect.cleandoc(ast.get_docstring(node) or "").split("\n")[0]
            ending = f": {doc}" if doc else "."
            yield f"Write a Python {kind}, `{node.name}({ast.unparse(node.args)})`{ending}", source


def train_tokenizer(corpus: Corpus, vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    requests = (request for request, _ in corpus.chats)
    tokenizer.train_from_iterator([*corpus.files, *requests], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[IM_START, IM_END],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=2048,
    )


def encode_files(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> Stream:
    """Each file as <|bos|> text <|eos|>; rows begin at the start of a line."""
    bos, eos = tokenizer.convert_tokens_to_ids([BOS, EOS])
    ids = [[bos, *file_ids, eos] for file_ids in tokenizer(corpus.files)["input_ids"]]
    input_ids = np.concatenate([np.asarray(file_ids, dtype=np.int32) for file_ids in ids])
    newline = tokenizer.encode("\n")[0]
    after_newline = np.flatnonzero((input_ids == newline) | (input_ids == eos)) + 1
    return Stream(input_ids, row_starts(after_newline, len(input_ids)))


def encode_chats(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, seed: int) -> Stream:
    """Each pair through the chat template, shuffled; rows begin at the start of a conversation."""
    rng = random.Random(seed)
    conversations = []
    for request, answer in rng.sample(corpus.chats, len(corpus.chats)):
        system = [{"role": "system", "content": SYSTEM_PROMPT}] if rng.random() < 0.2 else []
        user = {"role": "user", "content": request}
        conversations.append([*system, user, {"role": "assistant", "content": answer}])
    texts = [tokenizer.apply_chat_template(c, tokenize=False) for c in conversations]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    input_ids = np.concatenate([np.asarray(text_ids, dtype=np.int32) for text_ids in ids])
    ends = np.cumsum([len(text_ids) for text_ids in ids])
    return Stream(input_ids, row_starts(ends, len(input_ids)))


def row_starts(starts: np.ndarray, num_tokens: int) -> np.ndarray:
    """For each token, the last of `starts` (or 0) that is not after it. [num_tokens] int64."""
    marks = np.zeros(num_tokens, dtype=np.int64)
    inside = starts[starts < num_tokens]
    marks[inside] = inside
    return np.maximum.accumulate(marks)


class Rows:
    """Endless shuffled rows of the streams; each epoch cuts them at another random offset."""

    def __init__(self, streams: list[Stream], seed: int) -> None:
        self.streams = streams
        self.rng = np.random.default_rng(seed)
        self.waiting: list[np.ndarray] = []

    def take(self, num_rows: int, seq_len: int) -> torch.Tensor:
        """Returns: [num_rows, seq_len + 1] int64."""
        if len(self.waiting) < num_rows or len(self.waiting[0]) != seq_len + 1:
            self.waiting = self.cut(seq_len)
        taken, self.waiting = self.waiting[:num_rows], self.waiting[num_rows:]
        return torch.from_numpy(np.stack(taken).astype(np.int64))

    def cut(self, seq_len: int) -> list[np.ndarray]:
        rows = []
        for stream in self.streams:
            last = len(stream.input_ids) - seq_len - 1
            for position in range(self.rng.integers(seq_len), last + 1, seq_len):
                start = stream.row_start[position]
                rows.append(stream.input_ids[start : start + seq_len + 1])
        return [rows[i] for i in self.rng.permutation(len(rows))]


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def mean_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of each token given those before it, in nats.

    Args:
        rows: [num_rows, seq_len + 1] int64.
    """
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def seq_len_at(progress: float) -> int:
    """Short rows first, as they are quicker; long ones last, so that long texts hold together."""
    if progress < 0.5:
        return 256
    return 512 if progress < 0.8 else 1024


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings and norms; one learning rate suits both.

    In runs of 50 s (lr 4e-3, batches of 4,096 tokens) the held-out loss was 4.3 so, and 5.1 with
    AdamW alone.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    in_layers = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in in_layers]
    return [
        torch.optim.Muon(matrices, weight_decay=0.03, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def train(
    model: LlamaForCausalLM,
    rows: Rows,
    *,
    minutes: float,
    lr: float,
    num_batch_tokens: int,
    compiled: bool,
) -> int:
    """Trains in place until the clock says stop. Returns: tokens seen."""
    optimizers = make_optimizers(model)
    loss_of = torch.compile(mean_loss, dynamic=False) if compiled else mean_loss
    columns = (
        TextColumn("training"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
    )
    model.train()
    num_tokens, num_steps, smooth_loss = 0, 0, 0.0
    start = time.monotonic()
    with Progress(*columns, console=CONSOLE) as bar:
        task = bar.add_task("training", total=1.0, state="")
        while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr * min(1.0, progress / WARMUP) * (1 - progress)
            seq_len = seq_len_at(progress)
            batch = rows.take(num_batch_tokens // seq_len, seq_len)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            num_tokens += batch[:, 1:].numel()
            num_steps += 1
            smooth_loss += (loss.item() - smooth_loss) / min(num_steps, 50)
            speed = num_tokens / (time.monotonic() - start)
            state = f"step {num_steps}, loss {smooth_loss:.3f}, {speed:,.0f} tokens/s"
            bar.update(task, completed=progress, state=state)
    CONSOLE.print(f"{num_tokens:,} tokens in {num_steps:,} steps, training loss {smooth_loss:.3f}")
    return num_tokens


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: Stream, seq_len: int = 512) -> float:
    """Mean loss in nats per token over rows of seq_len tokens laid end to end, in fp32."""
    model.eval()
    num_rows = (len(stream.input_ids) - 1) // seq_len
    starts = np.arange(num_rows)[:, None] * seq_len
    rows = torch.from_numpy(stream.input_ids[starts + np.arange(seq_len + 1)].astype(np.int64))
    losses = [mean_loss(model, part).item() * len(part) for part in rows.split(16)]
    return sum(losses) / num_rows


def model_card(facts: dict[str, str]) -> str:
    """README.md of the model's folder."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""# Demo model

A tiny Llama that writes Python-like text. It is here so that demos and tests have a trained model
to load offline, on a CPU, in a second. It is no coding assistant: the code reads like code and
means little.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("examples/demo_model", dtype="float32")
tokenizer = AutoTokenizer.from_pretrained("examples/demo_model")
```

| | |
|---|---|
{rows}

The text is the standard library of Python, without its tests and its large tables. One file in
twenty is held out. Chat examples come from the same files: a request that names a function and
the first line of its docstring, answered by the function's source, in ChatML
(`<|im_start|>`, `<|im_end|>`). So a request worded like these does best:

    Write a Python function, `is_empty(queue)`: Return True if the queue is empty.

No `<|bos|>` is needed before a prompt; it marks the start of a file and `<|eos|>` its end.

Greedy text from a plain prompt soon repeats itself (`import os` at once): sample, at temperature
0.8 say, for longer text. Training rows had at most 1,024 tokens; past about 1,500 the loss rises.

To train it anew (the clock stops the training, so the weights differ a little each time):

    python examples/train_demo_model.py --minutes 13

Licence of the text: Python Software Foundation License Version 2;
{sys.copyright.splitlines()[0]} A few modules carry notices of their own.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "demo_model")
    parser.add_argument("--minutes", type=float, default=13.0, help="training time by the clock")
    parser.add_argument("--vocab-size", type=int, default=3072)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--num-batch-tokens", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="torch.compile: nearly twice the speed; takes a minute and needs a C++ compiler",
    )
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()  # whole files are longer than model_max_length
    torch.manual_seed(args.seed)

    training, held_out = read_standard_library()
    tokenizer = train_tokenizer(training, args.vocab_size)
    for text in held_out.files:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    streams = [encode_files(training, tokenizer), encode_chats(training, tokenizer, args.seed)]
    num_file_tokens, num_chat_tokens = (len(stream.input_ids) for stream in streams)
    CONSOLE.print(
        f"{len(training.files)} files, {num_file_tokens:,} tokens; "
        f"{len(training.chats):,} chats, {num_chat_tokens:,} tokens"
    )

    model = make_model(tokenizer)
    num_tokens = train(
        model,
        Rows(streams, args.seed),
        minutes=args.minutes,
        lr=args.lr,
        num_batch_tokens=args.num_batch_tokens,
        compiled=args.compile,
    )
    model.to(torch.bfloat16).float()  # rounds the weights as the file will, so the loss is its own
    held_out_files = encode_files(held_out, tokenizer)
    held_out_chats = encode_chats(held_out, tokenizer, args.seed)
    file_loss, chat_loss = (held_out_loss(model, s) for s in (held_out_files, held_out_chats))
    num_bytes = sum(len(text.encode()) for text in held_out.files)
    bits_per_byte = file_loss / math.log(2) * len(held_out_files.input_ids) / num_bytes

    facts = {
        "parameters": f"{model.num_parameters():,}, bfloat16, embeddings tied",
        "vocabulary": f"{len(tokenizer):,} tokens, byte-level BPE",
        "text": f"standard library of Python {platform.python_version()}: {len(training.files)} "
        f"files, {num_file_tokens:,} tokens; {len(training.chats):,} chats, {num_chat_tokens:,} "
        "tokens",
        "trained": f"{args.minutes:g} minutes on {torch.get_num_threads()} CPU cores, "
        f"{num_tokens:,} tokens, rows of 256, 512, then 1024",
        "held-out loss, files": f"{file_loss:.3f} nats per token ({bits_per_byte:.2f} bits per "
        f"byte; {len(held_out.files)} files, {len(held_out_files.input_ids):,} tokens)",
        "held-out loss, chats": f"{chat_loss:.3f} nats per token",
        "made": f"{datetime.date.today()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
    }
    save(model, tokenizer, args.out)
    (args.out / "README.md").write_text(model_card(facts), encoding="utf-8")
    for name, value in facts.items():
        CONSOLE.print(f"{name}: {value}")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    bos, eos, pad, im_end = tokenizer.convert_tokens_to_ids([BOS, EOS, PAD, IM_END])
    model.generation_config = GenerationConfig(
        bos_token_id=bos, eos_token_id=[eos, im_end], pad_token_id=pad
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
