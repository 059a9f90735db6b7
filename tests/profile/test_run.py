"""The whole job on tiny models: numbers, files, resuming, bad input."""

import json
import re

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import dejavu
from dejavu.cli.main import app
from dejavu.errors import ConfigError
from dejavu.kernels.quantized import dequantized
from dejavu.model.hooks import Hooks
from dejavu.profile import quality, run
from dejavu.profile.attention import AttentionMaps
from dejavu.profile.explain import explain
from dejavu.profile.figures import FIGURES
from dejavu.profile.page import write_page
from dejavu.profile.settings import ProfileConfig
from dejavu.profile.windows import windows
from dejavu.text import documents

SENTENCE = "word1 word2 word3 word4 word5 word6 word7 word8"
SETTINGS = {"tokens": 320, "window": 32, "run": 8, "quality_tokens": 64, "densities": (0.2, 0.5), "sentence": SENTENCE}


@pytest.fixture
def profile(text, tmp_path):
    """`profile(engine, out="out", ...)`: the result, in a folder of tmp_path."""

    def call(engine, out="out", *, sources=None, checkpoint_hash="h", overwrite=False, progress=None, **changes):
        return run.profile(
            engine,
            sources or [text],
            tmp_path / out,
            ProfileConfig(**SETTINGS | changes),
            name="tiny",
            checkpoint_hash=checkpoint_hash,
            overwrite=overwrite,
            progress=progress or (lambda *_: None),
        )

    return call


@pytest.fixture
def undrawn(monkeypatch):
    """Figures take most of a profile's time: for tests of the rest."""
    monkeypatch.setattr("dejavu.profile.page.write_page", lambda result, out: None)


def load(folder):
    return dejavu.load(folder, mode="dense", dtype="fp32", backend="cpu")


# Figures depend on the result alone: a model with zeros, and one without, show them all.
@pytest.mark.parametrize("model_type, overrides", [("opt", {}), ("llama", {"hidden_act": "silu"})])
def test_every_figure_is_drawn(model, profile, tmp_path, model_type, overrides):
    result = profile(load(model(model_type, **overrides)))
    out = tmp_path / "out"
    assert json.loads((out / "profile.json").read_text()) == result
    for name in FIGURES:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (out / f"{name}.svg").read_bytes()


CASES = [("opt", {}), ("opt", {"do_layer_norm_before": False}), ("llama", {}), ("llama", {"hidden_act": "silu"})]


@pytest.mark.parametrize("model_type, overrides", CASES)
def test_every_model_gets_every_number(model, profile, undrawn, model_type, overrides):
    result = profile(load(model(model_type, **overrides)))
    assert (result["firing"] is None) == (overrides.get("hidden_act") == "silu")
    for part in ("mlp", "heads"):
        by_error = dict(zip(result["errors"], result["oracle"][part], strict=True))
        for layer in range(2):
            assert 0 < by_error[0.2][layer] <= by_error[0.1][layer] <= by_error[0.05][layer] <= 1
    if result["firing"]:
        # What is zero is never needed; the runs are a sample of the tokens, so this is no law for the means.
        assert result["oracle"]["mlp"][1][0] <= result["firing"]["density"][0] * 1.2
    assert result["text"]["watched_tokens"] == 320
    curves = [curve for part in ("mlp", "heads") for curve in result["quality"][part].values()]
    assert all(curve[-1] == [1.0, result["quality"]["dense"]] for curve in curves)


def test_the_page_needs_nothing_else(model, profile, tmp_path):
    result = profile(load(model()), sentence="<unk> <b>& word1 word2 word3 word4")
    page = (tmp_path / "out" / "profile.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page) and "<script" not in page and "<b>" not in page
    assert page.count("<img") == page.count("data:image/svg+xml;base64,") == len(FIGURES)
    for paragraph in re.findall("<p>(.*?)</p>", page):
        assert len(re.findall(r"\.(?: |$)", paragraph)) == 2
    assert f"Dense perplexity is {result['quality']['dense']:.2f}" in page


def test_densities_against_a_plain_pass(model, text, profile, undrawn):
    engine = load(model())
    result = profile(engine)

    class Watch(Hooks):
        def __init__(self):
            self.active, self.blocks = [[], []], [[], []]

        def neurons(self, layer, y, h):
            self.active[layer].append((h[1:] != 0).double())
            return h

        def block(self, layer, block, x, f):
            if block == "mlp":
                self.blocks[layer].append((f[1:].norm(dim=1) / x[1:].norm(dim=1)).double())

    watch, cut = Watch(), windows(documents([text]), engine.tokenizer.encode, 32, engine.tokenizer.bos_id)
    for ids in list(cut)[2:12]:
        engine.decoder.prefill(torch.tensor(ids), engine.decoder.new_cache(1, 32), hooks=watch)
    for layer in range(2):
        active = torch.stack(watch.active[layer])
        assert result["firing"]["density"][layer] == pytest.approx(active.mean().item(), rel=1e-4)
        shared = (active[:, 1:] * active[:, :-1]).sum() / active[:, 1:].sum()
        assert result["firing"]["overlap"][layer] == pytest.approx(shared.item(), rel=1e-4)
        ratio = torch.cat(watch.blocks[layer]).mean().item()
        assert result["states"]["mlp"]["ratio"][layer] == pytest.approx(ratio, rel=1e-4)


@pytest.mark.parametrize("model_type, overrides", [("opt", {}), ("llama", {}), ("mistral", {"sliding_window": 4})])
def test_attention_maps_give_the_heads_outputs(model_type, overrides, model):
    """A map times the values is what enters the output projection."""
    if model_type == "mistral":
        folder = model("llama")
        config = json.loads((folder / "config.json").read_text()) | {"model_type": "mistral"} | overrides
        (folder / "config.json").write_text(json.dumps(config))
    else:
        folder = model(model_type, **overrides)
    decoder = load(folder).decoder
    ids, cache = torch.arange(3, 15), decoder.new_cache(1, 12)

    class Check(AttentionMaps):
        def heads(self, layer, y, o):
            super().heads(layer, y, o)
            values = cache.v[layer][0, :, :12].float().repeat_interleave(decoder.config.heads_per_group, 0)
            torch.testing.assert_close((self.maps[layer] @ values).transpose(0, 1), o, atol=1e-4, rtol=1e-4)
            return o

    decoder.prefill(ids, cache, hooks=Check(decoder, cache, 12))


def test_perplexity_of_everything_selected_is_dense(model):
    decoder = load(model()).decoder
    held = [[0, *range(10, 40)], [0, *range(30, 60)]]
    importance = [(torch.rand(3), torch.rand(50)) for _ in range(2)]
    dense = quality.measure(quality.Point(), decoder, held, importance, 0)
    full = quality.measure(quality.Point("mlp", "oracle", 49), decoder, held, importance, 0)
    less = quality.measure(quality.Point("mlp", "random", 5), decoder, held, importance, 0)
    assert full == pytest.approx(dense, rel=1e-5) and less != pytest.approx(dense, rel=1e-5)


@pytest.mark.parametrize("stop", [("text", 9 * 32), ("perplexity", 3)])
def test_a_stopped_run_goes_on_to_the_same_result(model, profile, tmp_path, monkeypatch, undrawn, stop):
    engine = load(model())
    whole = profile(engine, "whole")

    def interrupt(stage, done, total):
        if (stage, done) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile(engine, progress=interrupt)
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["state.npz"]
    worked = []
    prefill, measure = engine.decoder.prefill, quality.measure
    monkeypatch.setattr(engine.decoder, "prefill", lambda *a, **k: worked.append(a) or prefill(*a, **k))
    monkeypatch.setattr(quality, "measure", lambda *a: worked.append(a) or measure(*a))
    resumed = profile(engine)
    # Of 10 windows 8 were saved, of the perplexities 3; a sentence is always read.
    points = len(quality.points(ProfileConfig(**SETTINGS), engine.config))
    windows_left, points_left = (2, points) if stop[0] == "text" else (0, points - 3)
    assert len(worked) == 1 + windows_left + points_left * 3
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}


def test_a_folder_with_something_else_is_refused(model, profile, text, tmp_path, undrawn):
    engine = load(model())
    profile(engine)
    before = (tmp_path / "out" / "profile.json").read_bytes()
    other = tmp_path / "other.txt"
    other.write_text("word9 " * 800)
    for message, changes in (
        ("another checkpoint_hash", {"checkpoint_hash": "g"}),
        ("another tokens", {"tokens": 640}),
        ("another errors", {"errors": (0.1,)}),
        ("the text is not the one", {"sources": [str(other)]}),
    ):
        with pytest.raises(ConfigError, match=message):
            profile(engine, **changes)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("keep")
    with pytest.raises(ConfigError, match="no profile"):
        profile(engine, "mine")
    assert (tmp_path / "out" / "profile.json").read_bytes() == before
    assert profile(engine, overwrite=True, errors=(0.3,))["errors"] == [0.3]
    profile(engine, "mine", overwrite=True)
    assert (tmp_path / "mine" / "notes").read_text() == "keep"


def test_a_damaged_state_is_named(model, profile, tmp_path, undrawn):
    engine = load(model())
    profile(engine)
    state = tmp_path / "out" / "state.npz"
    whole = state.read_bytes()
    for damaged in (b"", b"junk", whole[: len(whole) // 2]):
        state.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"state\.npz: damaged"):
            profile(engine)
    np.savez(state, header=np.array({"a": 1}, dtype=object))  # would be unpickled by a careless reader
    with pytest.raises(ConfigError, match=r"state\.npz: damaged"):
        profile(engine)


def test_bad_input_is_one_clear_error(model, profile, tmp_path):
    engine = load(model())
    (tmp_path / "short.txt").write_text("word1 word2")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "file").write_text("")
    for message, call in (
        ("cannot be read", {"sources": [str(tmp_path / "missing.txt")]}),
        ("holds no text", {"sources": [str(tmp_path / "empty.txt")]}),
        ("96 are needed", {"sources": [str(tmp_path / "short.txt")]}),
        ("cannot be written", {"out": "file"}),
        ("cannot be written", {"out": "file/below"}),
        ("window must be at most 64", {"window": 128, "quality_tokens": 0}),
        ("sentence must have 6 to 64 tokens, found 1", {"sentence": "word1"}),
    ):
        with pytest.raises(ConfigError, match=message):
            profile(engine, **{"out": f"new-{message}", **call})


@pytest.mark.parametrize(
    "message, wrong",
    [
        ("tokens must be an integer of at least one window", {"tokens": 100}),
        ("window must be", {"window": 4}),
        ("quality_tokens must be 0 or", {"quality_tokens": 100}),
        ("errors must be", {"errors": (0.0,)}),
        ("errors must be", {"errors": ()}),
        ("densities must differ", {"densities": (0.5, 0.5)}),
        ("sentence is empty", {"sentence": " "}),
    ],
)
def test_settings_are_checked(message, wrong):
    with pytest.raises(ConfigError, match=message):
        ProfileConfig(**wrong)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_quantised_folder_is_profiled_as_its_weights_are(model, profile, undrawn, tmp_path, weights):
    plain = model("llama", hidden_size=96, num_hidden_layers=1)
    runner = CliRunner()
    assert runner.invoke(app, ["quantize", str(plain), str(tmp_path / "q"), "--weights", weights]).exit_code == 0
    engine = load(tmp_path / "q")
    assert engine.quantization is not None
    result = profile(engine)
    # The same numbers as those of a plain model that has the quantised weights' values.
    for layer in engine.decoder.weights.layers:
        for block, name in ((layer.attn, "blocks"), (layer.mlp, "rows")):
            object.__setattr__(block, name, dequantized(getattr(block, name)))
    expected = profile(engine, out="plain")
    for key in ("oracle", "firing", "mlp_sets", "states", "attention", "quality"):
        assert close(result[key], expected[key]), key


def close(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == b if not isinstance(a, float) else a == pytest.approx(b, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "model_type, overrides", [("opt", {"num_attention_heads": 1}), ("llama", {"hidden_act": "silu"})]
)
def test_a_model_of_one_layer_has_a_page(model, profile, tmp_path, model_type, overrides):
    profile(load(model(model_type, num_hidden_layers=1, **overrides)))
    page = (tmp_path / "out" / "profile.html").read_text()
    assert 'id="oracle_density"' in page and 'id="similarity"' not in page


def test_perplexities_beyond_numbers_are_told(model, profile, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "_loss", lambda decoder, ids, selector: 1e6 * len(ids))
    result = profile(load(model()))
    assert result["quality"]["dense"] is None
    assert 'id="quality"' not in (tmp_path / "out" / "profile.html").read_text()
    calls = iter([1.0, *[1e6] * 999])
    monkeypatch.setattr(quality, "_loss", lambda decoder, ids, selector: next(calls) * len(ids))
    assert profile(load(model()), quality_tokens=32, overwrite=True)["quality"]["dense"] == pytest.approx(2.8, abs=0.1)
    assert "the oracle has inf" in (tmp_path / "out" / "profile.html").read_text()


def test_a_profile_of_unknown_numbers_has_its_page(model, profile, tmp_path):
    """Norms of a stream of zeros, say, of which ratios are none."""
    result = profile(load(model()), tokens=64, quality_tokens=0)

    def unknown(value):
        if isinstance(value, dict):
            return {key: unknown(v) for key, v in value.items()}
        return [unknown(v) for v in value] if isinstance(value, list) else None

    parts = ("firing", "mlp_sets", "head_sets")
    sizes = {part: {"batch_sizes": result[part]["batch_sizes"]} for part in parts}
    nothing = {part: unknown(result[part]) | sizes.get(part, {}) for part in (*parts, "states", "oracle")}
    write_page(result | nothing, tmp_path / "out")
    page = re.sub('src="[^"]*"', "", (tmp_path / "out/profile.html").read_text())
    assert page.count("unknown") > 10 and not re.search(r"\bnan\b|None", page)

    result["states"]["mlp"]["ratio"][0] = None
    assert "unknown" not in explain("norms", result)
