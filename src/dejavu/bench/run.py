"""One benchmark: settings of our engine and peers in turn, in one run, with the bandwidth of the machine beside."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from os import PathLike
from statistics import median
from typing import Any, NamedTuple

from dejavu.bench.bandwidth import read_bandwidth
from dejavu.bench.decode import PROFILED, Dejavu, decode_times, random_prompt
from dejavu.bench.peers import peer as find_peer
from dejavu.bench.peers.process import PeerDied, PeerProcess
from dejavu.bench.settings import Setting, Subject
from dejavu.bench.timing import Run, interleave, percentiles_ms
from dejavu.device import default_threads, free_memory
from dejavu.engine.crossover import choosing_ms
from dejavu.kernels.base import Backend
from dejavu.progress import Progress, silent
from dejavu.selection.block import Block

# First steps of every run, which don't count.
SKIP = 4
# Tokens of a run beside the prompt and those that are timed.
EXTRA = SKIP + PROFILED
# How much of the free memory models may fill when they are held side by side.
MEMORY_SHARE = 0.8
# What a bundle of weights takes beside itself while it is held: peers pack theirs anew.
PEER_COPIES = 2
_PASS = "read bandwidth"


class PeerRun(NamedTuple):
    """A peer by name, with the format of its weights and the length of the prompt; batch 1."""

    peer: str
    weights: str
    prompt: int = 128

    @property
    def name(self) -> str:
        return f"{find_peer(self.peer).label} {self.weights} B1 P{self.prompt}"


# Called after each round with the fields of a record so far.
Save = Callable[[dict[str, Any]], None]


def measure(
    subject: Subject,
    ops: Backend,
    settings: Sequence[Setting],
    peers: Sequence[PeerRun] = (),
    *,
    new_tokens: int = 64,
    repeat: int = 5,
    threads: int | None = None,
    work: str | PathLike | None = None,
    progress: Progress = silent,
    save: Save | None = None,
) -> dict[str, Any]:
    """Time every setting and peer, interleaved; what does not fit into memory together is built anew each round.

    Peers run in processes of their own. One that dies has a result that says so under "died", and the others go on.

    Args:
        ops: the kernel backend of the subject; its threads and PyTorch's are the caller's to set.
        new_tokens: timed in every run of every round.
        threads: of the peers that take a number; None: all.
        work: a folder for the peers' converted models, which stay there; None: a temporary one.
        progress: told before each run: its name, and of all runs how many are done.
    Returns: the fields of a record; "results" has one entry a run, by name.
    Raises: ConfigError, before anything long, for what cannot run.
    """
    for setting in settings:
        setting.check(subject.config, new_tokens + EXTRA)
    for other in peers:
        find_peer(other.peer).check(other.weights, subject.source.config)
        Setting("dense", None, prompt=other.prompt).check(subject.config, new_tokens + SKIP)
    with tempfile.TemporaryDirectory() if work is None else nullcontext(work) as folder:
        bench = _Bench(subject, ops, new_tokens, threads or default_threads(), folder)
        return bench.run(settings, peers, repeat, progress, save)


class _Bench:
    def __init__(self, subject: Subject, ops: Backend, new_tokens: int, threads: int, folder: str | PathLike):
        self._subject, self._ops, self._new = subject, ops, new_tokens
        self._threads, self._folder = threads, folder
        self._prefills_s: dict[str, list[float]] = {}  # by run: of every round, warm-up too
        self._facts: dict[str, dict[str, Any]] = {}  # by run: what it says of itself, beside times

    def run(
        self,
        settings: Sequence[Setting],
        peers: Sequence[PeerRun],
        repeat: int,
        progress: Progress,
        save: Save | None,
    ) -> dict[str, Any]:
        formats = dict.fromkeys(setting.weights for setting in settings)
        builds = [self._bandwidth]
        builds += [partial(self._ours, form, [s for s in settings if s.weights == form]) for form in formats]
        builds += [partial(self._peer, other) for other in peers]
        size = self._subject.weight_bytes
        held = sum(map(size, formats)) + PEER_COPIES * sum(size("bf16") for _ in peers)
        keep = held < MEMORY_SHARE * free_memory(self._ops.device)
        warmup = 1 if keep else 0
        total, done = (repeat + warmup) * (1 + len(settings) + len(peers)), iter(range(1 << 30))

        def fields(times: dict[str, list[float]], rounds: int) -> dict[str, Any]:
            limit = 1e3 / percentiles_ms(times[_PASS])["p50_ms"]
            return {
                **self._subject.about,
                "new_tokens": self._new,
                "repeat": rounds,
                "threads": self._threads,
                "side_by_side": keep,
                "read_bandwidth_bytes_per_s": limit,
                "results": self._results({n: s for n, s in times.items() if n != _PASS}, rounds, limit),
            }

        times = interleave(
            builds,
            repeat,
            warmup=warmup,
            keep=keep,
            started=lambda name: progress(name, next(done), total),
            finished=None if save is None else lambda times, rounds: save(fields(times, rounds)),
        )
        return fields(times, repeat)

    def _results(self, times: dict[str, list[float]], rounds: int, limit: float) -> dict[str, Any]:
        results = {name: dict(self._facts[name]) for name in times}
        for name, r in results.items():
            if "died" not in r:  # of one that died some rounds are no measurement
                r |= percentiles_ms(times[name]) | {"prefill_p50_ms": median(self._prefills_s[name][-rounds:]) * 1e3}
        peers = {name: r for name, r in results.items() if "peer" in r and "died" not in r}
        for r in results.values():
            if "died" in r:
                continue
            r["tok_per_s"] = r["batch"] * 1e3 / r["p50_ms"]
            if "bytes_per_token" in r:
                r["bandwidth_share"] = sum(r["bytes_per_token"].values()) * 1e3 / r["p50_ms"] / limit
                # Batch 1 beside batch 1: peers are timed with one row.
                r["times_peer"] = {
                    name: p["p50_ms"] / r["p50_ms"]
                    for name, p in peers.items()
                    if (r["batch"], r["prompt"]) == (1, p["prompt"])
                }
        return results

    def _bandwidth(self) -> dict[str, Run]:
        return {_PASS: lambda: [1 / read_bandwidth(self._ops)]}

    def _ours(self, weights: str, settings: Sequence[Setting]) -> dict[str, Run]:
        decoder = self._subject.decoder(weights)
        return {setting.name: partial(self._time_ours, decoder, setting) for setting in settings}

    def _time_ours(self, decoder, setting: Setting) -> list[float]:
        s, chooser = setting.selection, None
        if s is not None:
            chooser = self._subject.selector(decoder, setting)
        ours = Dejavu(
            decoder,
            setting.prompt + EXTRA + self._new,
            setting.mode,
            batch=setting.batch,
            selector=chooser,
            pending=setting.pending,
            crossover=s is not None and s.crossover,
        )
        prompts = [random_prompt(decoder.config.vocab_size, setting.prompt, seed) for seed in range(setting.batch)]
        prefill_s, seconds = decode_times(ours, prompts, self._new, SKIP)
        self._prefills_s.setdefault(setting.name, []).append(prefill_s)
        choosing = 0.0
        if s is not None:
            chosen = chooser.without({Block(i, part) for part, layers in enumerate(ours.whole) for i in layers})
            choosing = choosing_ms(decoder, setting.batch, chosen) / 1e3
        self._facts[setting.name] = {
            "mode": setting.mode,
            "policy": setting.policy,
            "asked_mlp_density": None if s is None else s.mlp_density,
            "asked_attn_density": None if s is None else s.attn_density,
            "kv": None if s is None else s.kv,
            "crossover": None if s is None else s.crossover,
            "weights_format": setting.weights,
            "batch": setting.batch,
            "prompt": setting.prompt,
            "bytes_per_token": ours.bytes_per_token(),
            "mlp_density": ours.mlp_density(),
            "attn_density": ours.attn_density(),
            "whole": ours.whole,
            "predictor_share": choosing / (sum(seconds) / self._new),
            "op_ms": ours.op_ms(),
        }
        return seconds

    def _peer(self, run: PeerRun) -> dict[str, Run]:
        facts = {"peer": run.peer, "weights_format": run.weights, "batch": 1, "prompt": run.prompt}
        facts = self._facts.setdefault(run.name, facts)
        prompt = random_prompt(self._subject.config.vocab_size, run.prompt, 0)
        process: PeerProcess | None = None
        if "died" not in facts:
            try:
                process = PeerProcess(
                    find_peer(run.peer),
                    self._subject.source,
                    run.weights,
                    capacity=run.prompt + SKIP + self._new,
                    threads=self._threads,
                    work=self._folder,
                )
            except PeerDied as error:
                facts["died"] = str(error)

        def seconds() -> list[float]:
            if "died" in facts:
                return []
            try:
                prefill_s, seconds = process.run(prompt, self._new, SKIP)
            except PeerDied as error:
                facts["died"] = str(error)
                return []
            self._prefills_s.setdefault(run.name, []).append(prefill_s)
            return seconds

        return {run.name: seconds}
