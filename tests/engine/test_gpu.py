"""The engine on an NVIDIA GPU: the same text as the reference, captured, in batches and in every mode."""

import pytest
import torch

import dejavu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("mode", ["dense", "exact"])
def test_text_is_the_reference_backends(tiny_checkpoint, mode):
    folder = tiny_checkpoint()
    ours = dejavu.load(folder, dtype="fp32", backend="triton", mode=mode)
    theirs = dejavu.load(folder, dtype="fp32", backend="reference", mode=mode)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    for a, b in zip(
        ours.generate(prompts, max_new_tokens=30), theirs.generate(prompts, max_new_tokens=30), strict=True
    ):
        assert a.token_ids == b.token_ids
        assert a.stats.step_bytes == pytest.approx(b.stats.step_bytes)


def test_selections_are_refused(tiny_checkpoint):
    with pytest.raises(dejavu.DejavuError, match="CPU"):
        dejavu.load(tiny_checkpoint(), backend="triton", selection=dejavu.SelectionConfig("random", 0.5))
