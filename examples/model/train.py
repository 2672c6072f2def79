"""Train *pythonette*, the small language model that paged-cache ships, on the running Python's standard library.

    python examples/model/train.py OUT --minutes 42
    python examples/model/train.py OUT --steps N               # no clock: the schedule follows the steps
    python examples/model/train.py OUT --replay training.json  # an earlier run again, with its schedule

OUT becomes a folder that `from_pretrained` loads, written every `--save-minutes` and at the end. Ctrl-C or SIGTERM ends
the run early and still writes it. Set OMP_NUM_THREADS to the value of `--threads`.
"""

import hashlib
import itertools
import json
import math
import platform
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tokenizers
import torch
import transformers
import typer
from corpus import HELD_OUT, encode, read_corpus, train_tokenizer  # type: ignore[import-not-found]
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHARE_STEPS = 25  # how often the schedule moves on
IGNORED = -100  # cross_entropy's label for "no loss here"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome, besides the corpus and the number of steps."""

    seed: int = 0
    vocab_size: int = 2048
    hidden_size: int = 192
    intermediate_size: int = 384
    num_layers: int = 6
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 32
    max_position_embeddings: int = 4096
    tokens_per_step: int = 3072
    context: int = 256
    long_context: int = 1024  # for the last part of the run
    long_share: float = 0.15
    warmup_steps: int = 100
    muon_lr: float = 0.015  # matrices inside the layers
    adamw_lr: float = 8e-3  # embedding and norms
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    autocast: bool = True  # bfloat16; twice as fast where the CPU has avx512_bf16


@dataclass
class Progress:
    """How far the run has come: by steps, or by minutes when steps is 0."""

    steps: int
    minutes: float
    shares: list[float] = field(default_factory=list)  # one per SHARE_STEPS steps; recorded for --replay
    step: int = 0
    tokens: int = 0
    started: float = field(default_factory=time.monotonic)
    stopped: bool = False

    @property
    def seconds(self) -> float:
        """Wall-clock time of the run."""
        return time.monotonic() - self.started

    @property
    def share(self) -> float:
        """0 at the start, 1 at the end; drives the learning rate and the context length."""
        index = self.step // SHARE_STEPS
        if index == len(self.shares):
            share = self.step / self.steps if self.steps else self.seconds / (60 * self.minutes)
            self.shares.append(round(min(1.0, share), 5))
        return self.shares[index]

    @property
    def done(self) -> bool:
        """Whether the run is over or was told to stop."""
        return self.stopped or (self.step >= self.steps if self.steps else self.share >= 1)

    def stop(self, *_signal: object) -> None:
        """Let the current step be the last; a signal handler."""
        self.stopped = True


def build_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    """A Llama with random weights, the same ones for the same seed."""
    torch.manual_seed(recipe.seed)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.max_position_embeddings,
        tie_word_embeddings=True,
        **special,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**special)
    return model


def build_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices (learns more per token), AdamW for the tied embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    decay = recipe.weight_decay
    muon = torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    groups: list[dict[str, Any]] = [
        {"params": [model.get_input_embeddings().weight]},
        {"params": norms, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=recipe.adamw_lr, betas=(0.9, 0.95), weight_decay=decay)
    for group in muon.param_groups + adamw.param_groups:
        group["peak_lr"] = group["lr"]
    return [muon, adamw]


def loss_of(model: LlamaForCausalLM, window: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Mean cross-entropy in nats per token; window is [rows, context + 1]."""
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.autocast and model.training):
        logits = model(input_ids=window[:, :-1], use_cache=False).logits
    labels = window[:, 1:]
    bos: Any = model.config.bos_token_id
    labels = labels.masked_fill(labels.eq(bos), IGNORED)  # what follows <|eos|> is no choice
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, stream: torch.Tensor, recipe: Recipe, max_windows: int = 64) -> float:
    """Mean loss over evenly spread windows of 512 tokens, in float32."""
    model.eval()
    starts = torch.linspace(0, len(stream) - 513, min(max_windows, len(stream) // 512)).long().tolist()
    losses = [loss_of(model, stream[start : start + 513][None], recipe).item() for start in starts]
    model.train()
    return sum(losses) / len(losses)


@dataclass
class Training:
    """One run: what it trains, on what, how far it is and where it goes."""

    out: Path
    recipe: Recipe
    tokenizer: PreTrainedTokenizerFast
    stream: torch.Tensor
    held_out: torch.Tensor
    progress: Progress
    record: dict[str, Any]  # the part of training.json that is known before the run

    def __post_init__(self) -> None:
        self.model = build_model(self.tokenizer, self.recipe).train()
        self.optimizers = build_optimizers(self.model, self.recipe)
        self.generator = torch.Generator().manual_seed(self.recipe.seed)
        self.curve: list[dict[str, float]] = []
        self.mean_loss = math.log(self.recipe.vocab_size)

    def sample(self) -> torch.Tensor:
        """Random windows of the corpus, [rows, context + 1]; long ones at the end of the run."""
        recipe = self.recipe
        context = recipe.context if self.progress.share < 1 - recipe.long_share else recipe.long_context
        rows = recipe.tokens_per_step // context
        starts = torch.randint(len(self.stream) - context - 1, (rows,), generator=self.generator)
        return self.stream[starts[:, None] + torch.arange(context + 1)]

    def set_learning_rate(self) -> None:
        """Linear warm-up by steps, then a line down to zero at the end of the run."""
        factor = min((self.progress.step + 1) / self.recipe.warmup_steps, 1.0) * (1.0 - self.progress.share)
        for group in itertools.chain.from_iterable(optimizer.param_groups for optimizer in self.optimizers):
            group["lr"] = group["peak_lr"] * factor

    def step(self) -> None:
        """One batch, one update of the weights."""
        window = self.sample()
        self.set_learning_rate()
        loss = loss_of(self.model, window, self.recipe)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.progress.step += 1
        self.progress.tokens += window[:, 1:].numel()
        self.mean_loss += 0.02 * (loss.item() - self.mean_loss)

    def checkpoint(self) -> None:
        """Evaluate and write: weights in bfloat16, while config.json asks for float32, which they are loaded as."""
        progress, model = self.progress, self.model
        point: dict[str, float] = {"step": progress.step, "seconds": round(progress.seconds), "tokens": progress.tokens}
        point |= {"train_loss": evaluate(model, self.stream, self.recipe)}
        point |= {"held_out_loss": evaluate(model, self.held_out, self.recipe)}
        tqdm.write(json.dumps(point))
        self.curve.append(point)
        record = self.record | {"steps": progress.step, "curve": self.curve, "shares": progress.shares}
        tied = "lm_head.weight"
        weights = {name: value.bfloat16() for name, value in model.state_dict().items() if name != tied}
        model.save_pretrained(self.out, state_dict=weights)
        self.tokenizer.save_pretrained(self.out)
        (self.out / "training.json").write_text(json.dumps(record) + "\n")

    def run(self, save_minutes: float) -> None:
        """Train to the end, with a checkpoint now and then."""
        saved = 0.0
        bar_format = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
        with tqdm(total=100, unit="%", bar_format=bar_format, mininterval=5) as bar:
            while not self.progress.done:
                self.step()
                tokens = f"{self.progress.tokens / 1e6:.2f}M"
                bar.set_postfix(step=self.progress.step, tokens=tokens, loss=f"{self.mean_loss:.3f}", refresh=False)
                bar.update(round(100 * self.progress.share, 2) - bar.n)
                if self.progress.seconds - saved > 60 * save_minutes:
                    self.checkpoint()
                    saved = self.progress.seconds
        self.checkpoint()


def describe(train: dict[str, str], recipe: Recipe, num_tokens: int) -> dict[str, Any]:
    """What a reader of training.json needs to judge and repeat the run."""
    digest = hashlib.sha256("".join(f"{name}\0{text}\0" for name, text in train.items()).encode())
    versions = {"python": platform.python_version()}
    versions |= {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)}
    corpus: dict[str, Any] = {"files": len(train), "characters": sum(map(len, train.values())), "tokens": num_tokens}
    corpus |= {"sha256": digest.hexdigest(), "held_out": sorted(HELD_OUT)}
    return {"versions": versions, "threads": torch.get_num_threads(), "recipe": asdict(recipe), "corpus": corpus}


def main(
    out: Annotated[Path, typer.Argument(help="Folder for the model.")],
    steps: Annotated[int, typer.Option(help="Number of optimizer steps.")] = 0,
    minutes: Annotated[float, typer.Option(help="Wall-clock time, instead of --steps.")] = 0,
    replay: Annotated[Path | None, typer.Option(help="training.json of the run to repeat.")] = None,
    save_minutes: Annotated[float, typer.Option(help="Time between two checkpoints.")] = 5,
    threads: Annotated[int, typer.Option(help="Torch threads; the last bits of the result depend on it.")] = 1,
) -> None:
    """Train the tokenizer and the model and write them to OUT."""
    if [bool(steps), bool(minutes), bool(replay)].count(True) != 1:
        raise typer.BadParameter("give exactly one of --steps, --minutes and --replay")
    torch.set_num_threads(threads)
    recipe = Recipe()
    progress = Progress(steps, minutes)
    if replay:
        earlier = json.loads(replay.read_text())
        progress = Progress(earlier["steps"], 0, earlier["shares"])
    train, held_out = read_corpus()
    tokenizer = train_tokenizer(list(train.values()), recipe.vocab_size, recipe.max_position_embeddings)
    streams = encode(train, tokenizer), encode(held_out, tokenizer)
    record = describe(train, recipe, len(streams[0]))
    typer.echo(json.dumps(record, indent=1))
    progress.started = time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, progress.stop)
    Training(out, recipe, tokenizer, *streams, progress, record).run(save_minutes)


if __name__ == "__main__":
    typer.run(main)
