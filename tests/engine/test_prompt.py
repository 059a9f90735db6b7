"""Every form that a prompt may have, and what is refused in its place."""

import numpy as np
import pytest
import torch

from dejavu.engine.prompt import split_prompts
from dejavu.errors import ConfigError


@pytest.mark.parametrize(
    "given, prompts, single",
    [
        ("text", ["text"], True),
        ("", [""], True),
        ([5, 6], [[5, 6]], True),
        ((5,), [[5]], True),
        (range(3), [[0, 1, 2]], True),
        (np.array([5, 6], dtype=np.int16), [[5, 6]], True),
        (torch.tensor([5, 6], dtype=torch.int32), [[5, 6]], True),
        ([np.int64(5)], [[5]], True),
        (["a", "b"], ["a", "b"], False),
        (["a", [5, 6], torch.tensor([7])], ["a", [5, 6], [7]], False),
        ([[]], [[]], False),
        (torch.tensor([[5, 6], [7, 8]]), [[5, 6], [7, 8]], False),
        (np.array([[5]]), [[5]], False),
    ],
)
def test_forms_of_a_prompt(given, prompts, single):
    assert split_prompts(given) == (prompts, single)


@pytest.mark.parametrize(
    "given, found",
    [
        (None, "None (NoneType)"),
        (5, "5 (int)"),
        (1.5, "1.5 (float)"),
        (True, "True (bool)"),
        (b"text", "b'text' (bytes)"),
        (bytearray(b"text"), "bytearray(b'text') (bytearray)"),
        (torch.tensor(5), "5 (int)"),
        (torch.tensor([1.5]), "1.5 (float)"),
        (torch.tensor([True]), "True (bool)"),
        (torch.zeros(1, 1, 1, dtype=torch.int64), "[0] (list)"),
        ([1.5], "1.5 (float)"),
        ([True], "True (bool)"),
        ([5, None], "None (NoneType)"),
        ([5, "a"], "'a' (str)"),
        ([None], "prompt 0 of the list is None (NoneType)"),
        (["a", 5], "prompt 1 of the list is 5 (int)"),
        (["a", b"b"], "prompt 1 of the list is b'b' (bytes)"),
        ([[1.5]], "1.5 (float)"),
        ([["a"]], "'a' (str)"),
        ({"prompt": "a"}, "{'prompt': 'a'} (dict)"),
        ({5}, "{5} (set)"),
        ([], "the list of prompts is empty"),
        (torch.zeros(0, 3, dtype=torch.int64), "the list of prompts is empty"),
    ],
    ids=str,
)
def test_what_is_no_prompt_is_named(given, found):
    with pytest.raises(ConfigError) as error:
        split_prompts(given)
    assert found in str(error.value)


def test_every_call_takes_tensors_and_refuses_the_rest(bundled):
    ids = torch.tensor(bundled.tokenizer.encode("The old house"))
    expected = bundled.generate("The old house", max_new_tokens=3)
    assert bundled.generate(ids, max_new_tokens=3).token_ids == expected.token_ids
    batch = bundled.generate(torch.stack([ids, ids]), max_new_tokens=3)
    assert [g.token_ids for g in batch] == [expected.token_ids] * 2
    assert torch.equal(bundled.logits(ids), bundled.logits("The old house"))
    for call in (bundled.generate, bundled.stream, bundled.logits):
        with pytest.raises(ConfigError, match="found None"):
            call(None)
    with pytest.raises(ConfigError, match="logits are of one prompt, found a list of 2"):
        bundled.logits(["a", "b"])
    with pytest.raises(ConfigError, match="a calibration text goes with a selection of policy static"):
        bundled.with_mode("dense", calibration="text")
