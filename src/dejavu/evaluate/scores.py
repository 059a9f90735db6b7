"""A table of scores: every request under every setting, computed once, in a file that a stopped run goes on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from dejavu.artifacts import to_json
from dejavu.engine.engine import Engine
from dejavu.engine.scoring import Path as ScoringPath
from dejavu.engine.scoring import Reads, Request, Scorer, passes
from dejavu.errors import ConfigError, DejavuError
from dejavu.progress import Progress, silent

SCORES_FILE = "scores.jsonl"
# Logits of one pass, at most: 2**25 numbers are 128 MB, and those of the reference are kept beside them.
LOGITS = 1 << 25


@dataclass(frozen=True)
class Score:
    """Of the scored tokens of one request.

    Args:
        logprob: natural logarithm of their probability.
        greedy: each of them was the most likely one.
        kl: sum of KL(reference || this) over them, in nats.
        agree: at how many of them the most likely token is that of the reference.
    """

    logprob: float
    greedy: bool
    kl: float
    agree: int


class Scores:
    """Scores of requests under several engines; the first is the reference of the others.

    `reads` and `seconds` say, for each engine, what was read and how long scoring took.

    Args:
        engines: by the name of their setting, over the same vocabulary.
        path, batch: how to score; see engine.scoring.Scorer.
        file: JSON lines, one a pass; None keeps them in memory alone. A file that exists goes on.
        identity: what the scores depend on, as JSON; a file made for another is refused.
    Raises: ConfigError for a file that cannot be used.
    """

    def __init__(self, engines: Mapping[str, Engine], path: ScoringPath, batch: int, file: Path | None, identity: dict):
        self._engines = engines
        self._scorers = {name: Scorer(engine, path, batch) for name, engine in engines.items()}
        self.reads = {name: Reads(engine) for name, engine in engines.items()}
        self.seconds = dict.fromkeys(engines, 0.0)
        self._table: dict[str, dict[str, Score]] = {}  # by the key of the request, then by setting
        self._file = file
        if file is not None:
            self._open(file, identity)

    def compute(self, requests: Sequence[Request], progress: Progress = silent) -> None:
        """Score what is not in the table yet. Interrupted, it loses the pass it is in and no more.

        progress: in tokens; each counts once for every engine.
        """
        wanted = {_key(r): r for r in requests}
        missing = [(key, r) for key, r in wanted.items() if key not in self._table]
        total = len(self._engines) * sum(r.length for r in wanted.values())
        done = total - len(self._engines) * sum(r.length for _, r in missing)
        progress("scoring", done, total)
        size = min(1024, max(64, LOGITS // next(iter(self._engines.values())).config.vocab_size))
        for chunk in passes([r for _, r in missing], size):
            tokens, begun = sum(missing[i][1].length for i in chunk), done

            def scored(engines: int, tokens: int = tokens, begun: int = begun) -> None:
                progress("scoring", begun + engines * tokens, total)

            self._add(self._score([missing[i] for i in chunk], scored), keep=True)
            done += len(self._engines) * tokens

    def of(self, setting: str, request: Request) -> Score:
        """A score that was computed. Raises: KeyError."""
        return self._table[_key(request)][setting]

    def _score(self, chunk: Sequence[tuple[str, Request]], scored: Callable[[int], None]) -> dict:
        """A line of the file: one pass under every engine. `scored` is called with the engines that are done."""
        requests = [r for _, r in chunk]
        line: dict = {"keys": [key for key, _ in chunk], "settings": {}}
        reference: list[Tensor] | None = None
        for number, (name, scorer) in enumerate(self._scorers.items(), 1):
            reads, started = Reads(self._engines[name]), perf_counter()
            logits = [x.log_softmax(1) for x in scorer.logits(requests, reads)]
            seconds = perf_counter() - started
            reference = logits if reference is None else reference
            scores = [_compare(*x) for x in zip(requests, logits, reference, strict=True)]
            if not all(isfinite(s.logprob) and isfinite(s.kl) for s in scores):
                raise DejavuError(
                    f"{name}: the model's scores are not finite numbers; its weights or logits are broken"
                )
            columns = {field: [getattr(s, field) for s in scores] for field in Score.__dataclass_fields__}
            line["settings"][name] = columns | {"reads": reads.to_dict(), "seconds": round(seconds, 4)}
            scored(number)
        return line

    def _add(self, line: dict, keep: bool) -> None:
        for name, part in line["settings"].items():
            columns = [part[field] for field in Score.__dataclass_fields__]
            for key, *values in zip(line["keys"], *columns, strict=True):
                self._table.setdefault(key, {})[name] = Score(*values)
            tokens = part["reads"]["tokens"]
            self.reads[name].add(tokens, *(torch.tensor(x) for x in list(part["reads"].values())[1:]))
            self.seconds[name] += part["seconds"]
        if keep and self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(to_json(line) + "\n")

    def _open(self, file: Path, identity: dict) -> None:
        head = json.dumps({"identity": identity}) + "\n"
        try:
            if not file.exists():
                file.write_text(head, encoding="utf-8")
                return
            text = file.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            if whole != text:  # the line that a kill cut short
                file.write_text(whole, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{file}: cannot be used ({error.strerror or error}); choose another folder") from error
        lines = whole.splitlines(keepends=True)
        if not lines or lines[0] != head:
            raise ConfigError(
                f"{file.parent}: holds an evaluation of another model, setting or method; choose another folder, or "
                "--overwrite"
            )
        for number, line in enumerate(lines[1:], 2):
            try:
                self._add(json.loads(line), keep=False)
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{file}: line {number} is damaged ({error}); --overwrite starts anew") from error


def _key(request: Request) -> str:
    ids = np.array((request.first, *request.ids), dtype="<i4")
    return hashlib.sha256(ids.tobytes()).hexdigest()[:24]


def _compare(request: Request, logprobs: Tensor, reference: Tensor) -> Score:
    """logprobs, reference: (scored, V) float32."""
    targets = torch.tensor(request.ids[request.first :])
    best = logprobs.argmax(1)
    return Score(
        logprob=logprobs.gather(1, targets[:, None]).double().sum().item(),
        greedy=bool((best == targets).all()),
        kl=0.0 if reference is logprobs else (reference.exp() * (reference - logprobs)).double().sum().item(),
        agree=int((best == reference.argmax(1)).sum()),
    )
