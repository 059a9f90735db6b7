"""A broken layer is one line that names it, whatever the verb."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dejavu.cli.main import app


@pytest.fixture
def broken(make_checkpoint, tmp_path):
    """A checkpoint with a bundled-like tokenizer whose second MLP gives NaN, and a text."""
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers

    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    folder = make_checkpoint("opt", vocab_size=257, **ids)
    vocab = {"<|endoftext|>": 0} | {c: i + 1 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **end).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.decoder.layers.1.fc1.weight"][3] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    return folder, tmp_path / "text.txt", tmp_path / "out"


@pytest.mark.parametrize(
    "args",
    [
        "generate {folder} hello -n 3",
        "generate {folder} hello -n 3 --temperature 1 --seed 1",
        "eval {folder} --text {text} --text-tokens 64 --no-speed",
        "compare dense exact --model {folder} --text {text} --text-tokens 64 --no-speed",
        "profile {folder} --text {text} -o {out} --window 64 --tokens 512 --quality-tokens 64 --sentence fox_jumps",
        "fit {folder} --text {text} -o {out} --window 32 --tokens 1024 --calibration-tokens 256",
    ],
    ids=lambda args: args.split()[0],
)
def test_every_verb_names_the_layer(broken, args):
    folder, text, out = broken
    result = CliRunner().invoke(app, args.format(folder=folder, text=text, out=out).split())
    assert result.exit_code == 1, result.output
    assert "error: layer 1: its MLP for token" in result.stderr and "gives NaN or infinity" in result.stderr
    assert not (out / "pack.json").exists()


def test_json_escapes_what_the_terminal_lacks(make_checkpoint):
    """Whatever encoding stdout has: ASCII holds it all."""
    result = CliRunner().invoke(app, ["generate", "caf\u00e9 \U0001f336", "-n", "4", "--json"])
    assert result.exit_code == 0 and result.stdout.isascii()
    assert json.loads(result.stdout)["prompt"] == "caf\u00e9 \U0001f336"
