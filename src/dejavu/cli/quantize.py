"""`dejavu quantize`: save a model with quantised weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dejavu.artifacts import to_json
from dejavu.cli.options import Dtype, Json, QuantizeEmbeddings, Revision, progress_bar


def quantize(
    model: Annotated[str, typer.Argument(help="A folder or hub id.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; must not exist.")],
    weights: Annotated[str, typer.Option(help="int8, int4, or int4-g32, int4-g128z: group, zero point.")] = "int8",
    quantize_embeddings: QuantizeEmbeddings = False,
    dtype: Dtype = "auto",
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Quantise a model's weights and save it, with its tokenizer, as a folder that every verb loads.

    Example: dejavu quantize facebook/opt-1.3b opt-1.3b-int4 --weights int4
    """
    from rich.filesize import decimal

    from dejavu.artifacts import new_folder
    from dejavu.checkpoint.layout import parse_quantization
    from dejavu.checkpoint.saved import check_new, save_quantized, saved_settings
    from dejavu.checkpoint.source import open_checkpoint
    from dejavu.errors import ConfigError
    from dejavu.families.load import load_weights
    from dejavu.kernels import backend

    check_new(out)
    quantization = parse_quantization(weights, quantize_embeddings)
    checkpoint = open_checkpoint(model, revision=revision)
    if saved_settings(checkpoint) is not None:
        raise ConfigError(f"{model}: is quantised already; start from the model it was made of")
    with new_folder(out) as folder, progress_bar() as progress:
        _, loaded = load_weights(
            checkpoint, ops=backend("cpu"), dtype=dtype, quantization=quantization, progress=progress
        )
        save_quantized(checkpoint, loaded, folder)
    size = sum(file.stat().st_size for file in out.iterdir())
    if as_json:
        facts = {"model": model, "out": str(out), "weights": quantization.weights.name}
        typer.echo(to_json(facts | {"embeddings": quantize_embeddings, "bytes": size}))
    else:
        typer.echo(f"{out}: {model} in {quantization.weights.name}, {decimal(size)}")
