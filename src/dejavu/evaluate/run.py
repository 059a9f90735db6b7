"""The whole job: tasks and texts, scored once under every setting; numbers, paired differences, speed; one report."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from math import isfinite
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

from dejavu.artifacts import resumable, write_json
from dejavu.engine.engine import Engine
from dejavu.engine.scoring import Path as ScoringPath
from dejavu.engine.scoring import Request
from dejavu.errors import ConfigError
from dejavu.evaluate import stats
from dejavu.evaluate.perplexity import DEFINITION, TextTask, text_task
from dejavu.evaluate.scores import SCORES_FILE, Score, Scores
from dejavu.evaluate.tasks import TASK_SUFFIXES, hub_tasks, local_names, quiet, read_local, resolve
from dejavu.progress import Progress, silent

if TYPE_CHECKING:
    from lm_eval.api.task import Task

RESULT_FILE = "results.json"
SCHEMA_VERSION = 1
FEWSHOT_SEED = 1234  # the harness's own
# Decoding is timed in turns of so many tokens after a prompt of so many.
TIMED_PROMPT, TIMED_TOKENS, TIMED_ROUNDS = 128, 48, 3
NOT_TIMED = {"prompt": None, "ms_per_token": None, "bytes_per_token": None, "bytes_by_part": None}


class Evaluation:
    """Tasks and texts, ready to be scored. `run` may be interrupted; with `output`, another run goes on from there.

    Args:
        tasks: names, of the harness or of files in `data_dir`; "all" stands for all of the folder.
        data_dir: a folder of files in evaluate.tasks.FORMATS, or of text; None: the harness gets its data from the hub.
        texts: more text to measure perplexity on; see dejavu.text.documents.
        num_fewshot: examples before each document; None: what the task says.
        limit: documents of a task or text at most; of a local task taken evenly over its file.
        text_tokens: tokens of a text at most.
        window, stride: of perplexity; None: the model's context, and the window.
        engine: any of those that will run: for its tokenizer and context.
    Raises: ConfigError for names and files that cannot be used.
    """

    def __init__(
        self,
        engine: Engine,
        tasks: Sequence[str] = (),
        *,
        data_dir: Path | None = None,
        texts: Sequence[str] = (),
        num_fewshot: int | None = None,
        limit: int | None = None,
        text_tokens: int | None = None,
        window: int | None = None,
        stride: int | None = None,
    ):
        for name, value in (("limit", limit), ("text_tokens", text_tokens), ("num_fewshot", num_fewshot)):
            if value is not None and value < (0 if name == "num_fewshot" else 1):
                raise ConfigError(f"{name} must be a positive integer, found {value}")
        if not tasks and not texts:
            raise ConfigError("give at least one task or text")
        window = window or engine.config.context
        stride = stride or window
        self.settings = {
            "num_fewshot": num_fewshot,
            "limit": limit,
            "text_tokens": text_tokens,
            "window": window,
            "stride": stride,
        }
        self._engine, self._limit, self._fewshot = engine, limit, num_fewshot
        self.tasks: dict[str, Task] = {}
        self.texts: dict[str, TextTask] = {}
        self.empty: dict[str, int] = {}
        self._asked: list[Request] | None = None
        sources: dict[str, str] = {}
        for text in texts:
            _add(sources, Path(text).name.split(".")[0], text)
        names = list(tasks)
        if data_dir is not None and names:
            files = local_names(data_dir)
            for name in resolve(names, list(files), f"in {data_dir}"):
                if files[name].name.endswith(TASK_SUFFIXES):
                    self._add_local(name, files[name])
                else:
                    _add(sources, name, str(files[name]))
        elif names:
            self._need_harness()
            self.tasks = hub_tasks(names, num_fewshot)
        for name, source in sources.items():
            if name in self.tasks:
                raise ConfigError(f"{source}: there is a task {name!r} already; rename the text")
            self.texts[name] = text_task(name, source, engine, window, stride, limit, text_tokens)

    def run(
        self,
        engines: Mapping[str, Engine],
        *,
        path: ScoringPath = "masked",
        batch: int = 1,
        output: Path | None = None,
        overwrite: bool = False,
        identity: Mapping | None = None,
        speed: bool = True,
        progress: Progress = silent,
    ) -> dict:
        """Score, and report.

        Args:
            engines: by the name of their setting; the first is the reference of the others.
            path, batch: see engine.scoring.Scorer.
            output: a folder for scores.jsonl, which a stopped run goes on from, and results.json.
            overwrite: start anew in a folder that holds an evaluation.
            identity: says which model and settings these are; with another, the folder is refused.
            speed: time decode steps too.
            progress: of scoring in tokens (Scores.compute), of what follows only that it is being done.
        Returns: what results.json holds; see docs/evaluate.md.
        Raises: ConfigError.
        """
        started = perf_counter()
        method = {"path": path, "batch": batch}
        requests = self._requests()  # the harness asks, and what cannot be answered is refused, before any work
        file = None if output is None else resumable(output, SCORES_FILE, "evaluation", overwrite=overwrite)
        table = Scores(engines, path, batch, file, {**dict(identity or {}), **method, "settings": list(engines)})
        table.compute(requests, progress)
        progress("tasks", 0, 1)
        result = {
            "schema_version": SCHEMA_VERSION,
            **dict(identity or {}),
            **self.settings,
            **method,
            "reference": next(iter(engines)),
            "perplexity": DEFINITION.format(**self.settings) if self.texts else None,
            "tasks": self._score_tasks(engines, table) | {n: self._score_text(t, table) for n, t in self.texts.items()},
            "reads": {name: reads.densities() for name, reads in table.reads.items()},
            "scoring_seconds": {name: round(seconds, 2) for name, seconds in table.seconds.items()},
        }
        progress("speed", 0, 1)
        result["decode"] = time_decode(engines, requests) if speed else dict.fromkeys(engines, NOT_TIMED)
        result["seconds"] = round(perf_counter() - started, 1)
        if output is not None:
            write_json(output / RESULT_FILE, result)
        return result

    def _requests(self) -> list[Request]:
        """Of all texts and tasks; the harness is asked once."""
        if self._asked is None:
            self._asked = [r for task in self.texts.values() for r in task.windows]
            if self.tasks:
                from dejavu.evaluate.harness import Collect

                collect = Collect(self._engine)
                self._evaluate(collect)
                self._asked += collect.requests
        return self._asked

    def _add_local(self, name: str, file: Path) -> None:
        self._need_harness()
        local = read_local(name, file, self._limit)
        self.tasks[name], self.empty[name] = local.build(self._fewshot), local.empty

    def _need_harness(self) -> None:
        try:
            import lm_eval  # noqa: F401
        except ImportError as error:
            raise ConfigError("tasks need the lm-evaluation-harness: pip install 'dejavu[eval]'") from error
        quiet()

    def _evaluate(self, model, bootstrap: int = 0) -> dict:
        """The harness's own evaluation, which is bookkeeping here: the model answers from a table."""
        from lm_eval.evaluator import evaluate

        for task in self.tasks.values():
            task.set_fewshot_seed(FEWSHOT_SEED)  # every evaluation must ask for the same
        with _silence():
            tasks = {"tasks": dict(self.tasks), "groups": {}, "group_map": {}}
            return evaluate(model, tasks, limit=self._limit, bootstrap_iters=bootstrap)

    def _score_tasks(self, engines: Mapping[str, Engine], table: Scores) -> dict:
        if not self.tasks:
            return {}
        from dejavu.evaluate.harness import FromScores

        out: dict[str, dict] = {}
        answers: dict[str, dict[str, list[dict]]] = {}
        for setting, engine in engines.items():
            model = FromScores(engine, table, setting)
            found = self._evaluate(model, bootstrap=1000)
            answers[setting] = {name: _by_document(found["samples"][name]) for name in self.tasks}
            for name in self.tasks:
                task = out.setdefault(name, {"metrics": {}})
                task["documents"] = len(answers[setting][name])
                task["empty"] = self.empty.get(name, 0)
                for key, value in found["results"][name].items():
                    metric, _, which = key.partition(",")
                    if which and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                        error = found["results"][name].get(f"{metric}_stderr,{which}")
                        row = task["metrics"].setdefault(metric, {})
                        row[setting] = {"value": _finite(value), "stderr": error if isinstance(error, float) else None}
        reference = next(iter(engines))
        for name, task in out.items():
            for metric, row in task["metrics"].items():
                for setting in [s for s in engines if s != reference]:
                    pair = [[doc.get(metric) for doc in answers[s][name]] for s in (setting, reference)]
                    row[setting] |= _paired(metric, *pair)
            requests = _requests_of(self.tasks[name], self._engine)
            task["truncated"] = requests.truncated
            task["to_reference"] = _to_reference(table, requests.requests, list(engines)[1:])
        return out

    def _score_text(self, task: TextTask, table: Scores) -> dict:
        settings = list(table.reads)
        tokens = [r.scored for r in task.windows]
        metrics: dict[str, dict] = {}
        theirs: list[float] = []
        for setting in settings:
            logprobs = [table.of(setting, r).logprob for r in task.windows]
            theirs = theirs or logprobs
            for level, count in (("token", task.tokens), ("word", task.words), ("byte", task.bytes)):
                weights = [n * count / task.tokens for n in tokens]
                value, error = stats.perplexity(logprobs, weights)
                row = {"value": _finite(value), "stderr": _finite(error)}
                if setting != settings[0]:
                    row |= {k: _finite(v) for k, v in stats.perplexity_ratio(logprobs, theirs, weights).items()}
                    row["relative"] = True
                metrics.setdefault(f"{level}_perplexity", {})[setting] = row
        return {
            "documents": sum(r.first == 1 and r.ids[0] == self._engine.tokenizer.prefix_id for r in task.windows),
            "tokens": task.tokens,
            "words": task.words,
            "bytes": task.bytes,
            "metrics": metrics,
            "to_reference": _to_reference(table, task.windows, settings[1:]),
        }


def time_decode(engines: Mapping[str, Engine], requests: Sequence[Request]) -> dict:
    """Median milliseconds and bytes of a decode step, settings in turns, after the longest request's beginning."""
    # Tasks that only generate have no request to take a prompt from.
    first = next(iter(engines.values()))
    context, nothing = first.config.context, Request((first.tokenizer.prefix_id,) * 2, 1)
    longest = max(requests, key=lambda r: r.length, default=nothing)
    prompt = list(longest.ids[: max(1, min(TIMED_PROMPT, context - TIMED_TOKENS))])
    room = context - len(prompt)
    runs: dict[str, list] = {name: [] for name in engines}
    for _ in range(TIMED_ROUNDS):
        for name, engine in engines.items():
            made = engine.generate(prompt, max_new_tokens=min(TIMED_TOKENS, room), ignore_eos=True)
            runs[name].append(made.stats)
    out = {}
    for name, done in runs.items():
        times = [s.step_ms_p50 for s in done if s.step_ms_p50 is not None]
        read = done[-1].step_bytes
        out[name] = {
            "prompt": len(prompt),
            "ms_per_token": median(times) if times else None,
            "bytes_per_token": None if read is None else sum(read.values()),
            "bytes_by_part": read,
        }
    return out


def _add(sources: dict[str, str], name: str, source: str) -> None:
    if name in sources:
        raise ConfigError(f"{source}: {sources[name]} has the same name, {name!r}; rename one")
    sources[name] = source


@contextmanager
def _silence() -> Iterator[None]:
    """Keeps the harness's bars and remarks off the terminal, and its bootstrap, a second's work, in this process."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), redirect_stdout(nowhere):
            yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


def _by_document(samples: list[dict]) -> list[dict]:
    return sorted(samples, key=lambda sample: sample["doc_id"])


def _requests_of(task: Task, engine: Engine):
    """What a task asked in its last evaluation."""
    from dejavu.evaluate.harness import Collect

    asked = Collect(engine)
    kinds: dict[str, list] = {}
    for instance in task.instances:
        kinds.setdefault(instance.request_type, []).append(instance)
    for kind, instances in kinds.items():
        getattr(asked, kind)(instances)
    return asked


def _to_reference(table: Scores, requests: Sequence[Request], settings: Sequence[str]) -> dict:
    """For each setting, over all scored tokens: agreement of the most likely token, and mean KL in nats."""
    out = {}
    for setting in settings:
        scores: list[Score] = [table.of(setting, r) for r in requests]
        tokens = sum(r.scored for r in requests)
        out[setting] = {
            "agreement": sum(s.agree for s in scores) / tokens if tokens else None,
            "kl": sum(s.kl for s in scores) / tokens if tokens else None,
        }
    return out


def _paired(metric: str, ours: list, theirs: list) -> dict:
    """The difference and its interval, where values of single documents say it; else nothing."""
    kinds = {type(v) for v in [*ours, *theirs]}
    if kinds <= {int, float, bool} and metric == "perplexity":
        return {**_all_finite(stats.perplexity_ratio(ours, theirs, [1] * len(ours))), "relative": True}
    if kinds <= {int, float, bool}:
        return _all_finite(stats.difference(ours, theirs))
    with suppress(TypeError, ValueError):
        (logs, weights), (other, _) = zip(*ours, strict=True), zip(*theirs, strict=True)
        if "perplexity" in metric:
            return {**_all_finite(stats.perplexity_ratio(logs, other, weights)), "relative": True}
    return {}


def _all_finite(values: dict[str, float]) -> dict[str, float | None]:
    return {key: _finite(value) for key, value in values.items()}


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
