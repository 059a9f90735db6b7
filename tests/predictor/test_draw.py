"""Windows from all over a text, and no document for two purposes."""

from itertools import count, pairwise

import pytest

from dejavu.predictor import draw as module
from dejavu.predictor.draw import deal, draw


@pytest.fixture(autouse=True)
def chunks_of_whole_words(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_CHARS", len("000000 "))


class Words:
    """A token a word."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]


def document(number: int, words: int) -> str:
    return " ".join(f"{1000 * number + i:06}" for i in range(words))


def test_every_part_of_a_text_is_drawn_from_and_books_do_not_drown_articles():
    texts = [document(n, 400 if n % 10 == 0 else 16) for n in range(100)]
    found = draw(texts, Words(), 8, 60, seed=0)
    assert len(found) == 75 and all(len(ids) == 8 for _, ids in found)
    assert all(ids[0] // 1000 == number and ids == list(range(ids[0], ids[0] + 8)) for number, ids in found)
    numbers = [number for number, _ in found]
    books = sum(n % 10 == 0 for n in numbers)  # they hold 73 % of the text
    assert 15 < books < 50
    assert min(numbers) < 15 and max(numbers) > 85
    assert found == draw(iter(texts), Words(), 8, 60, seed=0) != draw(texts, Words(), 8, 60, seed=1)
    runs = 1 + sum(a != b for a, b in pairwise(numbers))
    assert runs == len(set(numbers)) and numbers != sorted(numbers)


def test_short_texts_give_what_they_have_and_endless_ones_end():
    assert len(draw([document(0, 20), document(1, 3)], Words(), 8, 60, seed=0)) == 2
    assert draw([], Words(), 8, 4, seed=0) == []
    read = count()
    assert len(draw((document(next(read), 80) for _ in count()), Words(), 8, 4, seed=0)) == 5
    assert next(read) < 30


def test_no_document_serves_two_purposes_while_there_are_windows_to_spare():
    drawn = [(number, [number, i]) for number in range(6) for i in range(3)]
    learn, judge = deal(drawn, [7, 5])
    assert (len(learn), len(judge)) == (7, 5)
    assert {ids[0] for ids in learn}.isdisjoint(ids[0] for ids in judge)
    learn, judge = deal(drawn, [10, 8])
    assert learn + judge == [ids for _, ids in drawn]
