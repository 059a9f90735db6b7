"""From a model and text to a pack: what is collected, what a pack does in the step, and that nothing is lost."""

import errno
import itertools
import json
import multiprocessing
import os
import shutil
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dejavu
from dejavu.config import SelectionConfig
from dejavu.engine.step import DecodeStep
from dejavu.errors import CapacityError, ConfigError, PackError
from dejavu.kernels import backend, reference
from dejavu.model.hooks import TokenMasks
from dejavu.predictor.collect import Collected, _Recorder, collect, most_of_the_norm
from dejavu.predictor.fit import fit, needs, tune
from dejavu.predictor.settings import FitConfig
from dejavu.selection.block import HEADS, NEURONS, Block
from dejavu.selection.manifest import digest
from dejavu.selection.oracle import OutputNorms
from dejavu.selection.pack import Pack, load_pack
from dejavu.selection.predictor import Lookahead, Predictor, PredictorSelector
from dejavu.selection.selector import Cut

SMALL = FitConfig(tokens=512, window=64, calibration_tokens=256, rank=16, epochs=1, limit=0.2)
# Public-domain sentences of our own making would all look alike; numbers make every window differ.
TEXT = [
    " ".join(
        f"In the year {1000 + 7 * i * j} the river rose by {i + j} feet and the mill stood still." for j in range(9)
    )
    for i in range(60)
]


@pytest.fixture(scope="module")
def engine():
    return dejavu.load("opt-mini", mode="dense")


@pytest.fixture(scope="module")
def pack_folder(engine, tmp_path_factory):
    out = tmp_path_factory.mktemp("fit") / "pack"
    fit(engine, TEXT, out, SMALL)
    return out


def test_what_is_collected_is_what_the_model_does(engine, tmp_path):
    decoder, c = engine.decoder, engine.config
    windows = [engine.tokenizer.encode(text)[:64] for text in TEXT[:3]]
    collect(decoder, iter(windows), 3, tmp_path)
    got = Collected(tmp_path, c.hidden_size, c.num_attention_heads, c.intermediate_size)
    assert got.tokens == 3 * 64
    y = got.inputs(Block(3, NEURONS), slice(64, 128))
    norms = OutputNorms(decoder.weights.layers[3]).neurons(decoder.blocks.activations(y, decoder.weights.layers[3].mlp))
    stored = got.neurons(3)(slice(64, 128))
    # Inputs are stored in bf16 and norms in fp16.
    torch.testing.assert_close(stored, norms, rtol=0.02, atol=0.02 * norms.max().item())
    assert (got.heads(0, slice(0, 10)) > 0).all()


def test_collecting_goes_on_where_it_was_stopped(engine, tmp_path):
    windows = [engine.tokenizer.encode(text)[:32] for text in TEXT[:4]]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    collect(engine.decoder, iter(windows), 4, whole)
    collect(engine.decoder, iter(windows), 2, parts)
    with open(parts / "norms0.f16", "ab") as file:
        file.write(b"torn")  # a window that was being written when the process died
    collect(engine.decoder, iter(windows), 4, parts)
    for path in whole.iterdir():
        assert path.read_bytes() == (parts / path.name).read_bytes(), path.name


def test_the_fewest_units_that_hold_the_norm():
    norms = torch.tensor([[3.0, 4.0, 0.0, 0.1], [1.0, 1.0, 1.0, 1.0]])
    keep = most_of_the_norm(norms, 0.1)
    assert keep.tolist()[0] == [True, True, False, False]
    assert keep[1].all()  # leaving one out would lose half of the norm
    assert most_of_the_norm(norms, 0.6)[1].sum() == 3


def test_cuts_agree_with_the_selecting_ops():
    scores = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # with ties
    for cut in (Cut(7), Cut(50), Cut(7, 0.3), Cut(3, -5.0), Cut(50, 9.0)):
        mask = cut.mask(scores)
        for row in range(6):
            idx, count = cut.select(reference, scores[row : row + 1])
            assert mask[row].nonzero().flatten().tolist() == idx[: int(count)].tolist()


@pytest.mark.parametrize("ahead", [(0, 0), (1, 1), (3, 2)])
def test_predictors_read_the_block_that_lookahead_names(ahead):
    look = Lookahead(*ahead)
    blocks = Block.all(2)
    assert [look.source(b).number for b in blocks] == [max(0, b.number - ahead[b.part]) for b in blocks]
    seen = []

    class Spy(Predictor):
        def scores(self, ops, y):
            seen.append(int(y[0, 0]))
            return torch.zeros(1, 4)

    config = type("C", (), {"num_hidden_layers": 2})
    spies = {b: Spy(None, torch.zeros(4, 1), torch.zeros(4)) for b in blocks}
    selector = PredictorSelector(spies, look, [(Cut(2), Cut(2))] * 2, config, backend("reference"))
    for block in blocks:
        y = torch.full((1, 1), float(block.number))
        select = selector.heads(block.layer, y, None) if block.part == HEADS else selector.neurons(block.layer, y)
        assert int(select[1]) == 2
    assert sorted(seen) == sorted(look.source(b).number for b in blocks)


def test_a_pack_in_the_step_equals_its_masks(engine, pack_folder):
    """Calibration judges masks; generation runs steps. They must be the same thing."""
    pack, decoder = load_pack(pack_folder), engine.decoder
    ids = engine.tokenizer.encode(TEXT[7])[:48]
    quality = sorted(p.measured["ppl_increase"] for p in pack.points)[len(pack.points) // 2]
    for pending in (None, 4):
        selector = pack.selector(engine.config, decoder.ops, quality)
        step = DecodeStep(decoder, decoder.new_cache(1, 64, pending), 1, "sparse", selector)
        decoder.prefill(torch.tensor(ids[:8]), step.cache)
        out = [step.run([token], [0])[0].clone() for token in ids[8:]]
        masks = TokenMasks(pack.selector(engine.config, decoder.ops, quality), dense_prefix=8)
        together = decoder.prefill(torch.tensor(ids), decoder.new_cache(1, 64), all_logits=True, hooks=masks)[8:]
        # Attention over a bf16 cache is not computed alike, so scores near a threshold may fall on either side.
        assert (torch.stack(out).argmax(1) == together.argmax(1)).float().mean() > 0.9
        read, kept = step.counts.rows_read[:, 0].float(), masks.kept[:, 1].float()
        assert ((read - kept).abs() <= 0.02 * kept + 20).all()
        assert (step.counts.rows_read[:, 0] < 2048 * len(out)).any()
        assert selector.nbytes > 0


def test_a_batch_reads_at_least_what_each_row_would(engine, pack_folder):
    sparse = engine.with_mode("sparse", SelectionConfig("predictor", pack=str(pack_folder), kv="lazy"))
    alone = sparse.generate(TEXT[0][:60], max_new_tokens=12)
    both = sparse.generate([TEXT[0][:60], TEXT[9][:70]], max_new_tokens=12)
    assert len(both[0].token_ids) == 12
    assert both[0].stats.step_bytes["mlp_in"] >= 0.9 * alone.stats.step_bytes["mlp_in"]
    assert alone.stats.step_bytes["predictor"] > 0


def test_the_same_settings_make_the_same_pack(engine, pack_folder, tmp_path):
    for stage in ("collect", "train", None):
        fit(engine, TEXT, tmp_path / "pack", SMALL, stage=stage)
    assert same_pack(pack_folder, tmp_path / "pack")
    assert not (tmp_path / "pack.work").exists()


def same_pack(a: Path, b: Path) -> bool:
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in ("pack.json", "predictors.safetensors"))


# What the process runs that is killed; its stages are reported through a pipe.
FIT = """
import dejavu
from dejavu.predictor.fit import fit
from dejavu.predictor.settings import FitConfig
config = FitConfig(tokens=512, window=32, calibration_tokens=128, rank=16, epochs=2, limit=5.0)
engine = dejavu.load(model, mode="dense", threads=1)
fit(engine, text, out, config, progress=lambda stage, done, total: pipe.send((stage, done)))
"""


def test_killed_at_ten_random_points_it_ends_with_the_same_pack(make_checkpoint, tmp_path):
    model = make_checkpoint("opt", vocab_size=16384)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(dejavu.__file__).parent / "assets/opt-mini" / name, model)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dejavu", "dejavu.predictor.fit"])

    def start(out: Path) -> tuple[multiprocessing.Process, Connection]:
        ours, theirs = context.Pipe(duplex=False)
        names = {"model": str(model), "text": TEXT, "out": str(out), "pipe": theirs}
        process = context.Process(target=exec, args=(FIT, names))
        process.start()
        theirs.close()
        return process, ours

    def reports(pipe: Connection):
        with suppress(EOFError):
            while True:
                yield pipe.recv()

    process, pipe = start(tmp_path / "whole")
    points = list(reports(pipe))
    process.join()
    assert {stage for stage, _ in points} == {"collect", "train", "calibrate"}
    random, killed = Random(0), 0
    for point in [*sorted(random.sample(range(len(points) - 1), 10)), len(points)]:
        process, pipe = start(tmp_path / "pack")
        for report in reports(pipe):
            if points.index(report) >= point:
                time.sleep(random.uniform(0, 0.02))  # anywhere after the report, and before or after the next one
                process.kill()
                killed += 1
                break
        process.join()
    assert killed == 10
    assert same_pack(tmp_path / "whole", tmp_path / "pack")


DAMAGES = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "other": lambda data: b"\x93junk{",
    "object": lambda data: b"{}",
    "longer": lambda data: data + b"\0\1\2",
    "gone": lambda data: None,
}


def test_damaged_work_is_one_clear_line_or_the_same_pack(make_checkpoint, tmp_path, monkeypatch):
    model = make_checkpoint("opt", vocab_size=16384)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(dejavu.__file__).parent / "assets/opt-mini" / name, model)
    engine = dejavu.load(model, mode="dense", threads=1)
    config = FitConfig(tokens=256, window=32, calibration_tokens=128, rank=16, epochs=1, limit=5.0)
    with monkeypatch.context() as patch:  # it ends when all is done but the pack
        patch.setattr(Pack, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fit(engine, TEXT, tmp_path / "pack", config)
    work, whole = tmp_path / "pack.work", tmp_path / "whole"
    shutil.copytree(work, whole)
    fit(engine, TEXT, tmp_path / "pack", config)
    (tmp_path / "pack").rename(tmp_path / "expected")
    files = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file()]
    assert len(files) > 10
    refused = set()
    for file, (kind, damage) in itertools.product(files, DAMAGES.items()):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(whole, work)
        (work / file).unlink()
        if (data := damage((whole / file).read_bytes())) is not None:
            (work / file).write_bytes(data)
        try:
            fit(engine, TEXT, tmp_path / "pack", config)
        except ConfigError as error:
            assert "pack.work" in str(error) and "\n" not in str(error), (file, kind)
            refused.add((file.name, kind))
        else:
            assert same_pack(tmp_path / "expected", tmp_path / "pack"), (file, kind)
            shutil.rmtree(tmp_path / "pack")
    for name in ("settings.json", "windows.npy", "calibrated.json", "layer0.safetensors", "norms0.f16", "state.json"):
        assert {(name, "empty"), (name, "half"), (name, "other"), (name, "object")} <= refused
    assert ("norms0.f16", "longer") not in refused, "what a kill left beyond the last state is cut off"


def test_packs_are_checked(engine, pack_folder, tmp_path, make_checkpoint):
    def broken(change):
        folder = tmp_path / f"broken{len(os.listdir(tmp_path))}"
        shutil.copytree(pack_folder, folder)
        change(folder)
        return str(folder)

    def edit(**fields):
        def change(folder):
            data = json.loads((folder / "pack.json").read_text())
            data |= fields
            data["sha256"] = digest(data, folder / "predictors.safetensors")
            (folder / "pack.json").write_text(json.dumps(data))

        return change

    rows = json.loads((pack_folder / "pack.json").read_text())["rows"]
    cut = (pack_folder / "predictors.safetensors").read_bytes()[:5000]
    for change, message in [
        (edit(schema=9), "schema must be 3, or 2 of an older pack, found 9"),
        (edit(rows=rows | {"1.up": {"format": "int4", "width": 500}}), "not made of rows of int4"),
        (edit(rows={"1.up": {"format": "int3", "width": 16}}), "must be a format of rows"),
        (edit(points=[{}]), "lacks cuts"),
        (edit(default=99), "default must be an integer in"),
        (edit(base={"name": "other", "hash": "0" * 64}), "was made for other with hash 000000000000"),
        (lambda f: (f / "predictors.safetensors").unlink(), "missing or damaged"),
        (lambda f: (f / "predictors.safetensors").write_bytes(cut), "is damaged, or was edited"),
        (lambda f: (f / "pack.json").unlink(), "pack.json: cannot be read"),
    ]:
        with pytest.raises(PackError, match=message):
            dejavu.load("opt-mini", pack=broken(change))
    with pytest.raises(PackError, match="no such folder"):
        dejavu.load("opt-mini", pack="./nowhere")
    with pytest.raises(ConfigError, match="no point of this pack keeps perplexity within"):
        load_pack(pack_folder).point(-1.0)
    with pytest.raises(ConfigError, match="name a pack"):
        dejavu.load("opt-mini", quality=0.01)
    with pytest.raises(ConfigError, match="policy predictor needs a pack"):
        SelectionConfig("predictor")


def test_tune_moves_the_default(pack_folder, tmp_path):
    pack = load_pack(pack_folder)
    wide = max(p.measured["ppl_increase"] for p in pack.points)
    tuned = tune(pack_folder, tmp_path / "fast", wide)
    again = load_pack(tmp_path / "fast")
    assert again.default == tuned.default
    assert again.point().measured["bytes"] == min(p.measured["bytes"] for p in pack.points)
    with pytest.raises(ConfigError, match="is there already"):
        tune(pack_folder, tmp_path / "fast", wide)


def test_a_bound_that_cannot_be_kept_writes_nothing(engine, tmp_path):
    config = FitConfig(
        tokens=512, window=64, calibration_tokens=256, rank=16, epochs=1, bound="mlp_density", limit=1e-9
    )
    with pytest.raises(PackError, match="no setting keeps mlp_density within 1e-09: the best reaches"):
        fit(engine, TEXT, tmp_path / "pack", config)
    assert not (tmp_path / "pack").exists()
    with pytest.raises(ConfigError, match="holds the work of a fit with other settings"):
        fit(engine, TEXT, tmp_path / "pack", SMALL)


def test_bad_settings_and_text_are_named(engine, tmp_path):
    for settings, message in [
        ({"tokens": 10, "window": 64}, "tokens must be at least four windows"),
        ({"rank": -1}, "rank must be an integer of at least 0"),
        ({"bound": "bleu"}, "bound must be ppl_increase, kl or mlp_density"),
        ({"limit": 0.0}, "limit must be a number above 0"),
        ({"label_error": 1.0}, r"label_error must be in \[0, 1\)"),
    ]:
        with pytest.raises(ConfigError, match=message):
            FitConfig(**settings)
    with pytest.raises(ConfigError, match="the text is too short"):
        fit(engine, TEXT[:2], tmp_path / "pack", SMALL)
    assert not (tmp_path / "pack.work").exists()
    assert needs(engine, SMALL)["disk"] > 0
    with pytest.raises(ConfigError, match="weights must be a format that keeps sizes"):
        FitConfig(weights="signs")
    with pytest.raises(ConfigError, match="weights format 'int3' does not exist"):
        FitConfig(weights="int3")


def test_a_full_disk_is_named_and_the_work_goes_on(engine, pack_folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
        with pytest.raises(CapacityError, match="MB of disk, 1 MB are free"):
            fit(engine, TEXT, tmp_path / "pack", SMALL)
    assert not list(tmp_path.iterdir())

    def full(self) -> None:
        if self.flushed == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.flushed += 1
        flush(self)

    flush, _Recorder.flushed = _Recorder.flush, 0
    with monkeypatch.context() as patch:
        patch.setattr(_Recorder, "flush", full)
        with pytest.raises(ConfigError, match=r"No space left on device.*free some"):
            fit(engine, TEXT, tmp_path / "pack", SMALL)
    assert not (tmp_path / "pack").exists()
    fit(engine, TEXT, tmp_path / "pack", SMALL)
    assert same_pack(pack_folder, tmp_path / "pack")


def test_an_activation_that_is_never_zero_needs_an_error_bound(make_checkpoint, tmp_path):
    folder = make_checkpoint("llama", hidden_act="silu")
    shutil.copy(Path(dejavu.__file__).parent / "assets/opt-mini/tokenizer.json", folder)
    engine = dejavu.load(folder, mode="dense")
    with pytest.raises(ConfigError, match="silu is never zero, so every neuron is active: give a label error"):
        fit(engine, TEXT, tmp_path / "pack", SMALL)
    assert not (tmp_path / "pack.work").exists()


def test_a_density_bound_takes_the_most_faithful_setting_within(engine, tmp_path):
    config = FitConfig(**{**vars(SMALL), "bound": "mlp_density", "limit": 0.3})
    pack = fit(engine, TEXT, tmp_path / "pack", config)
    at = pack.points[pack.default].measured
    assert at["mlp_density"] <= 0.3
    better = [p.measured for p in pack.points if p.measured["kl"] < at["kl"]]
    assert all(m["mlp_density"] > 0.3 or m["mlp_density"] > at["mlp_density"] for m in better)


def test_the_bundled_pack_reads_less_and_says_how_good_it_is(engine):
    sparse = engine.with_mode("sparse", SelectionConfig("predictor", pack="opt-mini", kv="lazy"))
    dense = engine.generate(TEXT[3][:80], max_new_tokens=16).stats
    stats = sparse.generate(TEXT[3][:80], max_new_tokens=16).stats
    assert sum(stats.step_bytes.values()) < 0.7 * sum(dense.step_bytes.values())
    pack = load_pack("opt-mini")
    assert pack.made["checked"]["ppl_increase"] <= 0.01


def test_an_untrained_pack_of_a_gated_model(make_checkpoint, tmp_path):
    """Grouped heads, a gated MLP, an activation that is never zero, predictors in closed form."""
    folder = make_checkpoint(
        "llama", hidden_act="silu", hidden_size=48, intermediate_size=64, max_position_embeddings=64
    )
    shutil.copy(Path(dejavu.__file__).parent / "assets/opt-mini/tokenizer.json", folder)
    engine = dejavu.load(folder, mode="dense")
    config = FitConfig(tokens=256, window=32, calibration_tokens=128, train=False, rank=16, label_error=0.2, limit=5.0)
    ids = np.random.default_rng(0).integers(0, 101, (64, 32)).tolist()

    class Tokens:
        def encode(self, text):
            return ids[int(text)]

    engine.tokenizer = Tokens()
    pack = fit(engine, map(str, range(64)), tmp_path / "pack", config)
    assert pack.points[pack.default].measured["ppl_increase"] <= 5.0
    assert load_pack(tmp_path / "pack").made["settings"]["train"] is False
