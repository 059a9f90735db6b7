"""Windows, settings, task files and statistics."""

import json
import math
import random

import pytest
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dejavu.config import SelectionConfig
from dejavu.engine.scoring import Scorer
from dejavu.errors import ConfigError, DejavuError
from dejavu.evaluate import report, stats
from dejavu.evaluate.perplexity import text_task, windows
from dejavu.evaluate.run import Evaluation
from dejavu.evaluate.settings import Setting, parse_setting
from dejavu.evaluate.tasks import FORMATS, local_names, read_local, resolve


@pytest.mark.parametrize(
    "length, window, stride", [(2, 8, 8), (9, 8, 8), (10, 8, 8), (57, 8, 8), (57, 8, 3), (57, 8, 1)]
)
def test_windows_score_every_token_once_with_what_stands_before(length, window, stride):
    ids = list(range(100, 100 + length))
    seen = []
    for request in windows(ids, window, stride):
        scored = request.ids[request.first :]
        start = request.ids[0] - 100
        assert list(request.ids) == ids[start : start + len(request.ids)]
        assert request.length == min(window, scored[-1] - 100)
        seen += scored
    assert seen == ids[1:]


@pytest.mark.parametrize("length", [1, 8, 9, 16, 17, 40])
def test_windows_are_the_harness_own_where_the_stride_is_the_window(length):
    ids = list(range(length))
    theirs = [make_disjoint_window(w) for w in get_rolling_token_windows(ids, -1, 8, 1)]
    assert [(tuple(a + b), len(a)) for a, b in theirs] == [(r.ids, r.first) for r in windows([-1, *ids], 8, 8)]


def test_text_is_counted_in_tokens_words_and_bytes(base, tmp_path):
    file = tmp_path / "two.txt"
    file.write_text("One fine day.\n<|endoftext|>\nÜber allen Gipfeln ist Ruh, in allen Wipfeln.")
    task = text_task("two", str(file), base, 8, 4)
    assert task.words == 11 and task.bytes == len("One fine day.") + len(
        "Über allen Gipfeln ist Ruh, in allen Wipfeln.".encode()
    )
    plain = [
        base.tokenizer.encode_plain(t, special=False)
        for t in ("One fine day.", "Über allen Gipfeln ist Ruh, in allen Wipfeln.")
    ]
    assert [i for r in task.windows for i in r.ids[r.first :]] == plain[0] + plain[1]
    cut = text_task("two", str(file), base, 8, 8, tokens=5)
    assert cut.tokens == 5 and cut.words < 11
    assert text_task("two", str(file), base, 8, 8, limit=1).words == 3
    for window, stride in ((8, 9), (0, 0), (4096, 8)):
        with pytest.raises(ConfigError, match="stride"):
            text_task("two", str(file), base, window, stride)


def test_a_token_limit_reads_no_more_of_a_long_document_than_it_needs(base, tmp_path, monkeypatch):
    file, words = tmp_path / "long.txt", random.Random(0)
    text = "".join(
        words.choice(["the river ", "caf\u00e9s, ", "1842 ", "\n\n  ", "unbelievably "]) for _ in range(5000)
    )
    file.write_text(text)
    tokens = (1, 64, 65, 100, 1000)
    whole = [text_task("long", str(file), base, 64, 32, tokens=n) for n in tokens]
    plain = base.tokenizer.encode_plain(text.strip(), special=False)
    assert [i for r in whole[-1].windows for i in r.ids[r.first :]] == plain[:1000]

    monkeypatch.setattr("dejavu.text.PIECE_CHARS", 501)  # cuts words and runs of spaces
    sizes, encode = [], type(base.tokenizer).encode_plain
    monkeypatch.setattr(
        type(base.tokenizer), "encode_plain", lambda self, t, **how: sizes.append(len(t)) or encode(self, t, **how)
    )
    assert [text_task("long", str(file), base, 64, 32, tokens=n) for n in tokens] == whole
    assert max(sizes) < len(text) / 2
    assert text_task("long", str(file), base, 64, 32, tokens=10**6).tokens == len(plain)
    assert text_task("long", str(file), base, 64, 32).tokens == len(plain)


def test_original_words_count_where_convention_says_so(base, tmp_path):
    file = tmp_path / "wikitext2_test.detok.txt"
    file.write_text("A short text.")
    assert text_task("wikitext2_test", str(file), base, 8, 8).words == 245_569
    assert text_task("wikitext2_test", str(file), base, 8, 8, tokens=100).words == 3


def test_settings_from_text():
    assert parse_setting("dense") == Setting("dense")
    assert parse_setting("exact,weights=int8") == Setting("exact", None, "int8", "exact,weights=int8")
    pack = parse_setting("pack=p/q,quality=2%")
    assert pack.mode == "sparse" and pack.selection == SelectionConfig("predictor", pack="p/q", quality=0.02, kv="lazy")
    oracle = parse_setting("policy=oracle,mlp=10%,heads=0.5,kv=lazy").selection
    assert oracle == SelectionConfig("oracle", 0.1, 0.5, kv="lazy")


@pytest.mark.parametrize("text, message", [
    ("fast", "'fast' is neither a mode"), ("mode=", "neither"), ("mlp=0.1", "mlp goes with a policy"),
    ("exact,quality=1%", "quality goes with a pack"), ("pack=a,policy=oracle", "either a pack or a policy"),
    ("dense,dense", "given twice"), ("policy=best", "policy 'best' does not exist"), ("sparse", "needs a selection"),
    ("policy=oracle,mlp=ten", "expected a share"), ("exact,policy=oracle", "no other mode takes one"),
])  # fmt: skip
def test_bad_settings_are_named(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_setting(text)


def test_every_format_is_known_by_its_keys(data):
    found = [read_local(name, data / f"{name}.jsonl") for name in ("lambada", "piqa", "winogrande", "pairs")]
    assert [task.format for task in found] == list(FORMATS.values())
    assert list(local_names(data)) == ["lambada", "pairs", "piqa", "prose", "winogrande"]


def test_a_limit_takes_documents_evenly(tmp_path):
    rows = [{"sentence_good": f"good {i}", "sentence_bad": f"bad {i}"} for i in range(10)]
    rows.insert(3, {"sentence_good": " ", "sentence_bad": ""})
    file = tmp_path / "t.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    task = read_local("t", file, limit=4)
    assert [row["sentence_bad"] for row in task.rows] == ["bad 0", "bad 2", "bad 5", "bad 7"] and task.empty == 1
    assert len(read_local("t", file, limit=99).rows) == 10


GOOD = {"query": "a", "choices": ["b", "c"], "gold": 0}


@pytest.mark.parametrize("lines, message", [
    ([GOOD, "{"], "line 2 is no JSON"),
    ([GOOD, GOOD | {"gold": 2}], "line 2: gold must be 0 to 1, found 2"),
    ([GOOD | {"choices": ["b"]}], "line 1: choices must be a list of two strings or more"),
    ([GOOD, {"query": "a", "gold": 0}], "line 2: choices must be"),
    ([GOOD | {"gold": True}], "gold must be an integer"),
    ([{"question": "a"}], "line 1 has none of the known sets of keys: .*found question"),
    ([[1]], "found list"),
    ([], "holds no documents"),
    ([GOOD | {"choices": ["", " "]}], "all documents are empty"),
])  # fmt: skip
def test_a_malformed_file_is_named_with_its_line(tmp_path, lines, message):
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    with pytest.raises(ConfigError, match=message):
        read_local("bad", file)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "bin.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "cut.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00")
    for name in ("bin.jsonl", "cut.jsonl.gz", "missing.jsonl"):
        with pytest.raises(ConfigError, match=name):
            read_local("t", tmp_path / name)
    for folder in (tmp_path / "nowhere", tmp_path / "empty"):
        if folder.name == "empty":
            folder.mkdir()
        with pytest.raises(ConfigError, match=folder.name):
            local_names(folder)


def test_a_name_that_does_not_exist_brings_up_what_comes_close():
    with pytest.raises(ConfigError, match="no task 'lambda' here; did you mean lambada"):
        resolve(["lambda"], ["piqa", "lambada"], "here")
    assert resolve(["all", "piqa"], ["piqa", "lambada"], "here") == ["piqa", "lambada"]


def test_paired_differences_are_narrower_than_their_parts():
    draw = random.Random(0)
    theirs = [draw.gauss(0, 1) for _ in range(400)]
    ours = [x + 0.1 + draw.gauss(0, 0.1) for x in theirs]
    found = stats.difference(ours, theirs)
    half = (found["high"] - found["low"]) / 2
    assert found["difference"] == pytest.approx(0.1, abs=0.02)
    assert half == pytest.approx(1.96 * 0.1 / 20, rel=0.1) and half < stats.standard_error(ours)


def test_perplexity_and_its_ratio():
    value, error = stats.perplexity([-2.0, -4.0], [1, 2])
    assert value == pytest.approx(math.exp(2)) and error == pytest.approx(0, abs=1e-12)
    assert stats.perplexity([-2.0, -5.0], [1, 2])[1] > 0
    ratio = stats.perplexity_ratio([-2.2, -4.4], [-2.0, -4.0], [1, 2])
    assert ratio["difference"] == pytest.approx(math.exp(0.2) - 1) and ratio["low"] == pytest.approx(ratio["high"])
    assert math.isinf(stats.perplexity([-2.0], [1])[1])
    single = stats.perplexity_ratio([-2.2], [-2.0], [1])
    assert single["low"] == -math.inf and single["high"] == math.inf


def test_numbers_that_are_too_large_and_words_that_are_none():
    """A text without spaces is one word, whose perplexity no float holds."""
    assert stats.perplexity([-3000.0, -2000.0], [1, 0]) == (math.inf, math.inf)
    assert stats.perplexity([-1.0], [0]) == (math.inf, math.inf)
    assert stats.perplexity([-709.0, -709.0], [1, 1])[0] == pytest.approx(math.exp(709))
    assert stats.perplexity_ratio([-1.0], [-2.0], [0]) == {"difference": math.inf, "low": -math.inf, "high": math.inf}
    assert stats.perplexity_ratio([-3000.0, -1.0], [-1.0, -2.0], [1, 1])["difference"] == math.inf


def test_a_text_of_one_word_has_a_report(base, tmp_path):
    (tmp_path / "one.txt").write_text("abcdefgh" * 200)
    result = Evaluation(base, texts=[str(tmp_path / "one.txt")]).run({"a": base, "b": base}, speed=False)
    metrics = result["tasks"]["one"]["metrics"]
    assert metrics["word_perplexity"]["a"]["value"] is None and metrics["byte_perplexity"]["a"]["value"] > 1
    assert report.tables(result) and report.save_figure(result, tmp_path)


def test_scores_that_are_no_numbers_are_an_error(base, tmp_path, monkeypatch):
    logits = Scorer.logits
    monkeypatch.setattr(Scorer, "logits", lambda *args: [x * math.nan for x in logits(*args)])
    (tmp_path / "a.txt").write_text("The river rises in the hills.")
    job = Evaluation(base, texts=[str(tmp_path / "a.txt")])
    with pytest.raises(DejavuError, match=r"broken setting: .*not finite"):
        job.run({"broken setting": base}, output=tmp_path / "out")
    assert len((tmp_path / "out" / "scores.jsonl").read_text().splitlines()) == 1
