"""Where checkpoints come from, and every way in which one can be bad."""

import json
import os
import pickle
import random

import pytest
import torch
from safetensors.torch import save_file

from dejavu.checkpoint import source
from dejavu.checkpoint.source import BUNDLED, Checkpoint, open_checkpoint
from dejavu.errors import CheckpointError, ConfigError

TENSORS = {
    "matrix": torch.arange(35.0).view(7, 5),
    "half": torch.randn(3, 4, dtype=torch.float16),
    "brain": torch.randn(6, dtype=torch.bfloat16),
    "number": torch.tensor(7),
    "none": torch.empty(0, 3),
}


def write(folder, tensors=TENSORS, *, kind="safetensors", shards=1, config="{}"):
    """A checkpoint folder of the given tensors, sharded by hand."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config)
    stem = "model" if kind == "safetensors" else "pytorch_model"
    save = save_file if kind == "safetensors" else torch.save
    if shards == 1:
        save(tensors, folder / f"{stem}.{kind}")
        return folder
    names = {name: f"{stem}-{i % shards + 1:05}-of-{shards:05}.{kind}" for i, name in enumerate(tensors)}
    for shard in set(names.values()):
        save({name: tensors[name] for name in tensors if names[name] == shard}, folder / shard)
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def read(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    pieces = {name: [] for name in checkpoint.headers}
    for name, first, rows in checkpoint.tensors(dict.fromkeys(checkpoint.headers, 1)):
        assert first == sum(len(piece) for piece in pieces[name])
        pieces[name].append(rows.clone())
    return {
        name: torch.cat(parts).view(checkpoint.headers[name].shape) if parts else torch.empty(0)
        for name, parts in pieces.items()
    }


def error_of(folder) -> str:
    with pytest.raises(CheckpointError) as error:
        _ = open_checkpoint(folder).headers
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("tiny_pieces", [False, True])
def test_every_format_holds_the_same(tmp_path, monkeypatch, kind, shards, tiny_pieces):
    if tiny_pieces:  # two rows of the matrix a piece, a new mapping for each
        monkeypatch.setattr(source, "PIECE_BYTES", 40)
        monkeypatch.setattr(source, "REMAP_BYTES", 1)
    checkpoint = open_checkpoint(write(tmp_path / "m", kind=kind, shards=shards))
    assert {n: (h.shape, h.dtype) for n, h in checkpoint.headers.items() if n != "number"} == {
        n: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in TENSORS.items() if n != "number"
    }
    assert checkpoint.headers["number"].shape == ()
    for name, tensor in read(checkpoint).items():
        assert torch.equal(tensor, TENSORS[name]) or TENSORS[name].numel() == tensor.numel() == 0, name


def test_pieces_keep_units_together(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "PIECE_BYTES", 50)
    tensor = torch.arange(60.0).view(12, 5)
    checkpoint = open_checkpoint(write(tmp_path / "m", {"x": tensor}))
    for unit, rows in ((1, 2), (2, 2), (3, 3), (4, 4), (12, 12)):
        pieces = list(checkpoint.tensors({"x": unit}))
        assert [first for _, first, _ in pieces] == list(range(0, 12, rows))
        assert torch.equal(torch.cat([piece for *_, piece in pieces]), tensor)


def test_the_hash_is_of_the_content(tmp_path, monkeypatch):
    single = open_checkpoint(write(tmp_path / "single")).hash
    assert len(single) == 64
    assert open_checkpoint(write(tmp_path / "sharded", shards=2)).hash == single
    monkeypatch.setattr(source, "PIECE_BYTES", 40)
    assert open_checkpoint(tmp_path / "single").hash == single
    changed = TENSORS | {"matrix": TENSORS["matrix"].clone()}
    changed["matrix"][6, 4] += 1
    others = {
        open_checkpoint(write(tmp_path / "value", changed)).hash,
        open_checkpoint(write(tmp_path / "name", {n.upper(): t for n, t in TENSORS.items()})).hash,
        open_checkpoint(write(tmp_path / "shape", TENSORS | {"matrix": TENSORS["matrix"].view(5, 7)})).hash,
        open_checkpoint(write(tmp_path / "config", config='{"a": 1}')).hash,
    }
    assert len(others | {single}) == 5


def test_safetensors_are_preferred(tmp_path):
    write(tmp_path, {"x": torch.zeros(1)}, kind="bin")
    write(tmp_path, {"y": torch.zeros(1)})
    assert list(open_checkpoint(tmp_path).headers) == ["y"]


# Bad files


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"'])
def test_config_that_is_no_json_object(tmp_path, text):
    assert "config.json" in error_of(write(tmp_path / "m", config=text))


def test_missing_config_or_weights(tmp_path):
    folder = write(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    assert "model.safetensors or pytorch_model.bin" in error_of(folder)
    (folder / "config.json").unlink()
    assert "config.json" in error_of(folder)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.999])
def test_a_file_cut_off(tmp_path, kind, share):
    folder = write(tmp_path / "m", {"x": torch.randn(100, 100)}, kind=kind, shards=2)
    file = next(folder.glob(f"*00001-of-00002.{kind}"))
    os.truncate(file, int(file.stat().st_size * share))
    assert f"{file}: damaged or cut off" in error_of(folder)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_damaged_bytes_never_end_in_another_kind_of_error(tmp_path, kind):
    folder = write(tmp_path / "m", {"x": torch.randn(5, 7), "y": torch.randn(3)}, kind=kind)
    file = next(folder.glob(f"*.{kind}"))
    good, chance, refused = file.read_bytes(), random.Random(0), 0
    for _ in range(300):
        bad = bytearray(good)
        bad[chance.randrange(len(bad))] = chance.randrange(256)
        file.unlink()  # never rewrite a file that may still be mapped
        file.write_bytes(bad)
        try:
            read(open_checkpoint(folder))
        except CheckpointError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 0 < refused < 300


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_of_another_kind(tmp_path, name):
    folder = write(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n" * 9)
    assert f"{folder / name}: " in error_of(folder)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_index_that_names_missing_shards(tmp_path, kind):
    folder = write(tmp_path / "m", kind=kind, shards=3)
    gone = sorted(folder.glob(f"*-of-*.{kind}"))[1:]
    for file in gone:
        file.unlink()
    message = error_of(folder)
    assert "index.json" in message and all(file.name in message for file in gone)


@pytest.mark.parametrize("index", ["{", "{}", '{"weight_map": []}', '{"weight_map": {"x": 1}}',
                                   '{"weight_map": {"x": "../m/model.safetensors"}}'])  # fmt: skip
def test_an_index_that_is_none(tmp_path, index):
    folder = write(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in error_of(folder)


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("plain_pickle", [False, True])
def test_a_malicious_bin_is_refused_and_nothing_runs(tmp_path, plain_pickle):
    folder, target = write(tmp_path / "m", kind="bin"), tmp_path / "pwned"
    file = folder / "pytorch_model.bin"
    bad = {"x": Payload(target)}
    file.write_bytes(pickle.dumps(bad)) if plain_pickle else torch.save(bad, file)
    message = error_of(folder)
    assert str(file) in message and "weights_only" not in message
    assert not target.exists()
    torch.load(file, weights_only=False) if not plain_pickle else pickle.loads(file.read_bytes())
    assert target.exists(), "the payload of this test does nothing"


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"x": 1}, {"state_dict": {"x": torch.zeros(1)}}])
def test_a_bin_that_is_no_dictionary_of_tensors(tmp_path, content):
    folder = write(tmp_path / "m", kind="bin")
    torch.save(content, folder / "pytorch_model.bin")
    assert "dictionary of tensors" in error_of(folder)


# Names


def test_local_names(tmp_path, monkeypatch):
    folder = write(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (folder, str(folder), "m", "./m", "~/m", "m/"):
        assert open_checkpoint(name).name == "m"
        assert open_checkpoint(name).path.resolve() == folder


def test_the_bundled_name_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    write(tmp_path / BUNDLED, config='{"here": 1}')
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint(f"./{BUNDLED}").config == {"here": 1}
    monkeypatch.setattr(source, "__file__", str(tmp_path / "package" / "checkpoint" / "source.py"))
    write((tmp_path / "package" / "assets").mkdir(parents=True) or tmp_path / "package" / "assets" / BUNDLED)
    assert open_checkpoint(BUNDLED).config == {}


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "~/nothing", "a/b/c", "", "what is this?"])
def test_a_path_that_does_not_exist_never_asks_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder") as error:
        open_checkpoint(name)
    assert "\n" not in str(error.value)


def test_a_file_is_not_a_checkpoint(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match="expected a folder"):
        open_checkpoint(tmp_path / "model.gguf")


def test_a_revision_needs_the_hub(tmp_path):
    with pytest.raises(ConfigError, match="revision"):
        open_checkpoint(write(tmp_path / "m"), revision="main")


def test_a_hash_is_remembered_until_a_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("DEJAVU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("dejavu.checkpoint.remember.SETTLED_NS", 0)
    folder, reads = write(tmp_path / "model"), []
    read = Checkpoint._read_hash
    monkeypatch.setattr(Checkpoint, "_read_hash", lambda self: reads.append(1) or read(self))
    first = open_checkpoint(folder).hash
    assert open_checkpoint(folder).hash == first and len(reads) == 1
    # As large and as old as before, and at the same place: only the ctime tells.
    file = folder / "model.safetensors"
    times, data = file.stat(), bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    second = open_checkpoint(folder).hash
    assert second != first and len(reads) == 2
    for damaged in ("", "[]", '{"files": 5}', '{"hash": 5}'):
        next((tmp_path / "cache/hashes").iterdir()).write_text(damaged)
        assert open_checkpoint(folder).hash == second
    assert len(reads) == 6
    (tmp_path / "file").touch()  # a cache that cannot be written
    monkeypatch.setenv("DEJAVU_CACHE", str(tmp_path / "file"))
    assert open_checkpoint(folder).hash == second and len(reads) == 7


def test_a_hash_of_files_that_just_changed_is_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("DEJAVU_CACHE", str(tmp_path / "cache"))
    assert open_checkpoint(write(tmp_path / "model")).hash
    assert not (tmp_path / "cache").exists()
