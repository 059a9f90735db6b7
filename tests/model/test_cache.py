import pytest
import torch

from dejavu.errors import CapacityError, ConfigError
from dejavu.model.cache import BURST, KVCache


def cache(rows=2, capacity=8, pending=4):
    k, v = torch.zeros(2, 2, rows, 3, capacity, 4)
    return KVCache(k, v, None, torch.zeros(2, rows, pending + BURST - 1, 5), torch.zeros(2, rows, 3).int(), pending)


def test_rows_are_handed_out_empty_and_taken_back():
    c = cache()
    assert [c.take(), c.take()] == [0, 1]
    with pytest.raises(CapacityError, match="all 2 rows of the cache are taken"):
        c.take()
    c.append(0, [5, 6])
    c.release(0)
    assert c.take() == 0 and c.tokens(0) == ()


def test_a_row_knows_its_tokens():
    c = cache()
    c.append(1, [5, 6, 7])
    c.append(1, (8,))
    assert (c.tokens(1), c.length(1), c.length(0)) == ((5, 6, 7, 8), 4, 0)
    c.kv_len[:, 1] = torch.tensor([4, 2, 3])
    c.truncate(1, 3)
    assert c.tokens(1) == (5, 6, 7)
    assert c.kv_len[:, 1].tolist() == [[3, 2, 3]] * 2
    c.require_room(1, 5)
    with pytest.raises(CapacityError, match="row 1 is full: the cache holds 8 tokens a row, found 9"):
        c.require_room(1, 6)
    with pytest.raises(ConfigError, match=r"row must be in \[0, 2\), found 2"):
        c.require_room(2, 1)
