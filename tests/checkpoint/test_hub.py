"""Checkpoints of the Hugging Face Hub: only what is needed is fetched, and a failure is one clear error."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from dejavu.checkpoint.source import open_checkpoint
from dejavu.errors import CheckpointError

NEEDED = ("config.json tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json "
          "added_tokens.json merges.txt vocab.json generation_config.json chat_template.jinja")  # fmt: skip
# The folders' names match the patterns of wanted files on purpose.
UNNEEDED = ("README.md modeling_x.py flax_model.msgpack consolidated.safetensors original/model.safetensors "
            "model-fp16/part.safetensors tokenizer/tokenizer.json")  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of one repository, tmp_path/repo, that delivers what is asked for; `calls` are the downloads."""
    repo, cache = tmp_path / "repo", tmp_path / "cache"
    repo.mkdir()
    monkeypatch.chdir(tmp_path)

    def snapshot_download(repo_id, *, revision, allow_patterns, ignore_patterns):
        snapshot_download.calls.append((repo_id, revision))
        cache.mkdir(exist_ok=True)
        files = [str(file.relative_to(repo)) for file in repo.rglob("*") if file.is_file()]
        for file in huggingface_hub.utils.filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (cache / file).parent.mkdir(exist_ok=True)
            shutil.copy(repo / file, cache / file)
        return str(cache)

    snapshot_download.calls = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return snapshot_download


def weights(folder, kind, shards) -> set[str]:
    """Write tensors t0, t1, .., one a shard; returns the names of the files."""
    stem = "model" if kind == "safetensors" else "pytorch_model"
    save = save_file if kind == "safetensors" else torch.save
    files = [f"{stem}.{kind}"] if shards == 1 else [f"{stem}-{i + 1:05}-of-{shards:05}.{kind}" for i in range(shards)]
    for i, file in enumerate(files):
        save({f"t{i}": torch.full((2,), float(i))}, folder / file)
    if shards == 1:
        return set(files)
    index = f"{stem}.{kind}.index.json"
    (folder / index).write_text(json.dumps({"weight_map": {f"t{i}": file for i, file in enumerate(files)}}))
    return {*files, index}


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("kinds", [("safetensors",), ("bin",), ("safetensors", "bin")])
def test_what_is_needed_arrives_and_no_more(tmp_path, hub, kinds, shards):
    repo = tmp_path / "repo"
    wanted, *_ = [weights(repo, kind, shards) for kind in kinds]  # .bin only where there are no safetensors
    for name in (*NEEDED.split(), *UNNEEDED.split()):
        (repo / name).parent.mkdir(exist_ok=True)
        (repo / name).write_text("{}")
    checkpoint = open_checkpoint("owner/model", revision="v1")
    arrived = {str(file.relative_to(checkpoint.path)) for file in checkpoint.path.rglob("*") if file.is_file()}
    assert arrived == wanted | set(NEEDED.split())
    assert checkpoint.name == "owner/model" and set(hub.calls) == {("owner/model", "v1")}
    read = {name: rows.tolist() for name, _, rows in checkpoint.tensors(dict.fromkeys(checkpoint.headers, 1))}
    assert read == {f"t{i}": [i, i] for i in range(shards)}


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("offline\nsecond line"), OSError("no network")])
def test_a_hub_that_fails_is_one_clear_error(tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match="Hugging Face Hub") as raised:
        open_checkpoint("owner/model")
    message = str(raised.value)
    assert str(error).splitlines()[0] in message and "owner/model" in message and "\n" not in message


def test_a_folder_on_disk_is_never_asked_for(tmp_path, hub):
    folder = tmp_path / "owner" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert open_checkpoint("owner/model").path.resolve() == folder
    assert hub.calls == []
