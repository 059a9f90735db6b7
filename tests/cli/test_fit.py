"""`dejavu fit`, `tune`, `push`, and packs in `info` and `generate`, in process on the bundled model."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dejavu.cli.main import app
from dejavu.selection.pack import load_pack

SMALL = ["--tokens", "512", "--calibration-tokens", "256", "--window", "64", "--rank", "16", "--epochs", "1"]
SMALL += ["--threads", "1"]
TEXT = "\n<|endoftext|>\n".join(
    " ".join(f"In the year {1000 + 7 * i * j} the river rose by {i + j} feet and the mill stood." for j in range(9))
    for i in range(60)
)


def run(*args: str):
    return CliRunner().invoke(app, list(args))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return str(file)


@pytest.fixture(scope="module")
def pack(text, tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("packs") / "pack"
    made = run("fit", "opt-mini", "--text", text, "-o", str(out), *SMALL, "--max-ppl-increase", "20%")
    assert made.exit_code == 0, made.output
    assert "fit needs up to" in made.stderr and "default" in made.stdout
    return str(out)


def test_fit_writes_a_pack_with_its_figure(pack, tmp_path):
    names = {f.name for f in Path(pack).iterdir()}
    assert names == {"pack.json", "predictors.safetensors", "frontier.png", "frontier.svg"}
    shown = run("info", pack)
    assert shown.exit_code == 0 and "for opt-mini" in shown.stdout
    facts = json.loads(run("info", pack, "--json").stdout)
    assert facts["points"][facts["default"]]["ppl_increase"] <= 0.2 and facts["predictor_bytes"] > 0


def test_stages_end_early_and_go_on(text, tmp_path):
    out = tmp_path / "pack"
    args = ["fit", "opt-mini", "--text", text, "-o", str(out), *SMALL, "--max-ppl-increase", "20%"]
    assert run(*args, "--stage", "collect").exit_code == 0 and not out.exists()
    assert run(*args, "--stage", "train").exit_code == 0 and not out.exists()
    assert run(*args, "--json").exit_code == 0 and load_pack(out).predictors


def test_tune_and_generate_move_along_the_frontier(pack, tmp_path):
    every = [point.measured for point in load_pack(pack).points]
    bound = max(m["ppl_increase"] for m in every)
    made = run("tune", pack, "--max-ppl-increase", str(bound), "-o", str(tmp_path / "tuned"), "--json")
    facts = json.loads(made.stdout)
    assert facts["points"][facts["default"]]["bytes"] == min(m["bytes"] for m in every)
    read = {}
    for name in (pack, str(tmp_path / "tuned")):
        made = run("generate", "opt-mini", "The old house", "--pack", name, "-n", "12", "--json")
        assert made.exit_code == 0, made.output
        read[name] = sum(json.loads(made.stdout)["stats"]["step_bytes"].values())
    assert read[str(tmp_path / "tuned")] < read[pack]


def test_push_uploads_the_packs_own_files(pack, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repo, **settings):
            calls.append((repo, settings))

        def upload_folder(self, **settings):
            calls.append(settings)
            return "https://example.org/someone/pack"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    made = run("push", pack, "someone/pack", "--private")
    assert made.stdout == "https://example.org/someone/pack\n"
    assert calls[0] == ("someone/pack", {"exist_ok": True, "private": True})
    assert calls[1]["folder_path"] == pack and "predictors.safetensors" in calls[1]["allow_patterns"]


def test_bad_input_is_one_line_and_nothing_is_written(pack, text, tmp_path):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("\n")
    binary.write_bytes(b"\x80\x81" * 100)
    out = str(tmp_path / "new")
    for args, message in (
        (("fit", "opt-mini", "--text", str(empty), "-o", out, *SMALL), "holds no text"),
        (("fit", "opt-mini", "--text", str(binary), "-o", out, *SMALL), "expected UTF-8"),
        (("fit", "opt-mini", "--text", text, "-o", out, "--tokens", "4096"), "the text is too short"),
        (("fit", "opt-mini", "--text", text, "-o", pack, *SMALL), "is there already"),
        (("fit", "opt-mini", "--text", text, "-o", out, "--stage", "dream"), "stage 'dream'"),
        (("fit", "opt-mini", "--text", text, "-o", out, "--rank", "big"), "rank must be auto"),
        (("fit", "opt-mini", "--text", text, "-o", out, "--max-kl", "1", "--target-density", "0.1"), "one bound"),
        (("tune", pack, "--max-ppl-increase", "-50%", "-o", out), "no point of this pack"),
        (("push", str(tmp_path), "someone/pack"), "cannot be read"),
        (("generate", "opt-mini", "Hello", "--pack", str(tmp_path)), "cannot be read"),
        (("generate", "opt-mini", "Hello", "--quality", "1%"), "name a pack"),
    ):
        made = run(*args)
        assert made.exit_code == 1 and message in made.stderr, (args, made.output)
    assert not (tmp_path / "new").exists()
