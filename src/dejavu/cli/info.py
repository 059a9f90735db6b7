"""`dejavu info`: what a model is and what a token of it costs, from its headers alone."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Annotated, Any

import typer

from dejavu.artifacts import read_json, to_json
from dejavu.cli.options import Dtype, Json, QuantizeEmbeddings, Revision, WeightsFormat

SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)


def info(
    model: Annotated[
        str | None, typer.Argument(help="A model's or a sparsity pack's folder or hub id. [default: the bundled model]")
    ] = None,
    dtype: Dtype = "auto",
    weights: WeightsFormat = None,
    quantize_embeddings: QuantizeEmbeddings = False,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Show a model's family, sizes, supported modes, and the bytes that decoding one token reads.

    Reads config.json and the tensors' headers, never the weights; of a pack everything, to compare its hash.

    Example: dejavu info facebook/opt-1.3b --dtype bf16
    """
    if model is not None and (Path(model) / "pack.json").exists():
        from dejavu.cli.fit import show
        from dejavu.selection.pack import MANIFEST, load_pack

        pack = load_pack(model)  # which reads everything, and compares the hash where there is one
        show(pack, model, as_json, "sha256" in read_json(Path(model) / MANIFEST))
        return
    facts, read = _facts(model, revision, dtype, weights, quantize_embeddings)
    if as_json:
        typer.echo(to_json(facts | {"dense_step_bytes": read}))
        return

    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    table = Table(show_header=False)
    for name, value in facts.items():
        cell = f"{value:,}" if type(value) is int else ", ".join(value) if type(value) is tuple else str(value)
        table.add_row(name, cell, end_section=name == "context")
    for part, count in read.items():
        table.add_row(f"read per token: {part}", decimal(round(count)))
    table.add_row("read per token, dense, full context", decimal(round(sum(read.values()))))
    Console().print(table)


def _facts(
    model: str | None, revision: str | None, dtype: str, weights: str | None, quantize_embeddings: bool
) -> tuple[dict[str, Any], dict[str, float]]:
    """What a model is, and the bytes by part that a dense step reads at the end of the context, where they are most."""
    from dejavu.checkpoint.layout import parse_quantization
    from dejavu.checkpoint.load import stored_dtype
    from dejavu.checkpoint.source import BUNDLED, BYTES, open_checkpoint
    from dejavu.engine.bytes import step_bytes
    from dejavu.families import family
    from dejavu.families.load import plan_weights

    checkpoint = open_checkpoint(model or BUNDLED, revision=revision)
    config, plan, names = plan_weights(
        checkpoint, dtype=dtype, quantization=parse_quantization(weights, quantize_embeddings)
    )
    stored = stored_dtype(checkpoint, names)
    facts = {
        "model": model or BUNDLED,
        "family": config.model_type,
        "parameters": sum(prod(slot.shape) for slot in family(config.model_type).slots(config, plan).values()),
        "stored": "quantised" if stored == BYTES else stored,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "weights": None if plan.quantization is None else plan.quantization.weights.name,
        "modes": config.modes,
        "activation": config.activation,
        "gated": config.gated,
        **{name: getattr(config, name) for name in SIZES},
        "context": config.context,
    }
    return facts, step_bytes(config, plan, attended=config.sliding_window or config.context)
