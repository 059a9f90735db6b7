"""Decode on one GPU with random weights in public shapes: our dense, exact and sparse steps, and Hugging Face.

    PYTHONPATH=src python benchmarks/decode_gpu.py OUT
    PYTHONPATH=src python benchmarks/decode_gpu.py OUT --shape opt-30b --prompt 128 --no-kernels

Takes eight minutes at most (--limit-s): what there is no time or memory for is named, not started. Needs torch, triton,
transformers and this checkout, no network; matplotlib for the figures. Writes OUT/decode_gpu.jsonl and figures.

Our step is the engine's own, DecodeStep.greedy: one CUDA graph with the choice of the next token, whose result the host
awaits while the next step runs. The sparse step is led by a low-rank
predictor of random weights with look-ahead, by thresholds as a fitted pack's, so its time holds a predictor's cost, at
about the densities asked for; what was read is counted, and every selected neuron is active, so that both its rows are
read. "sparse, in line" runs the predictor in the main stream, "sparse, fixed sets" has none. Random weights show speed,
never quality.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from time import monotonic

import torch
from transformers import DynamicCache, StaticCache

from dejavu.bench import record, shapes
from dejavu.bench.peers.hugging_face import random_hugging_face
from dejavu.bench.random_predictor import predictor_rank, random_predictor
from dejavu.bench.timing import percentiles_ms
from dejavu.checkpoint.layout import Quantization
from dejavu.config import SelectionConfig
from dejavu.engine.bytes import step_bytes
from dejavu.engine.step import DecodeStep
from dejavu.errors import DejavuError
from dejavu.kernels import backend
from dejavu.kernels.quantized import RowFormat
from dejavu.kernels.triton import tuning
from dejavu.model.decoder import Decoder
from dejavu.selection import make_selector

DTYPE = torch.bfloat16
# Name of a shape on the command line: the shape, and the format of its matrices.
SUBJECTS = ("opt-6.7b", "opt-13b", "opt-30b", "opt-66b", "opt-175b:int4")
PROMPTS = (128, 256, 512, 1024)
BATCHES = (1, 2, 4, 8, 16, 32)
PLAIN = ("dense", "exact", "sparse")
COSTS = ("sparse, in line", "sparse, fixed sets")
# Seconds that a part needs at least, so that it is not begun in vain.
NEEDS = {"ours": 20, "eager": 15, "kernels": 20, "batches": 25, "compiled": 60}


class Subject:
    """A model of random weights, its predictor, and its timed steps at one batch size."""

    def __init__(self, name: str, args: argparse.Namespace, *, layers: int | None = None):
        shape, _, form = name.partition(":")
        self.name, self.args, self.ops = name, args, backend("triton")
        self.quantized = RowFormat.parse(form) if form else None
        settings = shapes.shape(shape)
        self.config = c = shapes.parse(settings | {"num_hidden_layers": layers or settings["num_hidden_layers"]})
        quantization = Quantization(self.quantized) if self.quantized else None
        weights = shapes.random_weights(c, DTYPE, self.ops, args.seed, args.mlp_density, quantization)
        self.decoder = Decoder(c, weights, self.ops)
        # Projecting pending keys and values from 4 bits takes longer than reading all of them at once.
        self.lazy = self.quantized is None or self.quantized.bits > 4
        kv = "lazy" if self.lazy else "full"
        self.selection = SelectionConfig("static", args.mlp_density, args.attn_density, kv=kv)
        self.rank = predictor_rank(c)
        self.predictor = random_predictor(c, self.ops, self.selection, DTYPE, self.quantized, by_threshold=True)

    def _selector(self, mode: str):
        if mode != "sparse, fixed sets":
            return self.predictor
        c, generator = self.config, torch.Generator(self.args.device).manual_seed(self.args.seed)
        importance = [
            tuple(
                torch.rand(n, device=self.args.device, generator=generator)
                for n in (c.num_attention_heads, c.intermediate_size)
            )
            for _ in range(c.num_hidden_layers)
        ]
        return make_selector(self.selection, c, self.decoder.weights, self.ops, importance=importance)

    def measure(self, mode: str, prompts: tuple[int, ...], batch: int = 1) -> Iterator[tuple[int, dict]]:
        """Times and bytes read of a mode, after each prompt length: one step serves them all."""
        d, new = self.decoder, self.args.new
        lazy = mode.startswith("sparse") and self.lazy
        cache = d.new_cache(batch, max(prompts) + new + 8, self.selection.pending if lazy else None)
        noise = [cache.k, cache.v, *([cache.hidden] if lazy else [])]
        shapes.fill_noise([(tensor, 1.0) for tensor in noise], self.args.seed)
        # A perfect predictor's neurons are all active; without one, the share that the model has.
        share = 6.0 if mode.startswith("sparse") else NormalDist().inv_cdf(self.args.mlp_density)
        for layer in d.weights.layers:
            layer.mlp.in_bias.fill_(share)
        with self.ops.sequential() if mode == "sparse, in line" else nullcontext():
            kind, selector = ("sparse", self._selector(mode)) if mode.startswith("sparse") else (mode, None)
            step = DecodeStep(d, cache, batch, kind, selector)
            for prompt in prompts:
                yield prompt, self._time(step, prompt, mode)

    def _time(self, step: DecodeStep, prompt: int, mode: str) -> dict:
        """As `DecodeStep.greedy` generates, behind keys and values that stand for a prompt."""
        c, cache, counts, new = self.config, step.cache, step.counts, self.args.new
        for row in range(step.size):
            cache.truncate(row, 0)
            cache.append(row, [0] * prompt)
        if cache.kv_len is not None:
            cache.kv_len.fill_(prompt)
        seconds = []
        with closing(step.greedy(list(range(step.size)), list(range(step.size)), new + 4)) as chosen:
            next(chosen), next(chosen)  # the first captures; the step after the one that is awaited runs already
            began = monotonic()
            before = counts.rows_read.cpu(), counts.attn_read.cpu(), counts.steps
            for _ in range(new):
                next(chosen)
                ended = monotonic()
                seconds.append(ended - began)
                began = ended
        steps = counts.steps - before[2]
        read, attn_read = (counts.rows_read.cpu() - before[0]) / steps, (counts.attn_read.cpu() - before[1]) / steps
        parts = step_bytes(
            c,
            self.decoder.weights,
            attended=prompt + new / 2,
            batch=step.size,
            rows_read=read,
            attn_read=attn_read,
            predictor_bytes=self.predictor.nbytes if mode in ("sparse", "sparse, in line") else 0,
        )
        return {**percentiles_ms(seconds), "bytes_per_token": parts, **self._densities(read, attn_read[:, 0])}

    def _densities(self, read: torch.Tensor, heads: torch.Tensor) -> dict[str, float]:
        inter, every = self.config.intermediate_size, self.config.num_attention_heads
        return {
            "mlp_density": (read[:, 0].mean() / inter).item(),
            "mlp_out_density": (read[:, 1].mean() / inter).item(),
            "attn_density": (heads.mean() / every).item(),
        }


def times(step: Callable[[], None], count: int, device: str) -> list[float]:
    """Seconds between consecutive steps; the host runs ahead of a GPU."""
    if device != "cuda":
        marks = [monotonic() for _ in range(count + 1) if step() is None]
        return [b - a for a, b in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]


@torch.inference_mode()
def hugging_face(shape: str, prompts: tuple[int, ...], new: int, seed: int) -> Iterator[tuple[int, dict]]:
    """Hugging Face as its users have it: eager, with the cache that grows."""
    model = random_hugging_face(shapes.shape(shape), DTYPE, seed, "cuda")
    ids = torch.zeros(1, 1, dtype=torch.long, device="cuda")
    for prompt in prompts:
        cache = DynamicCache(config=model.config)
        model(input_ids=ids.expand(1, prompt), past_key_values=cache, use_cache=True, logits_to_keep=1)

        def step(cache=cache) -> None:
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids.copy_(out.logits[:, -1].argmax(-1, keepdim=True))

        for _ in range(6):
            step()
        yield prompt, percentiles_ms(times(step, new, "cuda"))


@torch.inference_mode()
def compiled_hugging_face(shape: str, prompts: tuple[int, ...], new: int, seed: int) -> Iterator[tuple[int, dict]]:
    """Hugging Face at its best: a static cache, the step compiled, and captured as one CUDA graph.

    The graph is captured here, as "reduce-overhead" refuses steps that change the cache's length counter.
    """
    model = random_hugging_face(shapes.shape(shape), DTYPE, seed, "cuda")
    capacity = max(prompts) + new + 16
    cache = StaticCache(config=model.config, max_cache_len=capacity)
    ids, position = torch.zeros(2, 1, 1, dtype=torch.long, device="cuda")
    # A mask of one size keeps the shapes static; what lies ahead of the token is hidden by causality.
    mask = torch.ones(1, capacity, dtype=torch.long, device="cuda")
    fixed = {"past_key_values": cache, "use_cache": True, "attention_mask": mask, "logits_to_keep": 1}
    # The cache is allocated by its first use, which is not to be compiled.
    model(input_ids=ids, position_ids=position, **fixed)
    forward = torch.compile(model, dynamic=False)

    def step() -> None:
        out = forward(input_ids=ids, position_ids=position, **fixed)
        ids.copy_(out.logits[:, -1].argmax(-1, keepdim=True))
        position.add_(1)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for prompt in prompts:
        position.fill_(prompt)
        for layer in cache.layers:
            layer.cumulative_length.fill_(prompt)
        for _ in range(3):
            graph.replay()
        yield prompt, percentiles_ms(times(graph.replay, new, "cuda"))


class Run:
    """One call: its clock, its records, what it left out."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.until, self.rows, self.notes = args, monotonic() + args.limit_s, [], []
        self.limit = None
        if args.device == "cuda":
            self.limit = backend("triton").read_bandwidth(4 << 30, 5)
            self.rows_header = f"{torch.cuda.get_device_name()}: reads {self.limit / 1e9:.0f} GB/s"
            print(self.rows_header, flush=True)

    def has_time(self, what: str, part: str) -> bool:
        left = self.until - monotonic()
        if left < NEEDS[part]:
            self.note(f"{what}: not started, {left:.0f} s were left")
        return left >= NEEDS[part]

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(text, flush=True)

    def add(self, shape: str, mode: str, prompt: int, result: dict, batch: int = 1, **other) -> None:
        read = sum(result.get("bytes_per_token", {}).values())
        share = read / result["p50_ms"] * 1e3 / self.limit if read and self.limit else None
        row = {"shape": shape, "mode": mode, "prompt": prompt, "batch": batch, "bandwidth_share": share, **result}
        self.rows.append(row)
        record.append(
            self.args.out / "decode_gpu.jsonl",
            **{"benchmark": "decode_gpu", "weights": "random", "dtype": shape.partition(":")[2] or "bf16"},
            **{"new_tokens": self.args.new, "seed": self.args.seed, "programmatic_launch": tuning.OVERLAP},
            **{"read_bandwidth_bytes_per_s": self.limit, **other, **row},
        )
        share = f"{share:6.1%}" if share else "     -"
        print(f"{shape:14} {mode:19} prompt {prompt:5} batch {batch:3} {result['p50_ms']:8.3f} ms {share}", flush=True)

    def p50(self, shape: str, mode: str, prompt: int, batch: int = 1) -> float | None:
        key = (shape, mode, prompt, batch)
        return next((r["p50_ms"] for r in self.rows if (r["shape"], r["mode"], r["prompt"], r["batch"]) == key), None)

    # Parts

    def ours(self, name: str) -> None:
        if not self.has_time(name, "ours"):
            return
        subject = Subject(name, self.args)
        fields = {"predictor_rank": subject.rank, "predictor_bytes": subject.predictor.nbytes}
        for mode in (*PLAIN, *COSTS):
            prompts = self.args.prompt if mode in PLAIN else self.args.prompt[:1]
            for prompt, result in subject.measure(mode, prompts):
                self.add(name, mode, prompt, result, **(fields if mode.startswith("sparse") else {}))

    def batches(self, name: str) -> None:
        if not self.has_time(f"{name} in batches", "batches"):
            return
        subject = Subject(name, self.args)
        for batch in self.args.batch:
            for mode in ("dense", "sparse"):
                if self.has_time(f"{name}, batch {batch}", "ours") and (batch > 1 or not self.p50(name, mode, 128)):
                    for prompt, result in subject.measure(mode, (128,), batch):
                        self.add(name, mode, prompt, result, batch)

    def eager(self, name: str) -> None:
        config = shapes.parse(shapes.shape(name))
        need = 2 * 12 * config.num_hidden_layers * config.hidden_size**2 + (4 << 30)
        if need > torch.cuda.mem_get_info()[0]:
            self.note(f"{name}, HF eager: needs {need / 1e9:.0f} GB, which this GPU does not have free")
        elif self.has_time(f"{name}, HF eager", "eager"):
            for prompt, result in hugging_face(name, self.args.prompt, 16, self.args.seed):
                self.add(name, "HF eager", prompt, result)

    def compiled(self, name: str) -> None:
        """In a process of its own, which can be stopped: how long a compilation takes is not ours to say."""
        what = f"{name}, HF compiled"
        if not self.has_time(what, "compiled"):
            return
        try:
            done = child(self.args, "compiled", name, self.until - monotonic() - 5)
        except subprocess.TimeoutExpired:
            self.note(f"{what}: stopped, out of time")
            return
        if done.returncode:
            self.note(f"{what}: {done.stderr.strip().splitlines()[-1][:200]}")
        for line in done.stdout.splitlines():
            if line.startswith("{"):
                result = json.loads(line)
                self.add(name, "HF compiled", result.pop("prompt"), result)

    def kernels(self, name: str) -> None:
        import kernels_gpu

        if not self.has_time(f"{name}, kernels", "kernels"):
            return
        c = shapes.parse(shapes.shape(name))
        for op, make in kernels_gpu.mlp_rows(backend("triton"), c.hidden_size, c.intermediate_size):
            result = {"shape": name, "op": op, **kernels_gpu.run(make, self.limit)}
            record.append(self.args.out / "kernels_gpu.jsonl", dtype=str(DTYPE), read_bandwidth=self.limit, **result)
            if "error" in result:
                self.note(f"{name} {op}: {result['error'].splitlines()[0]}")
            else:
                self.add(name, op, 0, result, density=result["density"])

    def table(self) -> None:
        columns = ("shape", "prompt", "dense ms", "of bw", "exact ms", "sparse ms", "of bw", "x dense")
        columns += ("x HF eager", "x compiled")
        print(f"\n{self.rows_header if self.limit else 'no GPU'}; random weights, batch 1")
        print("".join(f"{c:>14}" if i == 0 else f"{c:>11}" for i, c in enumerate(columns)) + "  predictor")
        for name in self.args.shape:
            for prompt in self.args.prompt:
                row = {r["mode"]: r for r in self.rows if (r["shape"], r["prompt"], r["batch"]) == (name, prompt, 1)}
                if "sparse" not in row:
                    continue
                ms = {mode: r["p50_ms"] for mode, r in row.items()}
                line = [f"{name:>14}", f"{prompt:11}"]
                for mode in PLAIN:
                    line.append(f"{ms[mode]:11.2f}")
                    if mode != "exact":
                        line.append(f"{row[mode]['bandwidth_share'] or 0:11.0%}")
                line.append(f"{ms['dense'] / ms['sparse']:11.2f}")
                for other in ("HF eager", "HF compiled"):
                    line.append(f"{ms[other] / ms['sparse']:11.2f}" if other in ms else f"{'-':>11}")
                if COSTS[1] in ms:
                    beside, inline = (1 - ms[COSTS[1]] / ms[mode] for mode in ("sparse", COSTS[0]))
                    line.append(f"  {beside:.1%} beside, {inline:.1%} in line")
                print("".join(line))


def child(args: argparse.Namespace, part: str, name: str, timeout: float) -> subprocess.CompletedProcess:
    command = [sys.executable, __file__, str(args.out), "--child", part, "--shape", name]
    command += [text for prompt in args.prompt for text in ("--prompt", str(prompt))]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def warm_up(args: argparse.Namespace) -> None:
    """Fill Triton's cache: every subject's kernels are compiled at once, each in a process of its own."""
    command = [sys.executable, __file__, str(args.out), "--child", "compile", "--new", "1", "--shape"]
    started = [
        subprocess.Popen([*command, name, *extra], stdout=subprocess.DEVNULL)
        for name in args.shape
        for extra in ([], *([["--batch", str(b)] for b in args.batch if b > 1] if name == args.shape[0] else []))
    ]
    deadline = monotonic() + 100
    for process in started:
        try:
            process.wait(max(1, deadline - monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def run_child(args: argparse.Namespace) -> None:
    (name,) = args.shape
    if args.child == "compiled":
        for prompt, result in compiled_hugging_face(name, args.prompt, 16, args.seed):
            print(json.dumps({"prompt": prompt, **result}), flush=True)
        return
    subject = Subject(name, args, layers=2)
    for mode in ("dense", "sparse") if args.batch else (*PLAIN, COSTS[1]):
        for _ in subject.measure(mode, args.prompt if not args.batch else (128,), args.batch[0] if args.batch else 1):
            pass


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> int:
    began = monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the records and figures")
    parser.add_argument("--shape", action="append", help=f"NAME or NAME:FORMAT; default: {', '.join(SUBJECTS)}")
    parser.add_argument("--prompt", action="append", type=int, help="tokens of the prompt; default: 128 to 1024")
    parser.add_argument("--batch", action="append", type=int, help="of the first shape; default: 1 to 32")
    parser.add_argument("--new", type=int, default=32, help="new tokens that are timed")
    parser.add_argument("--mlp-density", type=float, default=0.10)
    parser.add_argument("--attn-density", type=float, default=0.42)
    parser.add_argument("--limit-s", type=float, default=450, help="of the whole call")
    parser.add_argument("--seed", type=int, default=0)
    for part in ("kernels", "batches", "hugging-face", "compiled", "overlap"):
        parser.add_argument(f"--no-{part}", action="store_true")
    parser.add_argument("--child", choices=("compile", "compiled"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.shape, args.prompt = tuple(args.shape or SUBJECTS), tuple(args.prompt or PROMPTS)
    if args.no_overlap:
        tuning.OVERLAP = False
    if args.child:
        run_child(args)
        return 0
    args.batch = tuple(args.batch or BATCHES)
    try:
        if args.device == "cuda":
            warm_up(args)
            print(f"kernels compiled after {monotonic() - began:.0f} s", flush=True)
        run = Run(args)
        run.until = began + args.limit_s
        for name in args.shape:
            for part in (run.ours, *((run.eager,) if not args.no_hugging_face and ":" not in name else ())):
                try:
                    part(name)
                except torch.OutOfMemoryError as error:
                    run.note(f"{name}: {str(error).splitlines()[0]}")
                free()
        if not args.no_kernels:
            run.kernels("opt-30b" if "opt-30b" in args.shape else args.shape[0].partition(":")[0])
            free()
        if not args.no_batches:
            run.batches(args.shape[0])
            free()
        if not (args.no_hugging_face or args.no_compiled):
            for name in args.shape:
                if ":" not in name:
                    run.compiled(name)
    except DejavuError as error:
        parser.error(str(error))
    try:
        from figures_gpu import draw

        draw(run.rows, args.out)
    except ImportError:
        run.note("no figures: matplotlib is not here")
    run.table()
    for note in run.notes:
        print(note)
    print(f"{monotonic() - began:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
