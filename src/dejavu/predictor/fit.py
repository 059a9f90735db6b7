"""From a model and text to a sparsity pack: collect, train, calibrate, each resumable, the pack whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dejavu.artifacts import atomic_write, check_new, locked, read_json, write_json, write_tensors
from dejavu.config import ZEROING_ACTIVATIONS
from dejavu.device import free_memory
from dejavu.engine.bytes import step_bytes
from dejavu.engine.engine import Engine
from dejavu.errors import CapacityError, ConfigError, PackError
from dejavu.predictor import calibrate
from dejavu.predictor.collect import Collected, collect, damaged, needed_bytes
from dejavu.predictor.draw import deal, draw
from dejavu.predictor.settings import FitConfig
from dejavu.predictor.train import FIT_TOKENS, Data, block_data, fit_heads, fit_neurons, stored
from dejavu.progress import Progress, silent
from dejavu.selection.block import HEADS, NEURONS, Block
from dejavu.selection.pack import MANIFEST, TENSORS, Pack, Point, load_pack
from dejavu.selection.predictor import Lookahead, Predictor

Stage = Literal["collect", "train", "calibrate"]
# Expected divergences of the frontier's points, nats per token, and halvings of the price in search of the bound.
LADDER, HALVINGS = tuple(np.geomspace(1e-4, 0.3, 8).tolist()), 4
# Tokens attended to in the bytes of a point.
ATTENDED = 256


def fit(
    engine: Engine,
    documents: Iterable[str],
    out: str | os.PathLike,
    config: FitConfig | None = None,
    *,
    check: Iterable[str] | None = None,
    stage: Stage | None = None,
    progress: Progress = silent,
) -> Pack | None:
    """Make a pack for a model.

    Work in progress lies in `OUT.work`; a call with the same settings goes on where the last one stopped, to the same
    pack, and removes it in the end.

    Args:
        engine: the model, in its dense or exact mode.
        documents: text to learn from, and, of documents of its own, to choose cuts and judge by; read on the first
            call only.
        check: other text to choose cuts and judge by: the bound then holds for text like that.
        out: the pack's folder, which must not exist.
        stage: end after this stage.
        progress: told by stage: windows, layers, measurements.
    Returns: the pack, or None where `stage` ended early.
    Raises: ConfigError for settings or text that cannot do, CapacityError where disk or memory is too small, PackError
        where the bound cannot be kept; it says what can be reached.
    """
    config = (config or FitConfig()).within(engine.config.context)
    out = Path(out)
    check_new(out)
    activation = engine.config.activation
    if config.label_error == 0 and activation not in ZEROING_ACTIVATIONS:
        raise ConfigError(
            f"{activation} is never zero, so every neuron is active: give a label error, say 0.1; then those count as "
            "active that must stay so that no more than this share of the norm of the MLP's output is left out"
        )
    with locked(out.with_name(out.name + ".work")) as folder:
        check_new(out)  # another fit may just have ended
        return _run(_Work(folder, engine, config, progress), documents, check, out, stage)


def _run(
    work: _Work, documents: Iterable[str], check: Iterable[str] | None, out: Path, stage: Stage | None
) -> Pack | None:
    try:
        work.prepare(documents, check)
        work.collect()
        if stage == "collect":
            return None
        predictors = work.train()
        if stage == "train":
            return None
        pack = work.calibrate(predictors)
        pack.save(out)
    except OSError as error:
        raise ConfigError(
            f"{work.folder}: cannot be read or written ({error}); free some space, and the same call goes on"
        ) from error
    shutil.rmtree(work.folder)
    return pack


def needs(engine: Engine, config: FitConfig) -> dict[str, int]:
    """Disk and memory, in bytes, that `fit` takes besides the model: `disk`, `memory`."""
    c = engine.config
    config = config.within(c.context)
    tokens = _collected_windows(config) * config.window
    judged = config.calibration_tokens * c.vocab_size * 2
    chunk = config.window * c.vocab_size * 4 * 3
    training = FIT_TOKENS * (c.hidden_size + c.intermediate_size) * 4 * 3
    options = (tokens - config.tokens) * c.intermediate_size * 4 * 6
    return {"disk": needed_bytes(engine.decoder, tokens), "memory": max(judged + chunk, training, options)}


class _Work:
    """The folder of a fit in progress."""

    def __init__(self, folder: Path, engine: Engine, config: FitConfig, progress: Progress):
        self.folder, self._engine, self._config, self._progress = folder, engine, config, progress
        self._decoder = engine.decoder
        self._lookahead = Lookahead(config.heads_ahead, config.neurons_ahead)

    def prepare(self, documents: Iterable[str], check: Iterable[str] | None) -> None:
        """Make the folder and put the tokens of all stages into it, or check that they are those of this run."""
        assert self._engine.checkpoint is not None
        settings = {"settings": asdict(self._config), "hash": self._engine.checkpoint.hash}
        state = self.folder / "settings.json"
        if state.exists():
            if read_json(state) != settings:
                raise ConfigError(
                    f"{self.folder}: holds the work of a fit with other settings; remove it to begin anew"
                )
            return
        need = needs(self._engine, self._config)
        if need["memory"] > (free := free_memory()):
            raise CapacityError(
                f"fit needs {need['memory'] >> 20} MB of memory, {free >> 20} MB are free; use fewer calibration_tokens"
            )
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if need["disk"] > (free := shutil.disk_usage(self.folder.parent).free):
            raise CapacityError(
                f"fit needs {need['disk'] >> 20} MB of disk, {free >> 20} MB are free; use fewer tokens"
            )
        learned, judged = _collected_windows(self._config), [self._judged_windows] * 2
        if check is None:
            found = self._draw(documents, [learned, *judged])
        else:
            found = self._draw(documents, [learned]) + self._draw(check, judged)
        self.folder.mkdir(exist_ok=True)
        with atomic_write(self.folder / "windows.npy", "wb") as file:
            np.save(file, np.concatenate(found), allow_pickle=False)
        write_json(state, settings)

    def _draw(self, documents: Iterable[str], sizes: list[int]) -> list[np.ndarray]:
        """Windows for each purpose, (size, window) int32."""
        config, count = self._config, sum(sizes)
        found = draw(documents, self._engine.tokenizer, config.window, count, config.seed)
        if len(found) < count:
            raise ConfigError(
                f"the text is too short: expected {count} windows of {config.window} tokens in single documents, "
                f"found {len(found)}; give more text, or use fewer tokens"
            )
        return [np.array(windows, np.int32) for windows in deal(found, sizes)]

    @property
    def _judged_windows(self) -> int:
        return self._config.calibration_tokens // self._config.window

    def _windows(self, first: int, count: int) -> list[list[int]]:
        path = self.folder / "windows.npy"
        try:
            windows = np.load(path, allow_pickle=False)
            wanted = _collected_windows(self._config) + 2 * self._judged_windows, self._config.window
            if windows.shape != wanted:
                raise ValueError(f"expected {wanted[0]} windows of {wanted[1]} tokens")
        except (ValueError, EOFError, OSError) as error:
            raise damaged(path, error, self.folder) from error
        return windows[first : first + count].tolist()

    def collect(self) -> None:
        count = _collected_windows(self._config)
        collect(
            self._decoder,
            iter(self._windows(0, count)),
            count,
            self.folder / "collected",
            label_error=self._config.label_error,
            progress=self._progress,
        )

    def _collected(self) -> Collected:
        c = self._engine.config
        return Collected(self.folder / "collected", c.hidden_size, c.num_attention_heads, c.intermediate_size)

    @property
    def _learned_rows(self) -> int:
        return self._config.tokens // self._config.window * self._config.window

    def _data(self, collected: Collected, block: Block) -> Data:
        return block_data(collected, block, self._lookahead.source(block), self._learned_rows)

    def train(self) -> dict[Block, Predictor]:
        c, collected, predictors = self._engine.config, self._collected(), {}
        for layer in range(c.num_hidden_layers):
            path = self.folder / f"layer{layer}.safetensors"
            if not path.exists():
                with torch.inference_mode(False), torch.random.fork_rng():
                    tensors = self._train_layer(collected, layer)
                write_tensors(path, tensors)
            try:
                tensors = load_file(path)
            except (SafetensorError, ValueError, OSError) as error:
                raise damaged(path, error, self.folder) from error
            for part, units in enumerate(("heads", "neurons")):
                parameters = (tensors.get(f"{units}.{name}") for name in ("down", "up", "bias"))
                predictors[Block(layer, part)] = stored(tuple(parameters), self._config.row_format)
            self._progress("train", layer + 1, c.num_hidden_layers)
        return predictors

    def _train_layer(self, collected: Collected, layer: int) -> dict[str, torch.Tensor]:
        config = self._config
        heads = fit_heads(self._data(collected, Block(layer, HEADS)))
        block = Block(layer, NEURONS)
        neurons = fit_neurons(
            self._data(collected, block),
            collected.inputs(block, slice(0, min(FIT_TOKENS, self._learned_rows))),
            self._decoder.weights.layers[layer].mlp,
            config.rank,
            epochs=config.epochs,
            train=config.train,
            seed=config.seed + layer,
            form=config.row_format,
        )
        parts = {"heads": heads, "neurons": neurons}
        return {
            f"{part}.{name}": tensor.contiguous()
            for part, parameters in parts.items()
            for name, tensor in zip(("down", "up", "bias"), parameters, strict=True)
            if tensor is not None
        }

    def _calibrated(self, path: Path) -> dict[str, dict[str, Any]]:
        """What was measured before, as JSON."""
        if not path.exists():
            return {"probes": {}, "measured": {}}
        saved, names = read_json(path), {field.name for field in fields(calibrate.Measured)}
        probes, measured = saved.get("probes"), saved.get("measured")
        if (
            not (isinstance(probes, dict) and isinstance(measured, dict))
            or not all(type(value) in (int, float) for value in probes.values())
            or not all(isinstance(found, dict) and found.keys() == names for found in measured.values())
        ):
            raise damaged(path, "expected probes and measured", self.folder)
        return saved

    def calibrate(self, predictors: dict[Block, Predictor]) -> Pack:
        c, config, weights, ops = self._engine.config, self._config, self._decoder.weights, self._decoder.ops
        blocks = Block.all(c.num_hidden_layers)
        collected = self._collected()
        with torch.inference_mode():
            options = {
                b: calibrate.block_options(b, p, self._data(collected, b), weights) for b, p in predictors.items()
            }
            first = _collected_windows(config)
            judge = calibrate.Judge(self._decoder, self._windows(first, self._judged_windows))
            select = calibrate.make_select(predictors, self._lookahead, c, ops)
            search = calibrate.Search(options, blocks)
            state = self.folder / "calibrated.json"
            saved = self._calibrated(state)
            steps, done = len(blocks) + len(LADDER) + HALVINGS + 1, 0

            def remember(kind: str, key: str, value: Callable[[], Any]) -> Any:
                nonlocal done
                if key not in saved[kind]:
                    saved[kind][key] = value()
                    write_json(state, saved)
                done += 1
                self._progress("calibrate", min(done, steps), steps)
                return saved[kind][key]

            for b in options:
                search.set_sensitivity(b, remember("probes", str(b.number), lambda b=b: search.probe(b, judge, select)))
            rest = self._rest_bytes(options)

            def measure(judge: calibrate.Judge, name: str, price: float) -> Point:
                chosen = search.choose(price)
                cuts = search.cuts(chosen)
                found = remember("measured", f"{name}{price!r}", lambda: asdict(judge.measure(select(cuts))))
                return calibrate.as_point(cuts, calibrate.Measured(**found), chosen, rest)

            points = {price: measure(judge, "", price) for price in map(search.price, LADDER)}
            # The density falls as the price rises; what else may be bound rises.
            falls = config.bound == "mlp_density"
            self._narrow(points, falls, lambda price: measure(judge, "", price))
            # The text that judged so far also chose. Other text has the last word, and steps back if it must.
            del judge
            judge = calibrate.Judge(self._decoder, self._windows(first + self._judged_windows, self._judged_windows))
            checked = {}
            for price in sorted((p for p in points if self._within(points[p])), reverse=not falls):
                checked[price] = measure(judge, "check ", price)
                if self._within(checked[price]):
                    break
            else:
                raise self._unreachable(checked.values())
        return self._pack(predictors, points, price, checked[price], options)

    def _narrow(self, points: dict[float, Point], falls: bool, measure: Callable[[float], Point]) -> None:
        """Measure prices between the best that keeps the bound and the next that breaks it. Raises: as `calibrate`."""
        preferred = sorted(points, reverse=not falls)
        best = next((p for p in preferred if self._within(points[p])), None)
        if best is None:
            raise self._unreachable(points.values())
        worst = next(iter(preferred[: preferred.index(best)][-1:]), None)
        for _ in range(HALVINGS if worst is not None else 0):
            middle = float(np.sqrt(best * worst))
            points[middle] = measure(middle)
            best, worst = (middle, worst) if self._within(points[middle]) else (best, middle)

    def _within(self, point: Point) -> bool:
        return point.measured[self._config.bound] <= self._config.limit

    def _unreachable(self, points: Iterable[Point]) -> PackError:
        bound = self._config.bound
        best = min(point.measured[bound] for point in points)
        return PackError(
            f"no setting keeps {bound} within {self._config.limit:g}: the best reaches {best:.4g}, so no pack is "
            "written; allow more, or collect more tokens"
        )

    def _rest_bytes(self, options: dict[Block, list[calibrate.Option]]) -> float:
        """What a step reads besides the units and their predictors."""
        c, w = self._engine.config, self._decoder.weights
        everything = sum(step_bytes(c, w, attended=ATTENDED).values())
        units = sum(w.layers[b.layer].mlp.rows.nbytes for b in options if b.part == NEURONS)
        heads = sum(o[-1].bytes for b, o in options.items() if b.part == HEADS)
        return everything - units - heads

    def _pack(
        self,
        predictors: dict[Block, Predictor],
        points: dict[float, Point],
        price: float,
        checked: Point,
        options: dict[Block, list[calibrate.Option]],
    ) -> Pack:
        order = sorted(points, key=lambda p: -points[p].measured["bytes"])
        used = {Block.of(n) for point in points.values() for n, cut in enumerate(point.cuts) if cut is not None}
        checkpoint = self._engine.checkpoint
        made = {
            "settings": asdict(self._config),
            "ranks": [p.down.shape[0] for b, p in sorted(predictors.items()) if p.down is not None],
            "checked": dict(checked.measured),
            "active_density": [o[-1].precision for b, o in sorted(options.items()) if b.part == NEURONS],
            "attended": ATTENDED,
        }
        return Pack(
            {"name": checkpoint.name, "hash": checkpoint.hash},
            self._lookahead,
            {b: p for b, p in predictors.items() if b in used},
            [points[p] for p in order],
            order.index(price),
            made,
        )


def tune(source: str | os.PathLike, out: str | os.PathLike, quality: float) -> Pack:
    """A pack whose default is another point of its frontier; nothing is trained.

    Raises: as load_pack and Pack.point.
    """
    pack = load_pack(source)
    pack.default = pack.points.index(pack.point(quality))
    pack.save(out)
    return pack


def push(source: str | os.PathLike, repo: str, *, private: bool = False) -> str:
    """Upload a pack to the Hugging Face Hub; returns its address.

    Raises: PackError where it is no pack, ConfigError where the hub does not take it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    load_pack(source)
    api = HfApi()
    try:
        api.create_repo(repo, exist_ok=True, private=private)
        return str(
            api.upload_folder(repo_id=repo, folder_path=source, allow_patterns=[MANIFEST, TENSORS, "frontier.*"])
        )
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ConfigError(f"{repo}: cannot be uploaded ({' '.join(str(error).split())[:300]})") from error


def _collected_windows(config: FitConfig) -> int:
    """A tenth more than what is learned from, to choose cuts by."""
    return config.tokens // config.window + max(1, config.tokens // config.window // 10)
