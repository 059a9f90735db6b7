"""Models with quantised weights: made while loading, saved, and loaded again."""

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

import dejavu
from dejavu.cli.main import app
from dejavu.errors import CheckpointError, ConfigError, PackError

TEXT = (
    "The old house stood on a hill above the town. In winter the road was often closed by snow, and the family that "
    "lived there kept enough wood and flour for two months. Their children went to school in the valley, and in the "
    "evening they came back with news of the people who lived along the river."
)


def loss(engine: dejavu.Engine) -> float:
    ids = engine.tokenizer.encode(TEXT)
    return torch.nn.functional.cross_entropy(engine.logits(ids)[:-1], torch.tensor(ids[1:])).item()


@pytest.fixture(scope="module")
def plain() -> float:
    return loss(dejavu.load())


@pytest.mark.parametrize(("weights", "bound"), [("int8", 0.01), ("int4", 0.06), ("int4-g32z", 0.06)])
def test_quality(plain, weights, bound):
    assert abs(loss(dejavu.load(weights=weights)) / plain - 1) < bound


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_exact_equals_dense(weights):
    exact = dejavu.load(weights=weights, quantize_embeddings=True)
    dense = exact.with_mode("dense")
    a, b = (e.generate("The old house", max_new_tokens=12, logprobs=3) for e in (exact, dense))
    assert a.token_ids == b.token_ids and a.logprobs == b.logprobs
    assert sum(a.stats.step_bytes.values()) < sum(b.stats.step_bytes.values())


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("weights", ["int8", "int4-g32z"])
def test_decode_equals_forward(tiny_checkpoint, backend, family, weights):
    engine = dejavu.load(
        tiny_checkpoint(family), weights=weights, quantize_embeddings=True, backend=backend, dtype="fp32"
    )
    ids = list(engine.generate([5, 6, 7], max_new_tokens=8, ignore_eos=True).token_ids)
    assert engine.logits([5, 6, 7, *ids])[2:-1].argmax(-1).tolist() == ids


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    out = tmp_path_factory.mktemp("saved") / "model"
    result = CliRunner().invoke(app, ["quantize", "opt-mini", str(out), "--weights", "int4", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["bytes"] > 1e6
    return out


def test_saved_folder_is_what_loading_makes(saved):
    made = dejavu.load(weights="int4")
    loaded = dejavu.load(saved)
    assert torch.equal(made.logits(TEXT), loaded.logits(TEXT))
    assert loaded.quantization == made.quantization and loaded.dtype == made.dtype
    info = CliRunner().invoke(app, ["info", str(saved), "--json"])
    plain = json.loads(CliRunner().invoke(app, ["info", "--json"]).stdout)
    facts = json.loads(info.stdout)
    assert facts["weights"] == "int4" and facts["parameters"] == plain["parameters"]
    assert sum(facts["dense_step_bytes"].values()) < sum(plain["dense_step_bytes"].values())


def test_bad_requests(saved, tmp_path):
    def error(*args):
        result = CliRunner().invoke(app, list(args))
        assert result.exit_code == 1 and result.stderr.startswith("error: ")
        return result.stderr

    assert "nothing is overwritten" in error("quantize", "opt-mini", str(saved))
    assert "no folder" in error("quantize", "opt-mini", str(tmp_path / "a" / "b"))
    assert "quantised already" in error("quantize", str(saved), str(tmp_path / "again"))
    assert "does not exist" in error("quantize", "opt-mini", str(tmp_path / "x"), "--weights", "int3")
    assert "does not exist" in error("generate", "Hello there", "--weights", "int3")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="quantised already"):
        dejavu.load(saved, weights="int8")
    with pytest.raises(ConfigError, match="1 bit"):
        dejavu.load(weights="signs")
    with pytest.raises(ConfigError, match="format for the weights"):
        dejavu.load(quantize_embeddings=True)


def test_damaged_folders(saved, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(saved, broken)
    config = json.loads((broken / "config.json").read_text())
    for key, value, message in [("schema_version", 9, "schema_version 1"), ("weights", "int9", "does not exist")]:
        changed = config | {"dejavu_quantization": config["dejavu_quantization"] | {key: value}}
        (broken / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=message):
            dejavu.load(broken)
    (broken / "config.json").write_text(json.dumps(config))
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        dejavu.load(broken)


def test_a_pack_of_the_base_goes_with_the_saved_folder_and_with_no_other(saved, tmp_path):
    sparse = dejavu.load(saved, pack="opt-mini")
    assert len(sparse.generate("The old house", max_new_tokens=4).token_ids) == 4
    other = tmp_path / "other"
    shutil.copytree(saved, other)
    config = json.loads((other / "config.json").read_text())
    config["dejavu_quantization"]["base_hash"] = "0" * 64
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(PackError, match="was made for opt-mini"):
        dejavu.load(other, pack="opt-mini")
    del config["dejavu_quantization"]["base_hash"]
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="base_hash is missing"):
        dejavu.load(other)
