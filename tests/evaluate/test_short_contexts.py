"""Decoding is timed wherever there is room for a prompt and a token, however short the context."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import dejavu
from dejavu.evaluate import report
from dejavu.evaluate.run import TIMED_PROMPT, TIMED_TOKENS, Evaluation

WORDS = ["<s>", "</s>", "<unk>", *(f"word{i}" for i in range(98))]


@pytest.mark.parametrize("context", [TIMED_PROMPT + TIMED_TOKENS, TIMED_PROMPT, TIMED_TOKENS + 1, TIMED_TOKENS, 8, 2])
def test_speed_within_a_short_context(context, make_checkpoint, tmp_path):
    folder = make_checkpoint("opt", max_position_embeddings=context)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    (tmp_path / "a.txt").write_text(" ".join(f"word{i % 98}" for i in range(3 * context)))
    dense = dejavu.load(folder, mode="dense", threads=1)
    engines = {"dense": dense, "exact": dense.with_mode("exact")}
    result = Evaluation(dense, texts=[str(tmp_path / "a.txt")]).run(engines)
    for timed in result["decode"].values():
        assert timed["prompt"] == max(1, min(TIMED_PROMPT, context - TIMED_TOKENS))
        if context > 2:
            assert timed["bytes_per_token"] > 0 and timed["ms_per_token"] > 0
        else:  # the prompt gives the only token there is room for
            assert timed["bytes_per_token"] is None and timed["ms_per_token"] is None
    assert report.tables(result) and report.save_figure(result, tmp_path)
