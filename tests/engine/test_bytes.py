"""The bytes of a step against the memory that the weights take."""

import json

import pytest
import torch

import dejavu
from dejavu.checkpoint.layout import allocate
from dejavu.config import ModelConfig
from dejavu.engine.bytes import PARTS, step_bytes
from dejavu.engine.step import DecodeStep
from dejavu.kernels import reference
from dejavu.selection import make_selector

CONFIG = {
    "model_type": "opt", "vocab_size": 101, "hidden_size": 24, "intermediate_size": 50, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 6, "max_position_embeddings": 64,
    "activation": "relu", "attention_bias": True, "attention_out_bias": True, "mlp_bias": True, "position_offset": 2,
}  # fmt: skip


def weights_of(config: ModelConfig):
    taken = []

    def alloc(shape, dtype):
        taken.append(torch.empty(shape, dtype=dtype))
        return taken[-1]

    return allocate(config, torch.bfloat16, alloc), taken


@pytest.mark.parametrize(
    "changes",
    [{}, {"gated": True, "norm": "rms", "num_key_value_heads": 2, "tie_word_embeddings": False}, {"embed_size": 12}],
)
def test_a_dense_step_reads_everything_but_the_tables(changes):
    config = ModelConfig(**CONFIG | changes)
    weights, taken = weights_of(config)
    read = step_bytes(config, weights, attended=10)
    assert tuple(read) == PARTS
    tables = [weights.position_table] + ([] if weights.head is weights.embed else [weights.embed])
    rows = 2 * (config.embed_size + config.hidden_size)  # one row of each table, in bf16
    total = sum(t.nbytes for t in taken) - sum(t.nbytes for t in tables) + rows
    assert sum(read.values()) - read["kv"] == total
    assert read["kv"] == 2 * 3 * config.num_key_value_heads * 10 * 6 * 2


def test_only_the_rows_read_count():
    config = ModelConfig(**CONFIG)
    weights, _ = weights_of(config)
    dense = step_bytes(config, weights, attended=1)
    rows_read = torch.tensor([[50, 0], [50, 5], [50, 50]])
    exact = step_bytes(config, weights, attended=1, rows_read=rows_read)
    assert dense["mlp_out"] - exact["mlp_out"] == (50 + 45) * 24 * 2
    assert {k: v for k, v in dense.items() if k != "mlp_out"} == {k: v for k, v in exact.items() if k != "mlp_out"}


def test_a_batch_shares_the_weights_but_not_the_cache():
    config = ModelConfig(**CONFIG)
    weights, _ = weights_of(config)
    one, four = (step_bytes(config, weights, attended=7, batch=b, predictor_bytes=9) for b in (1, 4))
    assert {k: four[k] / one[k] for k in PARTS} == {
        "embedding": 4, "attention": 1, "mlp_in": 1, "mlp_out": 1, "predictor": 1, "lm_head": 1, "kv": 4
    }  # fmt: skip


class Counted:
    """The reference backend, and the bytes that attention really touches: every block and cache row once a call."""

    def __init__(self, monkeypatch):
        self.weights = self.cache = 0
        self._seen: set[int] = set()
        names = "dequantized", "attn_qkv", "attend", "attn_out"
        dequantized, attn_qkv, attend, attn_out = (getattr(reference, name) for name in names)

        def count_dequantized(weight):
            if weight.data_ptr() not in self._seen:
                self._seen.add(weight.data_ptr())
                self.weights += weight.nbytes
            return dequantized(weight)

        def count_attn_qkv(*args, **more):
            monkeypatch.setattr(reference, "dequantized", count_dequantized)
            try:
                return attn_qkv(*args, **more)
            finally:
                monkeypatch.setattr(reference, "dequantized", dequantized)
                self._seen.clear()

        def count_attend(q, k_cache, v_cache, tokens, heads=None, *, window=None, **more):
            H, (_, G, _, D) = q.shape[1], k_cache.shape
            chosen = range(H) if heads is None else heads[0][: int(heads[1])].tolist()
            for position in tokens.positions[: tokens.live()].tolist():
                read = min(position + 1, window or 1 << 30)
                self.cache += 2 * read * D * k_cache.itemsize * len({h * G // H for h in chosen})
            return attend(q, k_cache, v_cache, tokens, heads, window=window, **more)

        def count_attn_out(o, blocks, heads=None, tokens=None):
            self.weights += (o.shape[1] if heads is None else int(heads[1])) * blocks[0, 0].nbytes
            return attn_out(o, blocks, heads, tokens)

        for name, op in (("attn_qkv", count_attn_qkv), ("attend", count_attend), ("attn_out", count_attn_out)):
            monkeypatch.setattr(reference, name, op)


@pytest.mark.parametrize("kv", ["lazy", "full"])
@pytest.mark.parametrize(
    "settings", [{}, {"sliding_window": 5}, {"num_key_value_heads": 6}, {"num_key_value_heads": 1}]
)
@pytest.mark.parametrize("prompts", [[[1, 2, 3]], [[1, 2, 3], [4, 5, 6, 7, 8]]], ids=["one", "batch"])
def test_attention_reads_what_is_told(tiny_checkpoint, monkeypatch, settings, prompts, kv):
    """Grouped heads share keys and values: a group's are read whole when one of its heads is selected."""
    folder = tiny_checkpoint("llama", **settings)
    if "sliding_window" in settings:  # Mistral's tensors have Llama's names
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "mistral"}))
    selection = dejavu.SelectionConfig("random", attn_density=0.34, kv=kv, pending=3, seed=1, crossover=False)
    how = {"max_new_tokens": 12, "ignore_eos": True}
    native, plain = (dejavu.load(folder, selection=selection, backend=b, dtype="fp32") for b in ("cpu", "reference"))
    told = native.generate(prompts, **how)[0].stats.step_bytes
    counted, steps = Counted(monkeypatch), how["max_new_tokens"] - 1
    again = plain.generate(prompts, **how)[0].stats.step_bytes
    assert told == pytest.approx(again)
    norms = sum(layer.attn_norm.weight.nbytes for layer in plain.decoder.weights.layers)
    assert told["attention"] == pytest.approx(counted.weights / steps + norms)
    # Told is the mean of tokens times the mean of groups, over a few steps of growing length.
    assert told["kv"] == pytest.approx(counted.cache / steps, rel=0.02)
    H, G = plain.config.num_attention_heads, plain.config.num_key_value_heads
    blocks = sum(layer.attn.blocks.nbytes for layer in plain.decoder.weights.layers)
    if 1 < H // G < H:  # by heads alone a third would have been told
        assert told["attention"] > 0.4 * blocks


def test_groups_are_counted_alike_by_every_backend(tiny_checkpoint):
    folder = tiny_checkpoint("llama", num_hidden_layers=3)
    selection = dejavu.SelectionConfig("random", 0.5, (0.34, 1.0, 0.17), kv="lazy", pending=3, crossover=False)
    counts = []
    for backend in ("cpu", "reference"):
        decoder = dejavu.load(folder, backend=backend, dtype="fp32").decoder
        selector = make_selector(selection, decoder.config, decoder.weights, decoder.ops)
        step = DecodeStep(decoder, decoder.new_cache(2, 32, 3), 2, "sparse", selector)
        for row in (0, 1):
            decoder.prefill(torch.tensor([1, 2, 3 + row]), step.cache, row)
        for token in range(5, 20):
            step.run([token, token + 20], [0, 1])
        counts.append(step.counts.attn_read)
    assert torch.equal(*counts)
    heads, attended, projected = counts[0].T
    assert heads.tolist() == [15 * 3, 15 * 6, 15 * 2] and attended[1] == projected[1] == 15 * 3
    assert (projected >= attended).all()  # what is attended to is projected, and full rings beside
