"""Streaming text: pieces join to the whole, and none is half a character or the beginning of a stop string."""

import random

import pytest

import dejavu
from dejavu.engine.detokenize import MAX_WAITING, REPLACEMENT, Detokenizer, StopScanner

TEXT = "naïve 😀 e\N{COMBINING ACUTE ACCENT} 你好世界 👩\N{ZERO WIDTH JOINER}🚀 end"


def decoder(tokenizer):
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*map(detokenizer.push, ids), detokenizer.flush()]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_character_comes_whole_and_as_soon_as_it_is_complete(kind, request):
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer(TEXT)["input_ids"]
    out = pieces(Detokenizer(decoder(tokenizer)), ids)
    assert "".join(out) == TEXT
    assert REPLACEMENT not in "".join(out)
    assert out[-1] == "", "nothing waits once the last character is complete"
    assert all(len(piece) <= 1 for piece in out), "every character came with its last byte"


def test_the_bundled_tokenizer(bundled):
    ids = bundled.tokenizer.encode(TEXT)
    assert "".join(pieces(Detokenizer(bundled.tokenizer.decode), ids)) == TEXT


def test_text_that_continues_a_prompt_keeps_its_space(byte_fallback):
    tokenizer = byte_fallback
    prompt, whole = tokenizer("once")["input_ids"], tokenizer("once upon a time")["input_ids"]
    out = pieces(Detokenizer(decoder(tokenizer), prompt), whole[len(prompt) :])
    assert "".join(out) == " upon a time"


def test_special_tokens_leave_no_trace(byte_fallback):
    tokenizer = byte_fallback
    end, ids = tokenizer.eos_token_id, tokenizer("a b")["input_ids"]
    ids = [*ids, end, end, *tokenizer("c d")["input_ids"], end]
    out = pieces(Detokenizer(decoder(tokenizer)), ids)
    assert "".join(out) == decoder(tokenizer)(ids) == "a b c d"


@pytest.mark.parametrize("seed", range(300))
def test_any_bytes_in_tokens_of_any_cut_join_to_the_whole(seed):
    rng = random.Random(seed)
    good = [c.encode() for c in "aé你😀" + REPLACEMENT]
    stray = [bytes([b]) for b in (0x80, 0xBF, 0xC3, 0xE4, 0xF0, 0x9F, 0xFF)]
    data = b"".join(rng.choice(good if rng.random() < 0.6 else stray) for _ in range(40))
    table, at = [], 0
    while at < len(data):
        size = rng.randint(1, rng.choice([1, 3, 6]))
        table.append(data[at : at + size])
        at += size

    def decode(ids):
        return b"".join(table[i] for i in ids).decode(errors="replace")

    ids = list(range(len(table)))
    out = pieces(Detokenizer(decode), ids)
    assert "".join(out) == decode(ids)
    for n in range(len(ids)):  # what is out after n tokens never has to be taken back
        assert decode(ids).startswith("".join(out[: n + 1]))


@pytest.mark.parametrize("byte", [b"a", b"\xff", b"\xe4"])
def test_the_window_stays_small(byte):
    seen = []

    def decode(ids):
        seen.append(len(ids))
        return (byte * len(ids)).decode(errors="replace")

    detokenizer = Detokenizer(decode)
    for _ in range(500):
        detokenizer.push(0)
    assert max(seen) <= 2 * MAX_WAITING


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The specification: the stop string that is complete first ends the text."""
    for end in range(len(text) + 1):
        hits = [s for s in stops if text[:end].endswith(s)]
        if hits:
            hit = max(hits, key=len)
            return text[: end - len(hit)], hit
    return text, None


@pytest.mark.parametrize("seed", range(300))
def test_stop_strings_do_not_depend_on_the_cut(seed):
    rng = random.Random(seed)
    text = "".join(rng.choice("ab") for _ in range(30))
    stops = ["".join(rng.choice("ab") for _ in range(rng.randint(1, 6))) for _ in range(rng.randint(0, 3))]
    expected, hit = first_stop(text, stops)
    scanner, out, at = StopScanner(stops), "", 0
    while at < len(text) and scanner.hit is None:
        size = rng.randint(1, 5)
        out += scanner.push(text[at : at + size])
        assert expected.startswith(out), "nothing past a stop string ever came out"
        at += size
    assert (out if scanner.hit else out + scanner.flush(), scanner.hit) == (expected, hit)


def test_only_what_may_begin_a_stop_string_is_held_back():
    scanner = StopScanner(["\n\nQ:"])
    assert [scanner.push(p) for p in ("one\n", "\n", "two", "\n\nQ")] == ["one", "", "\n\ntwo", ""]
    assert scanner.flush() == "\n\nQ"


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("text", ["caf\u00e9", "\U0001f600", "\u4f60\u597d", "a\u00e9b"])
def test_a_character_that_the_prompt_began_is_not_lost(kind, text, request):
    tokenizer = request.getfixturevalue(kind)
    ids, decode = tokenizer(text)["input_ids"], decoder(tokenizer)
    before = len(ids) - len(text.encode())  # a token for each byte, after what stands for the start of a word
    for cut in range(before + 1, len(ids)):
        whole = len(text.encode()[: cut - before].decode(errors="ignore"))
        assert "".join(pieces(Detokenizer(decode, ids[:cut]), ids[cut:])) == text[whole:], cut


def test_a_character_that_the_prompt_began_and_nobody_ends_stays_the_prompts():
    def decode(ids):
        return bytes(ids).decode(errors="replace")

    assert "".join(pieces(Detokenizer(decode, [*b"caf", 0xC3]), [*b" au lait"])) == " au lait"
    assert "".join(pieces(Detokenizer(decode, [*b"caf", 0xE4, 0xBD]), [0xA0, *b"!"])) == "\u4f60!"
    assert "".join(pieces(Detokenizer(decode, [*b"caf", 0xE4, 0xBD]), [])) == ""


def test_special_tokens_stop_by_their_spelling_and_are_never_shown():
    def run(stops, *parts):
        scanner, out = StopScanner(stops), []
        for part in parts:
            if scanner.hit is None:
                out.append(scanner.push(*part))
        return "".join(out) + ("" if scanner.hit else scanner.flush()), scanner.hit

    end = "<|im_end|>"
    assert run([end], ("a", ""), ("b", end), ("c", "")) == ("ab", end)
    assert run(["b" + end], ("a", ""), ("b", ""), ("", end)) == ("a", "b" + end)
    assert run([end + "c"], ("a", end), ("b", end), ("c", "")) == ("ab", end + "c")
    assert run(["x"], ("a", end), ("b", "")) == ("ab", None)
    assert run([end + "x"], ("a", end), ("b", "")) == ("ab", None)


def test_a_stop_string_of_a_special_token_stops_the_text(tiny_checkpoint):
    engine = dejavu.load(tiny_checkpoint(eos_token_id=None), dtype="fp32")
    ids = engine.generate([5, 6], max_new_tokens=4, ignore_eos=True).token_ids
    tokenizer = engine.tokenizer
    tokenizer._special[ids[2]] = "<|stop|>"
    done = engine.generate([5, 6], max_new_tokens=4, ignore_eos=True, stop="<|stop|>")
    assert (done.finish_reason, done.stop, done.token_ids) == ("stop", "<|stop|>", ids[:3])
