"""The tokenizer beside a checkpoint: what begins a prompt, what ends a text, and what is refused."""

import json
from contextlib import suppress

import pytest

from dejavu.checkpoint.source import Checkpoint
from dejavu.engine.tokenizer import Tokenizer
from dejavu.errors import CheckpointError, ConfigError
from dejavu.model import family


def load(folder) -> Tokenizer:
    config = Checkpoint(folder, "test").config
    return Tokenizer(folder, family(config["model_type"]).parse(config))


def test_the_first_token_is_put_first_once(tiny_checkpoint):
    tokenizer = load(tiny_checkpoint())
    ids = tokenizer.encode("hi")
    assert ids[0] == tokenizer.bos_id == 0 and len(ids) == 3
    assert tokenizer.encode("<|endoftext|>hi") == ids
    assert tokenizer.decode(ids) == "hi"


def test_ends_come_from_all_configs(tiny_checkpoint):
    folder = tiny_checkpoint(eos_token_id=5)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [6, 7]}))
    assert load(folder).eos_ids == {5, 6, 7}


def test_the_tokenizers_own_end_serves_where_no_config_has_one(tiny_checkpoint):
    folder = tiny_checkpoint(eos_token_id=None)
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert load(folder).eos_ids == {0}


@pytest.mark.parametrize("text, message", [("", "empty"), ("a\udcff", "not valid Unicode")])
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
