"""What *pythonette* reads: the sources of the running Python's standard library, and the tokenizer made for them."""

import ast
import io
import itertools
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
STDLIB = Path(sysconfig.get_path("stdlib"))
# Not prose or code that people wrote for readers: tests, third parties, generated tables, build settings.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data", "__pycache__"}
SKIPPED_FILES = ("_sysconfigdata*", "sysconfig/_*", "config-*/*", "html/entities.py", "stringprep.py")
# Never trained on, neither the tokenizer nor the weights.
HELD_OUT = {
    "cmd.py", "email/message.py", "graphlib.py", "http/cookies.py", "logging/handlers.py", "quopri.py", "sched.py",
    "shlex.py", "statistics.py", "textwrap.py", "xmlrpc/client.py", "zipapp.py",
}  # fmt: skip
# Line ends and indentation are tokens of their own, so that a prompt that ends in either ends on a token.
PIECES = r"\r?\n| {2,}|\t+| ?[\p{L}\p{M}_]+| ?\p{N}| ?[^\s\p{L}\p{M}\p{N}_]+|\s"


def read_corpus() -> tuple[dict[str, str], dict[str, str]]:
    """(training files, held-out files) as path → text, in sorted order."""
    train: dict[str, str] = {}
    held_out: dict[str, str] = {}
    for path in sorted(STDLIB.rglob("*.py")):
        name = path.relative_to(STDLIB)
        if SKIPPED_FOLDERS & set(name.parts) or any(name.match(pattern) for pattern in SKIPPED_FILES):
            continue
        files = held_out if name.as_posix() in HELD_OUT else train
        files[name.as_posix()] = path.read_text(encoding="utf-8", errors="replace")
    return train, held_out


def split_documents(text: str) -> Iterator[str]:
    """Cut a file before and after each top-level function or class, so that the model learns where one ends."""
    lines = io.StringIO(text).readlines()  # not splitlines(), which also splits at form feeds
    cuts = {0, len(lines)}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            cuts |= {first - 1, node.end_lineno or node.lineno}
    for start, end in itertools.pairwise(sorted(cuts)):
        if document := "".join(lines[start:end]).strip("\n"):
            yield document + "\n"


def train_tokenizer(texts: list[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text survives encode and decode unchanged, behind the <|bos|> that encode puts first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = [(BOS, tokenizer.token_to_id(BOS))]
    tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", f"{BOS} $A $B:1", special_tokens=bos)
    options: dict[str, Any] = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "model_max_length": max_length}
    options |= {"padding_side": "left", "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def encode(files: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """One stream of token ids: every document between <|bos|> and <|eos|>."""
    documents = [document for text in files.values() for document in split_documents(text)]
    ids: list[int] = []
    for row in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]:
        ids += [tokenizer.bos_token_id, *row, tokenizer.eos_token_id]
    return torch.tensor(ids)
