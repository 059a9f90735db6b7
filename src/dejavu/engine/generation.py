"""What generation returns, and the run of a batch from its prompts to its last token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dejavu.config import ModelConfig, SamplingParams
from dejavu.engine.bytes import step_bytes
from dejavu.engine.detokenize import Detokenizer, StopScanner
from dejavu.engine.sampling import Sampler, TokenLogprob
from dejavu.engine.step import Steps, bucket
from dejavu.engine.tokenizer import Tokenizer
from dejavu.model.decoder import Decoder


@dataclass(frozen=True)
class Stats:
    """Time and bytes of one generation. The decode figures are None where the prompt alone gave the only token.

    A decode step reads a token of every text that has not ended: its time and bytes are the batch's. Times hold
    sampling and detokenizing, not what the caller does between two chunks.
    """

    prompt_tokens: int
    new_tokens: int
    prefill_s: float
    prefill_tok_per_s: float
    ttft_s: float  # from the request to the first token, tokenizing and the prompts of earlier rows included
    decode_s: float
    decode_tok_per_s: float | None  # of this row
    step_ms_p50: float | None
    step_bytes: dict[str, float] | None  # mean bytes read by a step, by part (engine.bytes.PARTS)
    mlp_density: tuple[float, ...] | None  # by layer: the fraction of the fc2 (down) rows that were read
    attn_density: tuple[float, ...] | None  # by layer: the fraction of the query heads that were read
    # In mode sparse: layers whose heads, whose neurons came to be read whole, as selections did not pay there.
    whole: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    @property
    def mean_mlp_density(self) -> float | None:
        return None if self.mlp_density is None else sum(self.mlp_density) / len(self.mlp_density)

    @property
    def mean_attn_density(self) -> float | None:
        return None if self.attn_density is None else sum(self.attn_density) / len(self.attn_density)


@dataclass(frozen=True)
class Generation:
    """One finished generation. `text` continues the prompt; `token_ids` are all new tokens, the ending one too."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "eos", "length"]
    stop: str | None  # the stop string that ended the text
    logprobs: tuple[TokenLogprob, ...] | None
    stats: Stats

    def to_dict(self) -> dict:
        """The same as plain values for JSON."""
        return asdict(self)


class Chunk(NamedTuple):
    """One new token. `text` is what may be shown because of it, maybe nothing; the last chunk has the result."""

    text: str
    token_id: int
    logprob: TokenLogprob | None
    generation: Generation | None
    row: int  # which prompt of the batch


class Batch:
    """Prompts on their way: each row is prefilled alone, then all rows step together until the last has finished.

    Args:
        steps: their cache has a row for each prompt, with room for prompt and new tokens; busy while this runs.
        started: perf_counter() at the time of the request.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        steps: Steps,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        started: float,
    ):
        self._decoder, self._steps, self._started = decoder, steps, started
        self._texts = [_Text(ids, params, decoder.config, tokenizer) for ids in prompts]
        # One size until the end: which texts have ended then changes no other's.
        self._size = bucket(len(prompts))
        self._step_s: list[float] = []
        self._attended = self._read = 0  # tokens attended to, over all tokens read; and these

    def chunks(self) -> Iterator[Chunk]:
        """A chunk for each token of each text, as they come."""
        cache = self._steps.cache
        self._steps.restart()
        taken = [cache.take() for _ in self._texts]
        try:
            for index, text in enumerate(self._texts):
                began = perf_counter()
                logits = self._decoder.prefill(torch.tensor(text.prompt_ids), cache, taken[index], narrow=True).cpu()
                text.prefill_s = perf_counter() - began
                piece, logprob = text.take(logits)
                text.ttft_s = perf_counter() - self._started
                yield self._chunk(index, piece, logprob)
            window = self._decoder.config.sliding_window or cache.capacity
            while live := [index for index, text in enumerate(self._texts) if text.finish_reason is None]:
                rows = [taken[index] for index in live]
                with closing(self._taken(live, rows)) as steps:
                    began = perf_counter()
                    for said in steps:
                        self._step_s.append(perf_counter() - began)
                        self._attended += sum(min(cache.length(row), window) for row in rows)
                        self._read += len(rows)
                        for index, (piece, logprob) in zip(live, said, strict=True):
                            yield self._chunk(index, piece, logprob)
                        if any(self._texts[index].finish_reason for index in live):
                            break
                        began = perf_counter()
        finally:
            for row in taken:
                cache.release(row)

    def _taken(self, live: list[int], rows: list[int]) -> Iterator[list[tuple[str, TokenLogprob | None]]]:
        """What texts say step by step, as `_Text.take` returns it."""
        texts = [self._texts[index] for index in live]
        if all(text.greedy for text in texts):
            # These end with the text that may say least: by its last step it has a reason to finish.
            left, step = min(text.left for text in texts), self._steps.step(self._size)
            for chosen in step.greedy([text.token_ids[-1] for text in texts], rows, left):
                yield [text.accept(token) for text, token in zip(texts, chosen, strict=True)]
        else:
            while True:
                logits = self._steps.run([text.token_ids[-1] for text in texts], rows, self._size)
                yield [text.take(of_row) for text, of_row in zip(texts, logits, strict=True)]

    def _chunk(self, index: int, piece: str, logprob: TokenLogprob | None) -> Chunk:
        text = self._texts[index]
        generation = None if text.finish_reason is None else text.result(self._stats(text))
        return Chunk(piece, text.token_ids[-1], logprob, generation, index)

    def _stats(self, text: _Text) -> Stats:
        """The text's own times, and the batch's steps until its end."""
        steps, decode_s, config, counts = len(self._step_s), sum(self._step_s), self._decoder.config, self._steps.counts
        times = {"prompt_tokens": len(text.prompt_ids), "new_tokens": len(text.token_ids), "prefill_s": text.prefill_s}
        times |= {"prefill_tok_per_s": len(text.prompt_ids) / text.prefill_s}
        times |= {"ttft_s": text.ttft_s, "decode_s": decode_s}
        if not steps:
            return Stats(
                **times, decode_tok_per_s=None, step_ms_p50=None, step_bytes=None, mlp_density=None, attn_density=None
            )
        read, attn_read = counts.rows_read.cpu() / counts.steps, counts.attn_read.cpu() / counts.steps
        return Stats(
            **times,
            decode_tok_per_s=(len(text.token_ids) - 1) / decode_s,
            step_ms_p50=median(self._step_s) * 1e3,
            step_bytes=step_bytes(
                config,
                self._decoder.weights,
                attended=self._attended / self._read,
                batch=counts.tokens / counts.steps,
                rows_read=read,
                attn_read=attn_read,
                predictor_bytes=self._steps.predictor_bytes(self._size),
            ),
            mlp_density=tuple((read[:, -1] / config.intermediate_size).tolist()),
            attn_density=tuple((attn_read[:, 0] / config.num_attention_heads).tolist()),
            whole=self._steps.whole(self._size),
        )


class _Text:
    """One prompt on its way: chooses its next token, turns it into text, and knows when to end."""

    def __init__(self, prompt_ids: Sequence[int], params: SamplingParams, config: ModelConfig, tokenizer: Tokenizer):
        self.prompt_ids, self.token_ids = prompt_ids, []
        self.finish_reason: Literal["stop", "eos", "length"] | None = None
        self.prefill_s = self.ttft_s = 0.0
        # The last token is never read, so it needs no place in the context.
        self._limit = min(params.max_new_tokens, config.context - len(prompt_ids) + 1)
        self._eos = frozenset() if params.ignore_eos else tokenizer.eos_ids
        self.greedy = params.temperature == 0 and params.repetition_penalty == 1 and params.logprobs is None
        self._sampler = Sampler(params, prompt_ids, config.vocab_size)
        self._detokenizer = Detokenizer(tokenizer.decode, prompt_ids)
        self._scanner = StopScanner(params.stop)
        self._spelled = tokenizer.spelled if params.stop else lambda token: ""
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []

    @property
    def left(self) -> int:
        """Tokens that may follow."""
        return self._limit - len(self.token_ids)

    def take(self, logits: Tensor) -> tuple[str, TokenLogprob | None]:
        """Choose a token from logits (V,); returns the text that it settles and its log-probabilities."""
        return self.accept(*self._sampler(logits))

    def accept(self, token: int, logprob: TokenLogprob | None = None) -> tuple[str, TokenLogprob | None]:
        """As `take`, of a token that is chosen."""
        self.token_ids.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        ended = token in self._eos
        over = ended or len(self.token_ids) == self._limit
        piece = "" if ended else self._detokenizer.push(token)
        text = self._scanner.push(piece + self._detokenizer.flush() if over else piece, self._spelled(token))
        if self._scanner.hit is not None:
            self.finish_reason = "stop"
        elif over:
            self.finish_reason = "eos" if ended else "length"
            text += self._scanner.flush()
        self._pieces.append(text)
        return text, logprob

    def result(self, stats: Stats) -> Generation:
        return Generation(
            text="".join(self._pieces),
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            stop=self._scanner.hit,
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
            stats=stats,
        )
