"""CTranslate2, from Hugging Face's model by CTranslate2's own converter.

Its Python interface gives one token after another but keeps the choice: it always reads the token that it has just
given. Tokens are named by their numbers, so no tokenizer is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import ctranslate2
from ctranslate2.converters.transformers import OPTLoader

from dejavu.errors import ConfigError

if TYPE_CHECKING:
    from dejavu.bench.peers import Source

# Our format: the names of CTranslate2 for computing, best first, and for storing.
_FORMATS = {
    "bf16": (("bfloat16",), "bfloat16"),
    "fp32": (("float32",), "float32"),
    "int8": (("int8_bfloat16", "int8_float32"), "int8"),
}


def formats() -> tuple[str, ...]:
    """Weight formats that this CPU has."""
    supported = ctranslate2.get_supported_compute_types("cpu")
    return tuple(name for name, (compute, _) in _FORMATS.items() if supported & set(compute))


def convert(source: Source, weights: str, folder: Path) -> None:
    """Write CTranslate2's model into a folder."""
    model = source.hugging_face("fp32" if weights == "fp32" else "bf16")
    if not model.config.do_layer_norm_before:
        raise ConfigError("peer ctranslate2 is set up for OPT with norms before its blocks only")
    loader = OPTLoader()
    spec = loader.get_model_spec(model)
    loader.set_vocabulary(spec, [str(i) for i in range(model.config.vocab_size)])
    spec.config.unk_token = spec.config.bos_token = spec.config.eos_token = "0"
    spec.validate()
    spec.optimize(quantization=_FORMATS[weights][1])
    spec.save(str(folder))


def load(folder: Path, weights: str, *, capacity: int, threads: int) -> CTranslate2:
    """The converted model, ready to decode."""
    supported = ctranslate2.get_supported_compute_types("cpu")
    compute = next(name for name in _FORMATS[weights][0] if name in supported)
    generator = ctranslate2.Generator(
        str(folder), device="cpu", compute_type=compute, inter_threads=1, intra_threads=threads
    )
    return CTranslate2(generator, capacity)


class CTranslate2:
    """One sequence, greedily; the end of the text is never chosen.

    Args:
        capacity: tokens of prompt and text together.
    """

    def __init__(self, generator: ctranslate2.Generator, capacity: int):
        self._generator, self._capacity = generator, capacity
        self._tokens = None

    def prefill(self, ids: Sequence[int]) -> int:
        if self._tokens is not None:
            self._tokens.close()  # it runs ahead of its reader until then
        new = self._capacity - len(ids) + 1
        self._tokens = self._generator.generate_tokens(
            [str(i) for i in ids], max_length=new, min_length=new, end_token=[], sampling_topk=1
        )
        self._last = next(self._tokens).token_id
        return self._last

    def step(self, token: int) -> int:
        if token != self._last:
            raise ValueError(f"CTranslate2 reads its own token {self._last} next, and not {token}")
        self._last = next(self._tokens).token_id
        return self._last
