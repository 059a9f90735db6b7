"""Tasks by name: of the lm-evaluation-harness, which loads their data from the hub, or files of a local folder."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dejavu.errors import ConfigError

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

TASK_SUFFIXES = (".jsonl", ".jsonl.gz")
TEXT_SUFFIXES = (".txt", ".txt.gz")

# What follows the query of a task in the harness's own version of it.
_AFTER_QUERY = {"piqa": "\nAnswer:"}


@dataclass(frozen=True)
class Format:
    """A kind of local file, known by the keys of its rows.

    Args:
        keys: what a row must hold, with the type of each value; list means a list of strings.
        text: the strings of a row of which one at least must hold more than spaces, else the row is empty.
        config: of the harness's task, beside its name and data.
    """

    keys: dict[str, type]
    text: Callable[[dict], Sequence[str]]
    config: dict[str, Any] = field(repr=False)


def _metrics(*names: str) -> list[dict]:
    return [{"metric": n, "aggregation": "perplexity" if n == "perplexity" else "mean",
             "higher_is_better": n != "perplexity"} for n in names]  # fmt: skip


FORMATS = {
    "a word to predict": Format(
        {"context": str, "continuation": str},
        lambda row: [row["continuation"]],
        {
            "output_type": "loglikelihood",
            "doc_to_text": lambda row: row["context"],
            "doc_to_target": lambda row: " " + row["continuation"].lstrip(),
            "metric_list": _metrics("acc", "perplexity"),
        },
    ),
    "multiple choice": Format(
        {"query": str, "choices": list, "gold": int},
        lambda row: row["choices"],
        {
            "output_type": "multiple_choice",
            "doc_to_text": lambda row: row["query"].rstrip(),
            "doc_to_target": lambda row: row["gold"],
            "doc_to_choice": lambda row: row["choices"],
            "metric_list": _metrics("acc", "acc_norm"),
        },
    ),
    "one ending, several beginnings": Format(
        {"context_options": list, "continuation": str, "gold": int},
        lambda row: [row["continuation"]],
        {
            "output_type": "multiple_choice",
            # With several beginnings the harness takes the right answer from here, and the ending from the target.
            "doc_to_text": lambda row: row["gold"],
            "doc_to_target": lambda row: row["continuation"].strip(),
            "doc_to_choice": lambda row: row["context_options"],
            "metric_list": _metrics("acc"),
        },
    ),
    "minimal pairs": Format(
        {"sentence_good": str, "sentence_bad": str},
        lambda row: [row["sentence_good"], row["sentence_bad"]],
        {
            "output_type": "multiple_choice",
            "doc_to_text": "",
            "doc_to_target": lambda row: 0,
            "doc_to_choice": lambda row: [row["sentence_good"], row["sentence_bad"]],
            "num_fewshot": 0,
            "metric_list": _metrics("acc"),
        },
    ),
}


@dataclass
class LocalTask:
    """Rows of a file in one of FORMATS; `empty` of its rows hold no text and are left out."""

    name: str
    format: Format
    rows: list[dict]
    empty: int

    def build(self, num_fewshot: int | None) -> Task:
        """The harness's task over these rows."""
        import datasets
        from lm_eval.api.task import ConfigurableTask

        config = dict(self.format.config)
        if after := _AFTER_QUERY.get(self.name):
            ask = config["doc_to_text"]
            config["doc_to_text"] = lambda row: ask(row) + after
        if num_fewshot is not None and "num_fewshot" not in config:
            # Examples come from the same rows; the harness never shows a document to itself.
            config |= {"num_fewshot": num_fewshot, "fewshot_split": "test", "fewshot_config": {"sampler": "default"}}
        rows = [{key: row[key] for key in self.format.keys} for row in self.rows]
        return ConfigurableTask(
            config={
                "task": self.name,
                "test_split": "test",
                "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
                **config,
            }
        )


def local_names(folder: Path) -> dict[str, Path]:
    """Files of a folder that can be evaluated, by the name before their first dot.

    Raises: ConfigError for a folder that is missing or holds none.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is no folder")
    found = {
        f.name.split(".")[0]: f for f in sorted(folder.iterdir()) if f.name.endswith(TASK_SUFFIXES + TEXT_SUFFIXES)
    }
    if not found:
        raise ConfigError(f"{folder}: holds no {', '.join(TASK_SUFFIXES + TEXT_SUFFIXES)} file")
    return found


def resolve(names: Sequence[str], known: Sequence[str], where: str) -> list[str]:
    """The names, each once; "all" stands for every known one. Raises: ConfigError with what comes close."""
    wanted = [n for name in names for n in (known if name == "all" else [name])]
    for name in wanted:
        if name not in known:
            close = get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(close)}?" if close else "."
            listed = f" It has: {', '.join(known)}." if len(known) <= 30 else ""
            raise ConfigError(f"there is no task {name!r} {where}{hint}{listed}")
    return list(dict.fromkeys(wanted))


def read_local(name: str, path: Path, limit: int | None = None) -> LocalTask:
    """Read a file of JSON lines.

    Args:
        limit: documents at most, taken evenly over the file, which may be sorted by kind.
    Raises: ConfigError naming the line that is not as it should be.
    """
    rows = []
    try:
        with (gzip.open if path.name.endswith(".gz") else open)(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append((number, json.loads(line)))
    except (OSError, EOFError) as error:
        raise ConfigError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 text ({error.reason})") from error
    except ValueError as error:
        raise ConfigError(f"{path}: line {len(rows) + 1} is no JSON ({error})") from error
    if not rows:
        raise ConfigError(f"{path}: holds no documents")
    kind = _format(path, rows[0][1])
    for number, row in rows:
        _check(path, number, row, kind)
    full = [row for _, row in rows if any(text.strip() for text in kind.text(row))]
    if not full:
        raise ConfigError(f"{path}: all documents are empty")
    if limit is not None and limit < len(full):
        full = [full[i * len(full) // limit] for i in range(limit)]
    return LocalTask(name, kind, full, len(rows) - sum(any(t.strip() for t in kind.text(row)) for _, row in rows))


def _format(path: Path, row: Any) -> Format:
    for kind in FORMATS.values():
        if isinstance(row, dict) and kind.keys.keys() <= row.keys():
            return kind
    kinds = "; ".join(f"{', '.join(kind.keys)} ({title})" for title, kind in FORMATS.items())
    found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    raise ConfigError(f"{path}: line 1 has none of the known sets of keys: {kinds}; found {found}")


def _check(path: Path, number: int, row: Any, kind: Format) -> None:
    for key, wanted in kind.keys.items():
        value = row.get(key) if isinstance(row, dict) else None
        good = isinstance(value, wanted) and not isinstance(value, bool)
        if good and wanted is list:
            good = len(value) > 1 and all(isinstance(x, str) for x in value)
        if not good:
            what = {str: "a string", int: "an integer", list: "a list of two strings or more"}[wanted]
            raise ConfigError(f"{path}: line {number}: {key} must be {what}, found {value!r}")
    options = row.get("choices") or row.get("context_options") or []
    if "gold" in kind.keys and not 0 <= row["gold"] < len(options):
        raise ConfigError(f"{path}: line {number}: gold must be 0 to {len(options) - 1}, found {row['gold']}")


def hub_tasks(names: Sequence[str], num_fewshot: int | None) -> dict[str, Task]:
    """Tasks of the harness by name; groups stand for their members. Raises: ConfigError."""
    quiet()
    manager = _manager()
    names = resolve(names, manager.all_tasks, "in the lm-evaluation-harness")
    try:
        tasks = manager.load(names)["tasks"]
    except Exception as error:  # data sets raise whatever their hosts and formats do
        raise ConfigError(
            f"{', '.join(names)}: the data cannot be loaded ({' '.join(str(error).split())[:300]}); "
            "without a hub, give --data-dir"
        ) from error
    for task in tasks.values():
        if num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
    return tasks


@cache
def _manager() -> TaskManager:
    """The harness's index of its tasks, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def quiet() -> None:
    """The harness's own remarks stay out of ours, and so does every try to reach a hub that is not there."""
    for name in ("lm_eval", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
