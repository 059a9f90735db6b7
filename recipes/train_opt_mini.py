"""Trains a small OPT from scratch on a text file; the defaults are those of opt-mini's model card.

The run lives in OUT/run (settings, tokens, the last checkpoint) and goes on where it stopped when the same command
is given again. What comes out in OUT is a Hugging Face folder.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import BOUNDARY, Windows, load_tokenizer, load_tokens
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from dejavu.artifacts import atomic_write, read_json, write_json
from dejavu.errors import ConfigError, DejavuError

# Settings that may differ when a run is taken up again: they don't change what is learnt.
FREE = ("out", "device", "micro_batch", "compile", "eval_every", "checkpoint_every")


def flag(text: str, default=MISSING):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """Every setting of a run; each is a flag of the command."""

    text: str = flag(f"text file, plain or .gz, documents separated by a line {BOUNDARY}")
    out: str = flag("folder for the model and for the state of the run")
    tokenizer: str = flag("a tokenizer.json; none: one is trained on the text", "")
    vocab_size: int = flag("entries of the tokenizer that is trained", 16384)
    num_hidden_layers: int = flag("layers", 8)
    hidden_size: int = flag("hidden size", 512)
    num_attention_heads: int = flag("attention heads", 8)
    intermediate_size: int = flag("neurons of an MLP", 2048)
    seq_len: int = flag("tokens of a sequence, and the model's positions", 1024)
    batch: int = flag("sequences of a step", 128)
    micro_batch: int = flag("sequences that fit into memory at a time", 32)
    steps: int = flag("optimiser steps", 6606)
    warmup: int = flag("steps over which the learning rate rises", 200)
    decay: float = flag("last part of the steps, over which it falls linearly", 0.4)
    lr: float = flag("highest learning rate", 2e-3)
    final_lr: float = flag("what is left of it at the end", 0.02)
    weight_decay: float = flag("of the matrices and embeddings; norms and biases have none", 0.1)
    clip: float = flag("largest norm of the gradient", 1.0)
    val_tokens: int = flag("tokens held back at the end of the text", 200_000)
    seed: int = flag("of the first weights and of the order of the text", 0)
    device: str = flag("where to train", "cuda" if torch.cuda.is_available() else "cpu")
    compile: bool = flag("train through torch.compile", False)
    eval_every: int = flag("steps between two validations", 250)
    checkpoint_every: int = flag("steps between two checkpoints", 250)

    def __post_init__(self):
        for name in ("steps", "warmup", "batch", "micro_batch", "seq_len", "eval_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads})"
            )
        if not 0 < self.decay <= 1:
            raise ConfigError(f"decay must be in (0, 1], found {self.decay}")

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        falling = max(0.0, (step + 1) / self.steps - (1 - self.decay)) / self.decay
        return self.lr * min(1.0, (step + 1) / self.warmup) * (1 - falling * (1 - self.final_lr))


def train(recipe: Recipe) -> dict[str, float]:
    """Train, or go on with, a run.

    Returns: `loss` per token and `density`, the share of MLP activations above zero, on the text held back.
    Raises: ConfigError for settings that don't fit the text or an earlier run in the same folder.
    """
    run = Path(recipe.out) / "run"
    run.mkdir(parents=True, exist_ok=True)
    _check_same_run(recipe, run / "recipe.json")
    tokenizer = load_tokenizer(run / "tokenizer.json", recipe.tokenizer, recipe.text, recipe.vocab_size)
    tokens = load_tokens(run / "tokens.npy", tokenizer, recipe.text)
    held_back = tokens.size - recipe.val_tokens
    if min(held_back, recipe.val_tokens) <= recipe.seq_len:
        raise ConfigError(
            f"{recipe.text}: {tokens.size} tokens are too few to hold {recipe.val_tokens} back and to train on "
            f"sequences of {recipe.seq_len}; give more text or smaller --val-tokens and --seq-len"
        )
    windows = Windows(tokens[:held_back], recipe.seq_len, recipe.seed)
    validation = Windows(tokens[held_back:], recipe.seq_len)

    torch.manual_seed(recipe.seed)
    config = _config(recipe, tokenizer.get_vocab_size(), tokenizer.token_to_id(BOUNDARY))
    model = OPTForCausalLM(config).to(recipe.device)
    optimizer = _optimizer(model, recipe)
    checkpoint = run / "checkpoint.safetensors"
    start = _restore(checkpoint, model, optimizer) if checkpoint.exists() else 0
    forward = torch.compile(model) if recipe.compile else model

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, "{task.fields[state]}", console=console) as progress:
        task = progress.add_task("training", total=recipe.steps, completed=start, state="")

        def report(done: int) -> dict[str, float]:
            result = validate(model, validation, recipe)
            line = f"step {done:6}: validation loss {result['loss']:.3f}, MLP density {result['density']:.3f}"
            console.print(line, highlight=False)
            return result

        result = report(start)
        for step in range(start, recipe.steps):
            began = time.perf_counter()
            loss = _step(forward, optimizer, windows, step, recipe)
            speed = recipe.batch * recipe.seq_len / (time.perf_counter() - began)
            progress.update(task, advance=1, state=f"loss {loss:.3f}, {speed:,.0f} tokens/s")
            done = step + 1
            if done % recipe.checkpoint_every == 0 or done == recipe.steps:
                _checkpoint(checkpoint, model, optimizer, done)
            if done % recipe.eval_every == 0 or done == recipe.steps:
                result = report(done)
    _export(model, run / "tokenizer.json", recipe)
    return result


@torch.no_grad()
def validate(model: OPTForCausalLM, windows: Windows, recipe: Recipe) -> dict[str, float]:
    """Mean loss per token, and the share of MLP activations that are above zero, over all windows."""
    open_count, count, total = torch.zeros((), device=recipe.device), 0, 0.0

    def watch(module, args, output: Tensor):
        nonlocal open_count, count
        open_count += (output > 0).sum()
        count += output.numel()

    hooks = [layer.activation_fn.register_forward_hook(watch) for layer in model.model.decoder.layers]
    for first in range(0, len(windows), recipe.micro_batch):
        size = min(recipe.micro_batch, len(windows) - first)
        total += _loss(model, windows.batch(first, size), recipe).item() * size
    for hook in hooks:
        hook.remove()
    return {"loss": total / len(windows), "density": open_count.item() / count}


def _loss(forward, batch: Tensor, recipe: Recipe) -> Tensor:
    batch = batch.to(recipe.device)
    device = batch.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        logits = forward(batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def _step(forward, optimizer: torch.optim.Optimizer, windows: Windows, step: int, recipe: Recipe) -> float:
    """One optimiser step; returns its training loss."""
    batch, total = windows.batch(step * recipe.batch, recipe.batch), 0.0
    for part in batch.split(recipe.micro_batch):
        loss = _loss(forward, part, recipe) * (len(part) / recipe.batch)
        loss.backward()
        total += loss.detach()
    rate = recipe.learning_rate(step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    torch.nn.utils.clip_grad_norm_(_parameters(optimizer), recipe.clip)
    optimizer.step()
    optimizer.zero_grad()
    return float(total)


def _config(recipe: Recipe, vocab_size: int, boundary: int) -> OPTConfig:
    return OPTConfig(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden_size,
        word_embed_proj_dim=recipe.hidden_size,
        ffn_dim=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        max_position_embeddings=recipe.seq_len,
        dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=boundary,
        eos_token_id=boundary,
        pad_token_id=boundary,
    )


def _optimizer(model: OPTForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _checkpoint(path: Path, model: OPTForCausalLM, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Weights and both moments of every parameter, in one file that is there whole or not at all."""
    tensors = {}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        tensors |= {name: p.detach(), f"{name}:exp_avg": state["exp_avg"], f"{name}:exp_avg_sq": state["exp_avg_sq"]}
    with atomic_write(path, "wb") as file:
        file.write(save(tensors, metadata={"step": str(step)}))


def _restore(path: Path, model: OPTForCausalLM, optimizer: torch.optim.Optimizer) -> int:
    """Load a checkpoint; returns the steps done."""
    with safe_open(path, "pt", device=str(model.device)) as file, torch.no_grad():
        step = int(file.metadata()["step"])
        for name, p in model.named_parameters():
            p.copy_(file.get_tensor(name))
            moments = {key: file.get_tensor(f"{name}:{key}") for key in ("exp_avg", "exp_avg_sq")}
            # A fused AdamW counts its steps on the device.
            optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device), **moments}
    return step


def _check_same_run(recipe: Recipe, path: Path) -> None:
    settings = {k: v for k, v in asdict(recipe).items() if k not in FREE}
    earlier = read_json(path) if path.exists() else settings
    if other := [k for k in settings if earlier.get(k) != settings[k]]:
        lists = ", ".join(f"{k} {earlier.get(k)!r} there and {settings[k]!r} here" for k in other)
        raise ConfigError(f"{recipe.out} holds a run with other settings ({lists}); give those, or another --out")
    write_json(path, settings)


def _export(model: OPTForCausalLM, tokenizer: Path, recipe: Recipe) -> None:
    """Write the Hugging Face folder; each file appears whole."""
    boundary = {f"{kind}_token": BOUNDARY for kind in ("bos", "eos", "unk")}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **boundary, "model_max_length": recipe.seq_len}
    with tempfile.TemporaryDirectory(dir=recipe.out) as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        write_json(Path(folder, "tokenizer_config.json"), settings)
        Path(folder, "tokenizer.json").write_bytes(tokenizer.read_bytes())
        for file in Path(folder).iterdir():
            os.replace(file, Path(recipe.out, file.name))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in fields(Recipe):
        name, text = f"--{f.name.replace('_', '-')}", f.metadata["help"]
        if f.type is bool:
            parser.add_argument(name, action="store_true", help=text)
        elif f.default is MISSING:
            parser.add_argument(name, type=f.type, required=True, help=text)
        else:
            parser.add_argument(name, type=f.type, default=f.default, help=text)
    try:
        result = train(Recipe(**vars(parser.parse_args(argv))))
    except DejavuError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
