"""The bytes of a step against the memory that the weights take."""

import pytest
import torch

from dejavu.checkpoint.layout import allocate
from dejavu.config import ModelConfig
from dejavu.engine.bytes import PARTS, step_bytes

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
