"""The peers run what their users run: Hugging Face's own greedy generation, token for token."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dejavu.bench.decode import greedy
from dejavu.bench.peers.hugging_face import CompiledHuggingFace, HuggingFace, load_hugging_face, random_hugging_face

CONFIGS = {
    "opt": {"model_type": "opt", "vocab_size": 101, "hidden_size": 36, "word_embed_proj_dim": 20, "ffn_dim": 50,
            "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 64},
    "llama": {"model_type": "llama", "hidden_act": "relu", "vocab_size": 101, "hidden_size": 36,
              "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3,
              "max_position_embeddings": 64, "tie_word_embeddings": False},
}  # fmt: skip
PROMPT, NEW = [5, 6, 7, 8], 20


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_random_model_is_a_whole_model(config):
    built = random_hugging_face(config, torch.float32, seed=3)
    usual = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    usual.load_state_dict(built.state_dict())
    ids = torch.arange(40)[None]
    logits = built(ids).logits
    assert torch.equal(logits, usual(ids).logits)  # so tables that are no weights, rotary ones, are right too
    assert logits.isfinite().all()
    assert logits.std() > 0.01  # not all the same
    tied = built.get_output_embeddings().weight is built.get_input_embeddings().weight
    assert tied == usual.config.tie_word_embeddings
    again = random_hugging_face(config, torch.float32, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(built.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_eager_writes_what_generate_writes(make_checkpoint, family):
    model = load_hugging_face(make_checkpoint(family), torch.float32)
    ids = torch.tensor([PROMPT])
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    peer = HuggingFace(model)
    for _ in range(2):  # a second prompt starts afresh
        assert greedy(peer, PROMPT, NEW) == expected[0, len(PROMPT) :].tolist()


@pytest.mark.slow
def test_compiled_writes_what_eager_writes(make_checkpoint, monkeypatch):
    compile_, modes = torch.compile, []
    # Without the search for the fastest kernels, which takes a minute and changes no token.
    monkeypatch.setattr(torch, "compile", lambda m, mode, **how: modes.append(mode) or compile_(m, **how))
    model = load_hugging_face(make_checkpoint("opt", num_hidden_layers=1), torch.float32)
    compiled = CompiledHuggingFace(model, len(PROMPT) + NEW)
    assert modes == ["max-autotune"]
    for prompt in (PROMPT, PROMPT[:2]):
        assert greedy(compiled, prompt, NEW) == greedy(HuggingFace(model), prompt, NEW)
