"""Quality of selections on real text and tasks: records, and the tables and figures of docs/evaluate.md made of them.

    python benchmarks/quality.py selection opt-mini --data ../shared/data --work OUT
    python benchmarks/quality.py packs opt-mini opt-mini --data ../shared/data --work OUT
    python benchmarks/quality.py docs

`selection` scores the policies that need no training over densities (Figure 1(2) of the paper), `packs` a model's pack
beside dense and exact over all tasks. Both append a record to results/, and go on from OUT where they were stopped.
`docs` shows the last record of each model. Weights are float32, which leaves rounding out.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Annotated

import quality_docs
import typer

import dejavu
from dejavu.bench import record
from dejavu.config import ModelConfig, SelectionConfig, pack_selection
from dejavu.evaluate.run import Evaluation
from dejavu.evaluate.settings import Setting, identify, make_engines
from dejavu.text import documents

POLICIES = ("oracle", "non_contextual", "static", "random")
PARTS = {"mlp": ("mlp_density",), "heads": ("attn_density",), "both": ("mlp_density", "attn_density")}
DENSITIES = (0.5, 0.25, 0.15, 0.1, 0.05)
# Some settings are scored by decode steps too, on so little that they end: the path should make no difference.
STEPPED, STEPPED_TOKENS, STEPPED_PAIRS = ("both oracle 0.25", "both non_contextual 0.25", "both static 0.25"), 256, 12
# Documents of each task: what some minutes allow.
DOCUMENTS = {"lambada_openai": 500, "piqa": 200, "copa": 100, "openbook_qa": 500, "winogrande": 200, "blimp": 1000}
HELD, CALIBRATION = "text/wiki_heldout.txt", "text/calibration.txt.gz"
RESULTS = Path(__file__).parent / "results"

app = typer.Typer(pretty_exceptions_enable=False)
Model = Annotated[str, typer.Argument(help="A folder, hub id, or opt-mini.")]
Data = Annotated[Path, typer.Option(help=f"A folder with {HELD}, {CALIBRATION} and task files in eval/.")]
Work = Annotated[Path, typer.Option(help="A folder for scores; a stopped run goes on from it.")]
Results = Annotated[Path, typer.Option(help="The folder of records.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads. [default: all]", show_default=False)]


def settings_of(config: ModelConfig) -> tuple[list[Setting], dict[str, str]]:
    """Dense, and every policy, part and density; those that keep the same number of units are one setting.

    Returns: the settings; and for the name of every combination the name of its setting.
    """
    settings, names, first = [Setting("dense")], {"dense": "dense"}, {}
    for part, policy, density in product(PARTS, POLICIES, DENSITIES):
        name = f"{part} {policy} {density:g}"
        selection = SelectionConfig(policy, **dict.fromkeys(PARTS[part], density))
        kept = part, policy, selection.counts(0, config)
        if kept not in first:
            first[kept] = name
            settings.append(Setting("sparse", selection, name=name))
        names[name] = first[kept]
    return settings, names


@app.command()
def selection(
    model: Model,
    data: Data,
    work: Work,
    tokens: Annotated[int, typer.Option(help="Tokens of the held-out text.")] = 6144,
    pairs: Annotated[int, typer.Option(help="Pairs of BLiMP.")] = 250,
    window: Annotated[int, typer.Option(help="Tokens a window of perplexity reads.")] = 512,
    results: Results = RESULTS,
    threads: Threads = None,
) -> None:
    """Perplexity and BLiMP of every policy, part and density, and of a few of them by decode steps too."""
    base = dejavu.load(model, dtype="fp32", mode="dense", threads=threads)
    settings, names = settings_of(base.config)
    engines = make_engines(settings, lambda _: base, next(documents([str(data / CALIBRATION)])))

    def score(chosen: dict[str, dejavu.Engine], path: str, tokens: int, pairs: int) -> dict:
        typer.echo(f"{model}: {len(chosen)} settings, {path}, {tokens} tokens, {pairs} pairs", err=True)
        texts = {"texts": [str(data / HELD)], "text_tokens": tokens, "window": window}
        job = Evaluation(base, ["blimp"], data_dir=data / "eval", limit=pairs, **texts)
        output = work / f"{base.checkpoint.hash[:8]}-{path}-{tokens}-{pairs}"
        return job.run(chosen, path=path, output=output, identity=identify(model, base, settings), speed=False)

    found = score(engines, "masked", tokens, pairs)
    some = {name: engines[name] for name in ("dense", *STEPPED)}
    stepped = {path: score(some, path, STEPPED_TOKENS, STEPPED_PAIRS) for path in ("masked", "steps")}
    record.append(
        results / quality_docs.SELECTION,
        model=Path(model).name,
        checkpoint_hash=base.checkpoint.hash,
        dtype="float32",
        tokens=found["tasks"]["wiki_heldout"]["tokens"],
        pairs=found["tasks"]["blimp"]["documents"],
        window=window,
        scored_by=found["path"],
        densities=[1.0, *DENSITIES],
        points={name: _point(found, setting) for name, setting in names.items()},
        by_path={
            "tokens": STEPPED_TOKENS,
            "pairs": STEPPED_PAIRS,
            **{path: {name: _point(result, name) for name in some} for path, result in stepped.items()},
        },
        scoring_seconds=sum(found["scoring_seconds"].values()),
    )


def _point(result: dict, setting: str) -> dict:
    """What was measured of a setting, and what it read, averaged over the layers."""
    text, pairs = result["tasks"]["wiki_heldout"], result["tasks"]["blimp"]
    return {
        "perplexity": text["metrics"]["token_perplexity"][setting],
        "blimp": pairs["metrics"]["acc"][setting],
        "to_dense": text["to_reference"].get(setting),
        "read": {key: values and sum(values) / len(values) for key, values in result["reads"][setting].items()},
    }


@app.command()
def packs(
    model: Model,
    pack: Annotated[str, typer.Argument(help="Its pack: a folder, hub id, or opt-mini.")],
    data: Data,
    work: Work,
    budget: Annotated[list[float], typer.Option(help="Lower budgets: the rise of perplexity.")] = (0.05, 0.2),
    tokens: Annotated[int, typer.Option(help="Tokens of each text.")] = 8192,
    limit: Annotated[int | None, typer.Option(help="Documents of a task at most, below its own number.")] = None,
    results: Results = RESULTS,
    threads: Threads = None,
) -> None:
    """Dense, exact, a pack at its own setting and at lower budgets, over all tasks and two texts."""
    base = dejavu.load(model, dtype="fp32", mode="dense", threads=threads)
    settings = [Setting("dense"), Setting("exact")]
    for quality in (None, *budget):
        name = "pack" if quality is None else f"pack, {100 * quality:g} %"
        settings.append(Setting("sparse", pack_selection(pack, quality), name=name))
    engines = make_engines(settings, lambda _: base)
    held = {"texts": [str(data / HELD)], "text_tokens": tokens}
    jobs = [([name], {"limit": min(number, limit or number)}) for name, number in DOCUMENTS.items()]
    tasks: dict = {}
    # The texts come last: theirs are the densities, bytes and times that are kept.
    for names, chosen in [*jobs, (["wikitext2_test"], held)]:
        typer.echo(f"{model}: {', '.join(names)}, {chosen}", err=True)
        job = Evaluation(base, names, data_dir=data / "eval", **chosen)
        output = work / f"{base.checkpoint.hash[:8]}-{names[0]}-{chosen.get('limit', tokens)}"
        speed = chosen is held
        result = job.run(engines, output=output, identity=identify(model, base, settings), speed=speed)
        tasks |= result["tasks"]
    kept = ("reference", "num_fewshot", "window", "text_tokens", "reads", "decode")
    record.append(
        results / quality_docs.PACKS,
        model=Path(model).name,
        checkpoint_hash=base.checkpoint.hash,
        dtype="float32",
        scored_by=result["path"],
        tasks=tasks,
        **{key: result[key] for key in kept},
    )


@app.command()
def docs(results: Results = RESULTS) -> None:
    """Write the tables of docs/evaluate.md and the figures, of the last record of each model."""
    quality_docs.write(results)


if __name__ == "__main__":
    app()
