"""Generation end to end: rows, modes, ends, limits, and what is refused."""

import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import dejavu
from dejavu.checkpoint.source import BUNDLED, open_checkpoint
from dejavu.config import SamplingParams
from dejavu.engine.scoring import Request, Scorer
from dejavu.errors import CapacityError, CheckpointError, ConfigError

PROMPTS = ["The old house on the hill", "A", "In the spring of 1842 the expedition left the harbour, and"]
SETTINGS = [
    {},
    {"temperature": 0.9, "top_p": 0.9, "seed": 5},
    {"temperature": 1.2, "seed": 1, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_row_of_a_ragged_batch_equals_that_row_alone(tiny_checkpoint, backend, settings):
    engine = dejavu.load(tiny_checkpoint(max_position_embeddings=96), backend=backend)
    prompts = ["one", "a much longer prompt, of many tokens", "x"]
    params = SamplingParams(max_new_tokens=12, logprobs=3, **settings)
    for prompt, row in zip(prompts, engine.generate(prompts, params), strict=True):
        alone = engine.generate(prompt, params)
        assert (row.text, row.token_ids, row.finish_reason) == (alone.text, alone.token_ids, alone.finish_reason)
        for a, b in zip(row.logprobs, alone.logprobs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)  # float32; a batch may sum in another order


@pytest.mark.parametrize("settings", SETTINGS)
def test_rows_of_the_bundled_model_equal_themselves_alone(bundled, settings):
    rows = bundled.generate(PROMPTS, max_new_tokens=20, **settings)
    assert [r.token_ids for r in rows] == [
        bundled.generate(p, max_new_tokens=20, **settings).token_ids for p in PROMPTS
    ]


def test_greedy_text_is_that_of_transformers(bundled):
    ids, ours = bundled.tokenizer.encode(PROMPTS[0]), bundled.generate(PROMPTS[0], max_new_tokens=200)
    assert len(ours.token_ids) == 200
    model = transformers.AutoModelForCausalLM.from_pretrained(open_checkpoint(BUNDLED).path, dtype=torch.float32)
    # Each of our tokens is the one that transformers finds likeliest after those before: so its text is ours.
    with torch.inference_mode():
        theirs = model(torch.tensor([[*ids, *ours.token_ids]])).logits[0, len(ids) - 1 : -1].argmax(-1)
    assert ours.token_ids == tuple(theirs.tolist())
    assert ours.text == bundled.tokenizer.decode(theirs.tolist())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_exact_writes_what_dense_writes_and_reads_less(dtype):
    exact = dejavu.load(dtype=dtype)
    assert exact.mode == "exact"
    dense = exact.with_mode("dense")
    for prompt in PROMPTS:
        a, b = (engine.generate(prompt, max_new_tokens=24) for engine in (exact, dense))
        assert (a.text, a.token_ids) == (b.text, b.token_ids)
        assert b.stats.mlp_density == (1.0,) * 8
        assert 0 < a.stats.mean_mlp_density < 0.15
        assert a.stats.step_bytes["mlp_out"] < 0.2 * b.stats.step_bytes["mlp_out"]
        assert a.stats.step_bytes["mlp_in"] == b.stats.step_bytes["mlp_in"]


@pytest.mark.slow
def test_exact_equals_dense_over_20_prompts_of_200_tokens(bundled):
    prompts = [
        "The river", "My dear sir", "It was in the year 1815", "When the king", "A small dog", "In mathematics",
        "The city of Paris", "She said that", "On the other hand", "The species", "He was born in", "Chapter II",
        "Once upon a time", "The war", "According to", "The ship", "Two men", "There is no", "The album", "As the sun",
    ]  # fmt: skip
    assert len(prompts) == 20
    exact, dense = (
        [g.token_ids for g in engine.generate(prompts, max_new_tokens=200, ignore_eos=True)]
        for engine in (bundled, bundled.with_mode("dense"))
    )
    assert exact == dense and {len(ids) for ids in exact} == {200}
    # Rows of a batch equal themselves alone.
    assert bundled.generate(prompts[5], max_new_tokens=200, ignore_eos=True).token_ids == exact[5]


def test_modes_are_chosen_or_refused(tiny_checkpoint):
    silu = tiny_checkpoint("llama", hidden_act="silu")
    assert dejavu.load(silu).mode == "dense"
    with pytest.raises(ConfigError, match="this model has silu: use mode dense"):
        dejavu.load(silu, mode="exact")
    with pytest.raises(ConfigError, match="choose one of: auto, dense, exact"):
        dejavu.load(tiny_checkpoint(), mode="fast")


def test_a_stream_is_the_generation_in_pieces(bundled):
    chunks = list(bundled.stream(PROMPTS[0], max_new_tokens=30, temperature=1.0, seed=3, logprobs=0))
    whole = bundled.generate(PROMPTS[0], max_new_tokens=30, temperature=1.0, seed=3, logprobs=0)
    assert "".join(c.text for c in chunks) == whole.text
    assert tuple(c.token_id for c in chunks) == whole.token_ids
    assert tuple(c.logprob for c in chunks) == whole.logprobs
    assert [c.generation is not None for c in chunks] == [False] * 29 + [True]
    assert chunks[-1].generation.text == whole.text


def test_streams_may_interleave_and_be_left(bundled):
    alone = [bundled.generate(p, max_new_tokens=12).text for p in PROMPTS[:2]]
    left = bundled.stream(PROMPTS[2], max_new_tokens=12)
    next(left)
    streams = [bundled.stream(p, max_new_tokens=12) for p in PROMPTS[:2]]
    texts = ["", ""]
    for pair in zip(*streams, strict=True):
        texts = [text + chunk.text for text, chunk in zip(texts, pair, strict=True)]
    left.close()
    assert texts == alone
    assert [bundled.generate(p, max_new_tokens=12).text for p in PROMPTS[:2]] == alone


@pytest.mark.parametrize("size", [1, 3, 11])
def test_stop_strings_end_the_text_before_them(bundled, size):
    text = bundled.generate(PROMPTS[0], max_new_tokens=40).text
    stop = text[20 : 20 + size]  # lies across token borders for the longer ones
    cut = bundled.generate(PROMPTS[0], max_new_tokens=40, stop=("never to be seen", stop))
    assert (cut.text, cut.finish_reason, cut.stop) == (text[: text.index(stop)], "stop", stop)
    streamed = [c.text for c in bundled.stream(PROMPTS[0], max_new_tokens=40, stop=stop)]
    assert "".join(streamed) == cut.text


def test_the_end_token_ends_unless_ignored(tiny_checkpoint):
    folder = tiny_checkpoint()
    free = dejavu.load(folder).generate("abc", max_new_tokens=20, ignore_eos=True)
    assert free.finish_reason == "length" and len(free.token_ids) == 20
    end = free.token_ids[7]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, end]}))
    engine = dejavu.load(folder)
    first = min(free.token_ids.index(i) for i in (0, end) if i in free.token_ids)
    ended = engine.generate("abc", max_new_tokens=20)
    assert (ended.finish_reason, ended.token_ids) == ("eos", free.token_ids[: first + 1])
    assert engine.generate("abc", max_new_tokens=20, ignore_eos=True).token_ids == free.token_ids


def test_generation_ends_with_the_context(tiny_checkpoint, backend):
    engine = dejavu.load(tiny_checkpoint(), backend=backend)  # context 64
    for prompt, new in ((60, 5), (64, 1)):
        result = engine.generate([1] * prompt, max_new_tokens=50, ignore_eos=True)
        assert (len(result.token_ids), result.finish_reason) == (new, "length")
    assert result.stats.step_ms_p50 is None, "one token comes from the prompt alone"
    both = engine.generate([[1] * 60, [2] * 3], max_new_tokens=50, ignore_eos=True)
    assert [len(r.token_ids) for r in both] == [5, 50]
    with pytest.raises(CapacityError, match="has 67 tokens, 3 more than the model's context of 64"):
        engine.generate([1] * 67)
    with pytest.raises(CapacityError, match="3 more"):
        engine.logits([1] * 67)


def test_a_huge_prompt_is_refused_by_its_beginning(bundled, monkeypatch):
    cut, encode = [], bundled.tokenizer.encode
    monkeypatch.setattr(bundled.tokenizer, "encode", lambda text: cut.append(len(text)) or encode(text))
    with pytest.raises(
        CapacityError, match=r"the beginning of 16,384 characters alone has .* the model's context of 1024"
    ):
        bundled.stream("word " * 1_800_000)
    assert cut == [16_384]


def test_long_text_of_few_tokens_is_no_huge_prompt(bundled, monkeypatch):
    """How much a token may hold is the tokenizer's: it may write white space, or what it does not know, as one."""
    monkeypatch.setattr(bundled.tokenizer, "encode", lambda text: [5])
    assert bundled.generate("x" * 100_000, max_new_tokens=1).stats.prompt_tokens == 1


def test_a_long_prompt_says_by_how_much(bundled):
    with pytest.raises(CapacityError, match=r"has 10000 tokens, 8976 more than the model's context of 1024; shorten"):
        bundled.stream([5] * 10_000)


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([[]], "the prompt is empty"),
        ([], "list of prompts is empty"),
        (["a", []], "the prompt is empty"),
        ([["a"]], r"token ids must be integers, found 'a'"),
        ([3, 16_384], r"found 16384"),
        ([-1], r"found -1"),
    ],
)
def test_bad_prompts(bundled, prompt, message):
    with pytest.raises(ConfigError, match=message):
        bundled.generate(prompt)


def test_a_tokenizer_of_another_model(tiny_checkpoint):
    engine = dejavu.load(tiny_checkpoint(vocab_size=100))
    with pytest.raises(CheckpointError, match="but the model has only 100"):
        engine.generate("\xff")


@pytest.mark.parametrize(
    "settings, message", [({"threads": 0}, "threads must be"), ({"backend": "cuda"}, "'cuda' does not exist")]
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        dejavu.load(**settings)


def test_stats_add_up(bundled):
    result = bundled.generate(PROMPTS[0], max_new_tokens=30)
    stats = result.stats
    assert (stats.prompt_tokens, stats.new_tokens) == (6, 30)
    assert 0 < stats.prefill_s <= stats.ttft_s
    assert stats.prefill_tok_per_s == pytest.approx(stats.prompt_tokens / stats.prefill_s)
    assert stats.decode_tok_per_s == pytest.approx(29 / stats.decode_s)
    # 29 steps attend to 7 .. 35 tokens, 21 in the mean; keys and values of 8 layers, 512 wide, float32
    assert stats.step_bytes["kv"] == 21 * 2 * 8 * 512 * 4
    assert json.loads(json.dumps(result.to_dict()))["stats"]["new_tokens"] == 30


def test_a_cache_larger_than_the_memory_is_refused(tiny_checkpoint, monkeypatch):
    """Before it fills up, token by token, until the system ends the process."""
    engine = dejavu.load(tiny_checkpoint("llama", max_position_embeddings=2**40))
    assert engine.generate([5] * 3, max_new_tokens=2).token_ids
    with pytest.raises(
        CapacityError, match=r"keys and values of 1 x 1,073,.* tokens would take .* GB, and .* use fewer"
    ):
        engine.generate([5] * 3, max_new_tokens=2**30)
    monkeypatch.setattr("dejavu.device.free_memory", lambda where: 10**6)
    with pytest.raises(CapacityError, match="keys and values of 80 x 256 tokens"):
        engine.generate([[5]] * 80, max_new_tokens=2)
    with pytest.raises(CapacityError, match=r"logits of 2,000 tokens would take 0.00 GB"):
        engine.logits([5] * 2000)


FACTORS = {"short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 3.0, 5.0]}
STRETCHED = {
    "linear": ({"rope_type": "linear", "factor": 3.0}, 64, 192),
    "dynamic": ({"rope_type": "dynamic", "factor": 3.0}, 64, 192),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 64, 256),
    "longrope": ({"rope_type": "longrope", "original_max_position_embeddings": 32, **FACTORS}, 64, 64),
}


@pytest.mark.parametrize("kind", STRETCHED)
def test_the_context_is_what_scaled_rotary_positions_reach(tiny_checkpoint, kind):
    """Beyond the context of config.json, and on either side of where angles change, logits are Hugging Face's."""
    rope, kept, context = STRETCHED[kind]
    rope = {"rope_theta": 500.0, **rope}
    engine = dejavu.load(
        folder := tiny_checkpoint("llama", max_position_embeddings=kept, rope_parameters=rope), dtype="fp32"
    )
    assert engine.config.context == context
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for length in (20, 33, context):
        ids = [1 + i % 200 for i in range(length)]
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(engine.logits(ids), expected, rtol=0, atol=2e-4)
    assert engine.generate([5] * (context - 3), max_new_tokens=9, ignore_eos=True).stats.new_tokens == 4
    with pytest.raises(CapacityError, match=f"1 more than the model's context of {context}"):
        engine.generate([5] * (context + 1))


@pytest.mark.parametrize(("kind", "lengths"), [("longrope", (10, 40)), ("dynamic", (70, 90))])
def test_rows_turned_by_different_angles_are_refused_in_a_batch_and_equal_themselves_alone(
    tiny_checkpoint, kind, lengths
):
    rope, kept, _ = STRETCHED[kind]
    engine = dejavu.load(
        tiny_checkpoint("llama", max_position_embeddings=kept, rope_parameters={"rope_theta": 500.0, **rope}),
        dtype="fp32",
    )
    how = {"max_new_tokens": 6, "ignore_eos": True}
    short, long = ([1 + i % 200 for i in range(n)] for n in lengths)
    with pytest.raises(ConfigError, match=f"rope_type {kind} chooses its angles by the length of the text"):
        engine.generate([short, long], **how)
    same = [i + 1 for i in short]
    alone = [engine.generate(ids, **how).token_ids for ids in (short, same)]
    assert [g.token_ids for g in engine.generate([short, same], **how)] == alone
    requests = [Request(tuple(ids), len(ids) - 2) for ids in (short, long)]
    for path in ("masked", "steps"):
        one = [Scorer(engine, path).logits([r])[0] for r in requests]
        batch = 2 if path == "steps" else 1
        for ours, theirs in zip(Scorer(engine, path, batch).logits(requests), one, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
