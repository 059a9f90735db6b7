"""What the choices of a fit are worth, on one collection of one model (docs/ablations.md).

    python benchmarks/ablations.py opt-mini --text ../shared/data/text/calibration.txt.gz

Rank, format, lookahead and method of the neurons' predictors; top-k against thresholds; lookahead of the heads'; lazy
against full keys and values. Every setting's cuts let the kept units hold a given share of the squared norm of a text;
other documents tell what that does to the model. One record is appended, and one figure drawn.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

import dejavu
from dejavu.bench import record
from dejavu.config import SelectionConfig
from dejavu.engine.engine import Engine
from dejavu.errors import ConfigError, DejavuError
from dejavu.kernels import reference
from dejavu.kernels.quantized import RowFormat
from dejavu.predictor.calibrate import Judge
from dejavu.predictor.collect import Collected, collect
from dejavu.predictor.draw import deal, draw
from dejavu.predictor.train import FIT_TOKENS, Parameters, block_data, fit_heads, fit_neurons, stored
from dejavu.selection.block import HEADS, NEURONS, Block
from dejavu.selection.nearest import NearestSelector
from dejavu.selection.oracle import OracleSelector
from dejavu.selection.predictor import Lookahead, Predictor, PredictorSelector
from dejavu.selection.selector import Cut, ScoreSelector
from dejavu.selection.signs import SignsSelector
from dejavu.text import documents

RESULTS = Path(__file__).parent / "results" / "ablations.jsonl"
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "ablations.png"
WINDOW, SEED = 512, 0
SHARES = (0.95, 0.98, 0.995)
RANKS = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2)  # of the hidden size
HEADS_KEPT = 0.85
INT4 = RowFormat.parse("int4")

Select = Callable[[Sequence[Cut | None]], ScoreSelector]


@dataclass
class Bench:
    """A model, what it did on text, and judges of other text."""

    engine: Engine
    collected: Collected
    learn: int  # tokens to learn from; the collected ones after them choose cuts
    judge: Judge
    epochs: int
    fitted: dict[tuple, list[Parameters]] = field(default_factory=dict)

    def data(self, block: Block, ahead: int):
        return block_data(self.collected, block, Lookahead(ahead, ahead).source(block), self.learn)

    def neurons(self, rank: int, form: RowFormat | None = INT4, ahead: int = 0, train: bool = True) -> list[Predictor]:
        """Each layer's predictor; trained once for all formats."""
        key = rank, ahead, train
        if key not in self.fitted:
            layers = self.engine.decoder.weights.layers
            own = slice(0, min(FIT_TOKENS, self.learn))
            with torch.random.fork_rng():
                self.fitted[key] = [
                    fit_neurons(
                        self.data(Block(i, NEURONS), ahead),
                        self.collected.inputs(Block(i, NEURONS), own),
                        layer.mlp,
                        rank,
                        epochs=self.epochs,
                        train=train,
                        seed=SEED + i,
                        form=form,
                    )
                    for i, layer in enumerate(layers)
                ]
        return [stored(parameters, form) for parameters in self.fitted[key]]

    def scores(self, predictors: Sequence[Predictor], ahead: int) -> list[Tensor]:
        return [
            p.scores(reference.linear, self.data(Block(i, NEURONS), ahead).judge()[0]) for i, p in enumerate(predictors)
        ]

    def selector(self, predictors: Sequence[Predictor], ahead: int) -> Select:
        config, ops = self.engine.config, self.engine.decoder.ops
        by_block = {Block(i, NEURONS): p for i, p in enumerate(predictors)}
        return lambda cuts: PredictorSelector(
            by_block, Lookahead(neurons=ahead), [(None, cut) for cut in cuts], config, ops
        )

    def cuts(self, scores: Sequence[Tensor], share: float, top_k: bool) -> list[Cut]:
        """Of each layer the cut whose kept neurons hold this share of the squared norm."""
        out = []
        for layer, found in enumerate(scores):
            square = self.data(Block(layer, NEURONS), 0).judge()[1].square()
            if top_k:
                held = square.gather(1, found.argsort(1, descending=True)).double().sum(0).cumsum(0)
                out.append(Cut(int((held < share * held[-1]).sum()) + 1))
            else:
                ordered, order = found.flatten().sort(descending=True)
                held = square.flatten()[order].double().cumsum(0)
                last = int((held < share * held[-1]).sum())
                out.append(Cut(found.shape[1], ordered[last].item()))
        return out

    def result(self, select: Select, scores: Sequence[Tensor], cuts: Sequence[Cut], nbytes: int) -> dict[str, float]:
        """What a setting reads for its MLPs, and does to the model. nbytes: of all predictors."""
        read = float(nbytes)
        for layer, (found, cut) in enumerate(zip(scores, cuts, strict=True)):
            mask, active = cut.mask(found), self.data(Block(layer, NEURONS), 0).judge()[1] > 0
            rows = self.engine.decoder.weights.layers[layer].mlp.rows
            first, others = rows[0, 0].nbytes, rows[0, 1:].nbytes
            read += (mask.sum() * first + (mask & active).sum() * others).item() / len(mask)
        found = self.judge.measure(select(cuts))
        return {
            "mlp_mb": read / 1e6,
            "predictor_mb": nbytes / 1e6,
            "mlp_density": found.mlp_density,
            "kl": found.kl,
            "ppl_increase": found.ppl_increase,
        }

    def predicted(
        self, share: float, rank: int, *, top_k: bool = False, ahead: int = 0, form: RowFormat | None = INT4, **fit: Any
    ) -> dict[str, float]:
        predictors = self.neurons(rank, form, ahead, **fit)
        scores = self.scores(predictors, ahead)
        cuts = self.cuts(scores, share, top_k)
        return self.result(self.selector(predictors, ahead), scores, cuts, sum(p.nbytes for p in predictors))


def open_bench(engine: Engine, text: Sequence[str], folder: Path, tokens: int, judged: int, epochs: int) -> Bench:
    """Draw the windows, collect, and score the text that judges densely."""
    learn, judge = tokens // WINDOW, judged // WINDOW
    aside = max(1, learn // 10)
    drawn = draw(documents(text), engine.tokenizer, WINDOW, learn + aside + judge, SEED)
    if len(drawn) < learn + aside + judge:
        raise ConfigError(f"the text is too short: expected {learn + aside + judge} windows, found {len(drawn)}")
    first, second, third = deal(drawn, [learn, aside, judge])
    collect(engine.decoder, iter(first + second), learn + aside, folder)
    c = engine.config
    collected = Collected(folder, c.hidden_size, c.num_attention_heads, c.intermediate_size)
    return Bench(engine, collected, learn * WINDOW, Judge(engine.decoder, third), epochs)


def ranks(bench: Bench) -> dict[str, dict[str, float]]:
    hidden = bench.engine.config.hidden_size
    return {
        f"rank {rank}, {share:g}": bench.predicted(share, rank)
        for rank in (round(hidden * r) for r in RANKS)
        for share in SHARES
    }


def formats(bench: Bench) -> dict[str, dict[str, float]]:
    """The same trained weights, stored in fewer bits; and ranks of about the same bytes."""
    rank = bench.engine.config.hidden_size // 4
    out = {
        f"rank {rank}, {name}": bench.predicted(0.98, rank, form=None if name == "bf16" else RowFormat.parse(name))
        for name in ("bf16", "int8", "int4", "int4-g128")
    }
    return out | {
        f"rank {r}, {name}": bench.predicted(0.98, r, form=None if name == "bf16" else RowFormat.parse(name))
        for r, name in ((rank // 2, "bf16"), (2 * rank, "int4"))
    }


def lookahead(bench: Bench) -> dict[str, dict[str, float]]:
    rank = bench.engine.config.hidden_size // 4
    return {
        f"{ahead} ahead, {share:g}": bench.predicted(share, rank, ahead=ahead)
        for ahead in (0, 1, 2)
        for share in SHARES
    }


def methods(bench: Bench) -> dict[str, dict[str, float]]:
    """At the same share of the norm, by top-k: what does it take?"""
    engine, share = bench.engine, 0.98
    c, w, ops, rank = engine.config, engine.decoder.weights, engine.decoder.ops, engine.config.hidden_size // 4
    out = {
        "trained, top-k": bench.predicted(share, rank, top_k=True),
        "trained, threshold": bench.predicted(share, rank),
        "SVD, top-k": bench.predicted(share, rank, top_k=True, train=False),
        "SVD, threshold": bench.predicted(share, rank, train=False),
    }
    layers = range(c.num_hidden_layers)

    def pairs(cuts: Sequence[Cut | None]) -> list[tuple[None, Cut | None]]:
        return [(None, cut) for cut in cuts]

    def by_topk(name: str, select: Select, scores: list[Tensor], nbytes: int) -> None:
        out[name] = bench.result(select, scores, bench.cuts(scores, share, True), nbytes)

    inputs = [bench.data(Block(i, NEURONS), 0).judge() for i in layers]
    signs = SignsSelector(pairs([Cut(1)] * len(w.layers)), w, ops)
    by_topk(
        "signs, top-k",
        lambda cuts: SignsSelector(pairs(cuts), w, ops),
        [signs.neuron_scores(i, inputs[i][0]) for i in layers],
        signs.nbytes,
    )
    # The largest inner products are what the search looks for; the index's own bytes are not counted.
    exact = []
    for i in layers:
        mlp = w.layers[i].mlp
        bias = None if mlp.in_bias is None else mlp.in_bias.view(len(mlp.rows), -1)[:, 0].contiguous()
        exact.append(reference.linear(inputs[i][0], mlp.rows[:, 0], bias))
    by_topk("nearest, top-k", lambda cuts: NearestSelector(pairs(cuts), c, w, ops), exact, 0)
    by_topk("oracle, top-k", lambda cuts: OracleSelector(pairs(cuts), c, w, ops), [norms for _, norms in inputs], 0)
    return out


def heads(bench: Bench) -> dict[str, dict[str, float]]:
    """HEADS_KEPT of the heads by the best linear map from inputs further and further before."""
    c, ops, out = bench.engine.config, bench.engine.decoder.ops, {}
    for ahead in (0, 1, 2, 3):
        predictors, cuts = {}, []
        for layer in range(c.num_hidden_layers):
            data = bench.data(Block(layer, HEADS), ahead)
            predictors[Block(layer, HEADS)] = stored(fit_heads(data), INT4)
            scores = predictors[Block(layer, HEADS)].scores(reference.linear, data.judge()[0])
            cuts.append((Cut(c.num_attention_heads, scores.quantile(1 - HEADS_KEPT).item()), None))
        found = bench.judge.measure(PredictorSelector(predictors, Lookahead(heads=ahead), cuts, c, ops))
        out[f"{ahead} ahead"] = {"attn_density": found.attn_density, "kl": found.kl, "ppl_increase": found.ppl_increase}
    return out


def keys_and_values(engine: Engine, pack: str, prompt: Sequence[int], new: int) -> dict[str, dict[str, Any]]:
    """The same pack with lazy and with full keys and values."""
    out, texts = {}, {}
    for kv in ("lazy", "full"):
        sparse = engine.with_mode("sparse", SelectionConfig("predictor", pack=pack, kv=kv))
        best = None
        for _ in range(3):
            made = sparse.generate(list(prompt), max_new_tokens=new, ignore_eos=True)
            best = made.stats if best is None or made.stats.decode_s < best.decode_s else best
            texts[kv] = made.token_ids
        out[kv] = {"mb": sum(best.step_bytes.values()) / 1e6, "ms": 1e3 / best.decode_tok_per_s}
    out["same_tokens"] = list(texts["lazy"]) == list(texts["full"])
    return out


def draw_figure(results: dict[str, Any], path: Path) -> None:
    """KL over bytes by rank; KL over density by lookahead and method."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, part, key in ((left, "ranks", "mlp_mb"), (right, "lookahead", "mlp_density")):
        lines: dict[str, list] = {}
        for name, found in results[part].items():
            lines.setdefault(name.split(",")[0], []).append((found[key], found["kl"]))
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
        axes.set(yscale="log", ylabel="KL to dense, nats")
        axes.grid(alpha=0.3)
    for name, found in results["methods"].items():
        right.plot(found["mlp_density"], found["kl"], "x", label=name)
    left.set(xlabel="MB of MLPs and predictors per token", title="rank, int4, the block's own input")
    right.set(xlabel="MLP density", xscale="log", title="lookahead and method, a quarter of the hidden size")
    left.legend(fontsize=8)
    right.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(
    model: Annotated[str, typer.Argument(help="A folder, hub id, or opt-mini.")],
    text: Annotated[list[str], typer.Option(help="A file, folder, - or hf:ID; may be given several times.")],
    pack: Annotated[str | None, typer.Option(help="For lazy against full keys and values.")] = None,
    tokens: Annotated[int, typer.Option(min=4 * WINDOW, help="To learn from.")] = 32_768,
    judged: Annotated[int, typer.Option(min=WINDOW, help="Tokens that judge.")] = 4_096,
    epochs: Annotated[int, typer.Option(min=1, help="Of training.")] = 2,
    new: Annotated[int, typer.Option(min=1, help="New tokens, for keys and values.")] = 100,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    results: Annotated[Path, typer.Option(help="The record is appended here.")] = RESULTS,
    figure: Annotated[Path, typer.Option(help="The figure's file.")] = FIGURE,
) -> None:
    console = Console(stderr=True, highlight=False)
    try:
        engine = dejavu.load(model, mode="dense", threads=threads, backend="cpu")
        with tempfile.TemporaryDirectory() as folder:
            bench = open_bench(engine, text, Path(folder), tokens, judged, epochs)
            found: dict[str, Any] = {}
            for part in (ranks, formats, lookahead, methods, heads):
                console.print(part.__name__)
                with torch.inference_mode(False):
                    found[part.__name__] = part(bench)
        if pack is not None:
            found["kv"] = keys_and_values(engine, pack, engine.tokenizer.encode("The old house on the hill"), new)
        about = {"model": model, "model_hash": engine.checkpoint.hash, "seed": SEED}
        about |= {"tokens": tokens, "judged": judged, "epochs": epochs, "threads": threads}
        record.append(results, benchmark="ablations", **about, results=found)
        draw_figure(found, figure)
    except (DejavuError, OSError) as error:
        console.print(f"error: {error}")
        raise typer.Exit(1) from error


if __name__ == "__main__":
    sys.exit(typer.run(main))
