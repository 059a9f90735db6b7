"""The tokenizer beside a checkpoint: what begins a prompt, what ends a text, and what is refused."""

import copy
import json
from contextlib import suppress
from dataclasses import replace

import pytest
import transformers
from tokenizers import processors

from dejavu.checkpoint.source import Checkpoint
from dejavu.engine.tokenizer import Tokenizer
from dejavu.errors import CheckpointError, ConfigError
from dejavu.families import family


def load(folder) -> Tokenizer:
    config = Checkpoint(folder, "test").config
    return Tokenizer(folder, family(config["model_type"]).parse(config))


@pytest.mark.parametrize("puts", [False, True])
@pytest.mark.parametrize("model_type", ["opt", "llama"])
def test_a_prompt_gets_what_the_tokenizers_own_settings_put_there(tiny_checkpoint, byte_level, model_type, puts):
    """Whatever config.json says of a first token."""
    folder = tiny_checkpoint(model_type, bos_token_id=7)
    if puts:
        own = copy.deepcopy(byte_level)
        own.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
        own.save_pretrained(folder)
    tokenizer = load(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("hi", "<|endoftext|>hi", "h\u00e9"):
        assert tokenizer.encode(text) == theirs(text)["input_ids"]
        assert (tokenizer.encode(text)[0] == 0) == (puts or text[0] == "<")
    assert tokenizer.encode("") == [0] == [tokenizer.bos_id]
    assert tokenizer.decode(tokenizer.encode("hi")) == "hi"


def test_an_empty_prompt_needs_a_token_to_begin_with(tiny_checkpoint, byte_level):
    folder = tiny_checkpoint()
    own = copy.deepcopy(byte_level)
    own.bos_token = None
    own.save_pretrained(folder)
    with pytest.raises(ConfigError, match="the prompt is empty, and this tokenizer has no token to begin with"):
        load(folder).encode("")
    assert load(folder).prefix_id == 0  # the end of the document before


@pytest.mark.parametrize("model_type", ["opt", "llama", "mistral"])
@pytest.mark.parametrize(
    "field", [{"use_cache": None}, {"initializer_range": 0, "init_std": 0}, {"head_dim": "x"}, {"dropout": None}]
)
def test_a_tokenizer_loads_whatever_stands_in_config_json(tiny_checkpoint, model_type, field):
    folder = tiny_checkpoint("opt" if model_type == "opt" else "llama")
    expected = load(folder).encode("hi there")
    config = Checkpoint(folder, "test").config
    (folder / "config.json").write_text(json.dumps(config | field))
    assert (
        Tokenizer(folder, replace(family(config["model_type"]).parse(config), model_type=model_type)).encode("hi there")
        == expected
    )


def test_a_sentencepiece_model_alone_is_enough(tiny_checkpoint, tmp_path):
    """What it needs is installed with the package."""
    sentencepiece = pytest.importorskip("sentencepiece")
    text, folder = tmp_path / "text", tiny_checkpoint("llama")
    text.write_text("hello world, how are you today\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=280, model_type="bpe", byte_fallback=True,
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    (tmp_path / "tokenizer.model").rename(folder / "tokenizer.model")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **names}))
    tokenizer = load(folder)
    ids = tokenizer.encode("hello world")
    assert ids[0] == tokenizer.bos_id == 1 and tokenizer.decode(ids) == "hello world" and len(ids) < 12


def test_ends_come_from_all_configs(tiny_checkpoint):
    folder = tiny_checkpoint(eos_token_id=5)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [6, 7]}))
    assert load(folder).eos_ids == {0, 5, 6, 7}  # 0: the tokenizer's own, where other engines stop too


def test_the_tokenizers_own_end_serves_where_no_config_has_one(tiny_checkpoint):
    folder = tiny_checkpoint(eos_token_id=None)
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert load(folder).eos_ids == {0}


@pytest.mark.parametrize("text, message", [("a\udcff", "not valid Unicode")])
def test_prompts_that_are_no_text(bundled, text, message):
    with pytest.raises(ConfigError, match=message):
        bundled.tokenizer.encode(text)


def test_missing_and_damaged_files(tiny_checkpoint):
    folder = tiny_checkpoint()
    (folder / "tokenizer.json").write_text('{"version"')
    with pytest.raises(CheckpointError, match="does not load"):
        load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer; expected one of tokenizer\.json"):
        load(folder)


def test_a_generation_config_that_is_wrong(tiny_checkpoint):
    folder = tiny_checkpoint()
    (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(CheckpointError, match="eos_token_id must be"):
        load(folder)


def test_no_code_of_a_checkpoint_runs(tiny_checkpoint):
    folder = tiny_checkpoint()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('the code of the checkpoint ran')\n")
    with suppress(CheckpointError):  # to refuse it is fine as well
        load(folder)
