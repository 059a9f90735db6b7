"""Settings and what they refuse; one interleaved run; tables, figures and records of it."""

import json

import pytest

from dejavu.bench import report, settings, shapes
from dejavu.bench import run as bench
from dejavu.bench.overhead import overhead_share
from dejavu.bench.run import PeerRun, measure
from dejavu.bench.settings import Setting, fixed_sets
from dejavu.config import SelectionConfig
from dejavu.engine.engine import Engine
from dejavu.errors import ConfigError
from dejavu.kernels import backend

TINY = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 500, "max_position_embeddings": 64}  # fmt: skip
SPARSE = SelectionConfig("static", 0.25, 0.5, kv="lazy", crossover=False)


@pytest.fixture
def subject(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", shapes.SHAPES["opt-125m"] | TINY)
    monkeypatch.setattr(bench, "read_bandwidth", lambda ops: 1e9)
    return settings.shape("tiny", backend("cpu"), activity=0.999)


@pytest.mark.parametrize("memory_share", [0.8, 0.0], ids=["side by side", "one at a time"])
def test_a_run_measures_densities_bytes_and_ratios(subject, monkeypatch, memory_share, tmp_path):
    monkeypatch.setattr(bench, "MEMORY_SHARE", memory_share)
    told = []
    chosen = settings.grid(("dense", "sparse"), [SPARSE], ["bf16"], [1, 2], [8])
    fields = measure(
        subject, backend("cpu"), chosen, [PeerRun("hf-eager", "bf16", 8)], new_tokens=4, repeat=2,
        progress=lambda *a: told.append(a),
    )  # fmt: skip
    assert fields["side_by_side"] == (memory_share > 0)
    rounds = 3 if memory_share else 2
    assert [done for _, done, _ in told] == list(range(rounds * 6))
    assert {total for *_, total in told} == {rounds * 6}

    dense, sparse, dense2, sparse2, eager = fields["results"].values()
    assert eager["peer"] == "hf-eager"
    assert (dense["mlp_density"], dense["attn_density"], dense["predictor_share"]) == (1, 1, 0)
    # A fixed set, of which nearly every neuron fires; two rows read the union of two sets.
    assert sparse["mlp_density"] == pytest.approx(0.25, abs=0.01)
    assert sparse["attn_density"] == 0.5
    assert 0.25 < sparse2["mlp_density"] <= 0.5
    assert sparse["bytes_per_token"]["mlp_in"] < dense["bytes_per_token"]["mlp_in"] / 3
    assert sparse["bytes_per_token"]["attention"] < 0.6 * dense["bytes_per_token"]["attention"]
    assert 0 <= sparse["predictor_share"] < 1
    assert {"attn_qkv", "attend", "attn_out", "mlp", "linear"} <= set(sparse["op_ms"])
    for r in (dense, sparse, dense2, sparse2):
        assert r["p20_ms"] <= r["p50_ms"] <= r["p80_ms"]
        assert r["prefill_p50_ms"] > 0
        assert r["tok_per_s"] == pytest.approx(r["batch"] * 1e3 / r["p50_ms"])
        assert r["bandwidth_share"] == pytest.approx(sum(r["bytes_per_token"].values()) / r["p50_ms"] * 1e3 / 1e9)
    assert dense["times_peer"] == {"HF eager bf16 B1 P8": pytest.approx(eager["p50_ms"] / dense["p50_ms"])}
    assert dense2["times_peer"] == {}
    json.dumps(fields, allow_nan=False)

    drawn = report.figures(fields, "tiny")
    assert set(drawn) == {"times", "batch", "density"} - ({"density"} if "density" not in drawn else set())
    files = report.save(drawn, tmp_path / "out")
    assert {f.name for f in files} >= {"times.png", "times.svg", "batch.png", "batch.svg"}
    assert all(f.stat().st_size > 1000 for f in files)
    assert len(report.tables(fields, subject.title)) == 4


@pytest.mark.parametrize("memory_share", [0.8, 0.0], ids=["side by side", "one at a time"])
@pytest.mark.parametrize("when", ["build", "run"])
def test_a_peer_that_dies_is_a_line_in_the_table(subject, fake_peers, monkeypatch, memory_share, when, tmp_path):
    from dataclasses import replace

    monkeypatch.setattr(bench, "MEMORY_SHARE", memory_share)
    config = subject.source.config | {"die": {when: "SIGSEGV"}}
    dying = replace(subject, source=replace(subject.source, config=config))
    saved = []
    fields = measure(dying, backend("cpu"), [Setting(prompt=4)], [PeerRun("fake", "bf16", 4)], new_tokens=2, repeat=2,
                     threads=1, save=saved.append)  # fmt: skip
    ours, theirs = fields["results"].values()
    assert theirs == {
        "peer": "fake", "weights_format": "bf16", "batch": 1, "prompt": 4, "died": "died: signal 11 (SIGSEGV)"
    }  # fmt: skip
    assert ours["p50_ms"] > 0 and ours["times_peer"] == {}
    assert [s["repeat"] for s in saved] == [1, 2] and saved[-1] == fields
    table = report.tables(fields, "tiny")[0]
    assert list(table.columns[1].cells)[1] == "died: signal 11 (SIGSEGV)"
    report.save(report.figures(fields, "tiny"), tmp_path)


def test_each_density_is_a_point_beside_the_limit(subject):
    chosen = [Setting("sparse", SelectionConfig("static", d, crossover=False), prompt=4) for d in (0.1, 0.5, 1.0)]
    fields = measure(subject, backend("cpu"), chosen, new_tokens=2, repeat=1)
    (axes,) = report.figures(fields, "tiny")["density"].axes
    times, limit = axes.lines
    assert len(times.get_xdata()) == len(limit.get_xdata()) == 3
    assert list(limit.get_ydata()) == sorted(limit.get_ydata())


def test_the_selector_of_a_subject_can_be_another(subject):
    from dataclasses import replace

    asked = []

    def mine(decoder, setting):
        asked.append(setting)
        return fixed_sets(decoder.config, decoder.ops, SelectionConfig("static", 0.5))

    setting = Setting("sparse", SPARSE, prompt=4)
    fields = measure(replace(subject, selector=mine), backend("cpu"), [setting], new_tokens=2, repeat=1)
    assert set(asked) == {setting}
    assert fields["results"][setting.name]["mlp_density"] == pytest.approx(0.5, abs=0.01)


def test_predictors_of_random_weights_keep_the_densities_and_count(subject):
    """Their bytes and time are inside; two rows have hidden states of their own, and so sets of their own."""
    chosen = settings.grid(("sparse",), [SPARSE], ["bf16"], [1, 2], [8], random_predictor=True)
    one, two = measure(subject, backend("cpu"), chosen, new_tokens=4, repeat=1)["results"].values()
    assert one["policy"] == "random predictor"
    assert one["attn_density"] == 0.5
    # Two layers, rows in int4 with a float16 scale for each 64 values: neurons (32 of 64 values and 256 of 32, each 34
    # bytes padded to 48), heads (4 of 64); biases in float32.
    assert one["bytes_per_token"]["predictor"] == 2 * (48 * (32 + 256 + 4) + 4 * (256 + 4))
    rows = [r["bytes_per_token"]["mlp_in"] for r in (one, two)]
    assert rows[0] < rows[1] < 2 * rows[0]
    assert 0 < one["predictor_share"] < 1


def test_layers_past_the_crossover_are_shown(subject, monkeypatch):
    from dataclasses import replace

    from dejavu.engine import crossover
    from dejavu.engine.crossover import Costs

    neurons_never_pay = Costs((0, 1), 2, (9, 1, 1), (1, 1))
    monkeypatch.setattr(crossover, "measure_costs", lambda *args: neurons_never_pay)
    # A single row obeys its selection whatever it costs.
    chosen = [Setting("sparse", replace(SPARSE, crossover=True), batch=batch, prompt=4) for batch in (1, 2)]
    fields = measure(subject, backend("cpu"), chosen, new_tokens=2, repeat=1)
    assert [r["whole"] for r in fields["results"].values()] == [((), ()), ((), (0, 1))]
    cells = [list(column.cells) for column in report.tables(fields, "tiny")[0].columns]
    assert cells[-1] == ["0/0", "2/0"]


def test_bad_settings_are_named(subject):
    with pytest.raises(ConfigError, match="needs a selection, whose densities"):
        Setting(random_predictor=True)
    with pytest.raises(ConfigError, match="needs a selection"):
        Setting("sparse")
    with pytest.raises(ConfigError, match="weights 'int3' are not supported; choose one of: bf16, fp32"):
        Setting(weights="int3")
    with pytest.raises(ConfigError, match="batch must be a positive integer, found 0"):
        Setting(batch=0)
    with pytest.raises(ConfigError, match="more than the model's context of 64; shorten"):
        measure(subject, backend("cpu"), [Setting(prompt=64)], new_tokens=1)
    with pytest.raises(ConfigError, match="mode 'spare' does not exist; choose one of"):
        Setting("spare", prompt=4)


def test_stopping_a_run_leaves_no_folder_of_peers(subject, monkeypatch, tmp_path):
    monkeypatch.setattr(bench.tempfile, "tempdir", str(tmp_path))

    def stop(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(subject, backend("cpu"), [Setting(prompt=4)], new_tokens=1, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_the_overhead_is_a_share_of_the_time():
    engine = Engine.load(threads=1)
    assert 0 < overhead_share(engine, [2] * 4, 8) < 1
    with pytest.raises(ConfigError, match="captured"):
        overhead_share(Engine.load(threads=1, backend="reference"), [2] * 4, 2)
