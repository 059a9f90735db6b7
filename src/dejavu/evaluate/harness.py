"""Our engine as a model of the lm-evaluation-harness: `python -m dejavu.evaluate --model dejavu --model_args ...`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from dejavu.config import SamplingParams, SelectionConfig
from dejavu.engine.engine import Engine
from dejavu.engine.scoring import Path, Request
from dejavu.evaluate.generation import DEFAULTS, checkpoint_defaults, fit, sampling
from dejavu.evaluate.scores import Scores


class HarnessModel(TemplateLM):
    """What the harness asks of a model, as requests for scores; tokens are made as its Hugging Face model makes them.

    `truncated` and `empty` count requests that lost the start of their context, and those without a token to score,
    whose log-likelihood is 0.

    Args:
        engine: of the tokenizer, the context's length, and generation.
    """

    def __init__(self, engine: Engine):
        super().__init__()
        self.engine = engine
        self.truncated = self.empty = 0

    def answer(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of each request."""
        raise NotImplementedError

    @property
    def eot_token_id(self) -> int:
        return min(self.engine.tokenizer.eos_ids, default=self.prefix_token_id)

    @property
    def prefix_token_id(self) -> int:
        return self.engine.tokenizer.prefix_id

    @property
    def max_length(self) -> int:
        return self.engine.config.context

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        if add_special_tokens is None:
            # A text that brings its first token along gets no second one.
            first = self.engine.tokenizer.decode([self.prefix_token_id], special=True)
            add_special_tokens = not string.startswith(first)
        return self.engine.tokenizer.encode_plain(string, special=add_special_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._answer([self._request(*instance.args) for instance in requests])

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        return self._answer([self._cut(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows, owner = [], []
        for i, instance in enumerate(requests):
            pairs = utils.get_rolling_token_windows(
                self.tok_encode(instance.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            for pair in pairs:
                context, continuation = utils.make_disjoint_window(pair)
                windows.append(self._cut(context, continuation))
                owner.append(i)
        sums = [0.0] * len(requests)
        for i, (logprob, _) in zip(owner, self._answer(windows), strict=True):
            sums[i] += logprob
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        # All are understood before the first is generated.
        return [self.engine.generate(ids, params).text for ids, params in self._plans(requests)]

    def _plans(self, requests: Sequence[Instance]) -> list[tuple[list[int], SamplingParams]]:
        """Prompt and sampling parameters of each request; a request that is repeated draws anew each time.

        Raises: ConfigError naming a setting that is not supported.
        """
        end = self.engine.tokenizer.decode([self.eot_token_id], special=True)
        defaults = {**DEFAULTS} if self.engine.checkpoint is None else checkpoint_defaults(self.engine.checkpoint.path)
        plans, before = [], Counter()
        for context, settings in (instance.args for instance in requests):
            params = sampling(settings, defaults, end, before[context])
            before[context] += 1
            whole = self.tok_encode(context) or [self.prefix_token_id]
            ids, new = fit(params, settings, whole, self.max_length)
            self.truncated += len(ids) < len(whole)
            plans.append((ids, replace(params, max_new_tokens=new)))
        return plans

    def _request(self, context: str, continuation: str) -> Request | None:
        """None: there is nothing to score."""
        if context:
            return self._cut(*self._encode_pair(context, continuation))
        ids = self.tok_encode(continuation, add_special_tokens=False)
        if ids[:1] == [self.prefix_token_id]:
            return self._cut(ids[:1], ids[1:])
        return self._cut([self.prefix_token_id], ids)

    def _cut(self, context: list[int], continuation: list[int]) -> Request | None:
        """A request of at most max_length tokens to read; the start of the context goes where it is too long."""
        if not continuation:
            return None
        ids = [*context, *continuation]
        if len(ids) > self.max_length + 1:
            self.truncated += 1
            ids = ids[-(self.max_length + 1) :]
        return Request(tuple(ids), max(1, len(ids) - len(continuation)))

    def _answer(self, requests: Sequence[Request | None]) -> list[tuple[float, bool]]:
        self.empty += sum(r is None for r in requests)
        answers = iter(self.answer([r for r in requests if r is not None]))
        return [(0.0, False) if r is None else next(answers) for r in requests]


class Collect(HarnessModel):
    """Computes nothing and remembers the `requests` for scores that are made."""

    def __init__(self, engine: Engine):
        super().__init__(engine)
        self.requests: list[Request] = []

    def answer(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        self.requests += requests
        return [(0.0, False)] * len(requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return [""] * len(self._plans(requests))


class FromScores(HarnessModel):
    """Answers from a table of scores; what is generated is generated when it is asked for."""

    def __init__(self, engine: Engine, table: Scores, setting: str):
        super().__init__(engine)
        self._table, self._setting = table, setting

    def answer(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        scores = [self._table.of(self._setting, r) for r in requests]
        return [(s.logprob, s.greedy) for s in scores]


@register_model("dejavu")
class DejavuLM(HarnessModel):
    """One engine, loaded by the harness's --model_args.

    Args:
        pretrained: as Engine.load's `model`.
        pack, quality, mode, dtype, weights, threads, backend, revision: as Engine.load's.
        policy, mlp_density, attn_density, kv: of a selection without a pack.
        path: see engine.scoring.Path.
        batch_size: with path "steps", rows that decode together.
    Raises: ConfigError, CheckpointError.
    """

    def __init__(
        self,
        pretrained: str = "opt-mini",
        pack: str | None = None,
        quality: float | None = None,
        mode: str = "auto",
        policy: str | None = None,
        mlp_density: float = 1.0,
        attn_density: float = 1.0,
        kv: str = "full",
        dtype: str = "auto",
        weights: str | None = None,
        threads: int | None = None,
        backend: str = "auto",
        revision: str | None = None,
        path: Path = "masked",
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        selection = None if policy is None else SelectionConfig(policy, mlp_density, attn_density, kv=kv)
        engine = Engine.load(
            pretrained,
            pack=pack,
            quality=quality,
            mode=mode,
            selection=selection,
            dtype=dtype,
            weights=weights,
            threads=threads,
            backend=backend,
            revision=revision,
        )
        super().__init__(engine)
        batch = int(batch_size) if path == "steps" and str(batch_size).isdigit() else 1
        self._scores = Scores({engine.mode: engine}, path, batch, None, {})

    def answer(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        from tqdm import tqdm

        with tqdm(total=None, desc="Scoring tokens", unit="tok") as bar:

            def show(what: str, done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            self._scores.compute(requests, show)
        scores = [self._scores.of(self.engine.mode, r) for r in requests]
        return [(s.logprob, s.greedy) for s in scores]
