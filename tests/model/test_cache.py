import torch

from dejavu.model.cache import KVCache


def test_what_is_done_to_the_newest_tokens_is_undone():
    k, v, hidden = torch.randn(2, 2, 3, 8, 4), torch.randn(2, 2, 3, 8, 4), torch.randn(2, 2, 4, 5)
    cache = KVCache(k, v, None, hidden, torch.randint(3, (2, 2, 3), dtype=torch.int32))
    before = [t.clone() for t in (k, v, hidden, cache.kv_len)]
    with cache.unchanged(torch.tensor([5, 2])):
        for row, position in enumerate((5, 2)):
            k[:, row, :, position] = v[:, row, :, position] = hidden[:, row, position % 4] = 0
        cache.kv_len.fill_(7)
    for tensor, expected in zip((k, v, hidden, cache.kv_len), before, strict=True):
        assert torch.equal(tensor, expected)
