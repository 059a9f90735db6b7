"""What a pack's files may hold: every wrong value is one error that names its place, before anything runs."""

import json
import shutil
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file

import dejavu
from dejavu.errors import PackError
from dejavu.selection.manifest import digest
from dejavu.selection.pack import MANIFEST, TENSORS, load_pack

BUNDLED = Path(dejavu.__file__).parent / "assets/opt-mini-pack"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(BUNDLED, tmp_path / "pack"))


def put(folder: Path, *place, value, sign: bool = True) -> None:
    """Change one value of the manifest; signed, so that the values are looked at and not only the hash."""
    data = json.loads((folder / MANIFEST).read_text())
    at = data
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    if sign and "sha256" in data:
        data["sha256"] = digest(data, folder / TENSORS)
    (folder / MANIFEST).write_text(json.dumps(data))


CUT = ("points", 0, "cuts", 1)


@pytest.mark.parametrize(
    ("place", "value"),
    [((*CUT, "k"), k) for k in (0, -5, 5.5, "5", None, True)]
    + [((*CUT, "threshold"), t) for t in ("x", float("nan"), float("inf"), 1e300, -1e300, 10**400, True)]
    + [(("lookahead", "heads"), n) for n in (-3, -1, 0.5)]
    + [(("base", "hash"), 5), (("rows", "1.up", "width"), "16"), (("schema",), 2.0), (("default",), True)]
    + [(("default",), 99), (("points",), []), (("points", 0, "measured", "bytes"), "x"), (("unknown",), 1)],
)
def test_a_wrong_value_is_named(folder, place, value):
    put(folder, *place, value=value)
    names = [str(key) for key in place if isinstance(key, str)]
    with pytest.raises(PackError, match=r"pack\.json") as error:
        load_pack(folder)
    assert names[-1] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("signed", [True, False])
def test_a_renamed_format_an_edit_and_a_flipped_byte(folder, signed):
    put(folder, "rows", "1.up", "format", value="int8" if signed else "int4-g128", sign=signed)
    with pytest.raises(PackError, match="not made of rows of int8" if signed else "is damaged, or was edited"):
        load_pack(folder)
    shutil.copy(BUNDLED / MANIFEST, folder)
    load_pack(folder)
    data = bytearray((folder / TENSORS).read_bytes())
    data[-1000] ^= 1
    (folder / TENSORS).write_bytes(data)
    with pytest.raises(PackError, match="is damaged, or was edited"):
        load_pack(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [("1.bias", torch.zeros(2048, dtype=kind)) for kind in (torch.float16, torch.float64, torch.int64)]
    + [("1.bias", torch.full((2048,), torch.nan))]
    + [("1.up", torch.zeros(size, dtype=kind)) for size, kind in (((5,), torch.uint8), ((), torch.uint8),
       ((2048, 256), torch.float32), ((2048, 256), torch.int8))]
    + [("99.up", torch.zeros(2, 2)), ("1.other", torch.zeros(2)), ("²", torch.zeros(2))],
)  # fmt: skip
def test_a_wrong_tensor_is_named(folder, name, value):
    save_file(load_file(folder / TENSORS) | {name: value}, folder / TENSORS)
    put(folder, "base", "name", value="signed anew")
    with pytest.raises(PackError, match=r"predictors\.safetensors") as error:
        load_pack(folder)
    assert name in str(error.value)


def test_a_pack_of_the_schema_before_still_loads(folder):
    data = json.loads((folder / MANIFEST).read_text())
    del data["sha256"]
    (folder / MANIFEST).write_text(json.dumps(data | {"schema": 2}))
    assert load_pack(folder).points == load_pack(BUNDLED).points


def test_mutated_files_load_as_they_were_or_are_refused(folder):
    """Bytes and values changed at random; no other kind of error, and, with the hash, no silent success."""
    random = Random(0)
    manifest, tensors = (folder / MANIFEST).read_bytes(), (folder / TENSORS).read_bytes()
    loads = json.loads(manifest)
    values = [None, True, -1, 0, 1, 0.5, 1e300, float("nan"), "x", [], {}, 10**400, "int4-g32"]
    for number in range(1000):
        if number % 4 == 0:
            data = bytearray(tensors)
            at = random.randrange(8 if number % 8 else 4096)
            data[at] = (data[at] + random.randrange(1, 256)) % 256
            (folder / TENSORS).write_bytes(data)
        else:
            (folder / TENSORS).write_bytes(tensors)
        if number % 4 == 1:
            data = bytearray(manifest)
            data[random.randrange(len(data))] = random.randrange(256)
            (folder / MANIFEST).write_bytes(data)
        else:
            place, at = [], loads
            while isinstance(at, dict | list) and at and (not place or random.random() < 0.9):
                key = random.choice(list(at)) if isinstance(at, dict) else random.randrange(len(at))
                place.append(key)
                at = at[key]
            (folder / MANIFEST).write_bytes(manifest)
            if number % 4 != 0:
                put(folder, *place, value=random.choice(values), sign=number % 4 == 2)
        try:
            pack = load_pack(folder)
        except PackError as error:
            assert str(error)
            continue
        assert number % 4 == 2 or pack.points == load_pack(BUNDLED).points, "changed, and not noticed"
