"""A peer in a process of its own: one that dies takes nothing with it, and what it held is free when it ends.

The process is `python -m dejavu.bench.peers.process`. It reads a JSON line for each request and answers with one: first
what to build, then runs, whose steps it times itself. In between it sleeps, so peers can run in turns.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from time import monotonic
from typing import IO, TYPE_CHECKING, Any

from dejavu.errors import DejavuError

if TYPE_CHECKING:
    from dejavu.bench.decode import Times
    from dejavu.bench.peers import Peer, Source

# No answer takes longer: hf-compiled tries kernels for some minutes, and large models are converted first.
TIMEOUT_S = 3600.0


class PeerDied(DejavuError):
    """A peer's process ended, or gave no answer; the message is why."""


class PeerProcess:
    """A peer that is built, and runs, in a process of its own; the process ends with this object.

    Args:
        peer, source, weights, capacity, threads, work: as Peer.build takes them.
    Raises: PeerDied where it cannot be built.
    """

    def __init__(self, peer: Peer, source: Source, weights: str, *, capacity: int, threads: int, work: str | PathLike):
        self._told = tempfile.TemporaryFile()  # noqa: SIM115, for stderr; closed with the process
        command = [sys.executable, "-m", "dejavu.bench.peers.process"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._told, env=environment
        )
        self.close = weakref.finalize(self, _end, self._process, self._told)
        about = {"config": source.config, "folder": source.folder and str(source.folder), "seed": source.seed}
        self._ask(peer=asdict(peer), source=about, weights=weights, capacity=capacity, threads=threads, work=str(work))

    def run(self, prompt: Sequence[int], new_tokens: int, skip: int) -> Times:
        """As bench.decode.decode_times. Raises: PeerDied."""
        from dejavu.bench.decode import Times

        return Times(**self._ask(prompt=list(prompt), new_tokens=new_tokens, skip=skip))

    def _ask(self, **request: Any) -> dict[str, Any]:
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        line = _line(self._process.stdout, TIMEOUT_S)
        if line is None:
            self.close()
            raise PeerDied(f"died: no answer in {TIMEOUT_S:.0f} s")
        if not line.endswith(b"\n"):
            raise self._died()
        answer = json.loads(line)
        if "error" in answer:
            self.close()
            raise PeerDied(f"failed: {answer['error']}")
        return answer

    def _died(self) -> PeerDied:
        code = self._process.wait()
        self._told.seek(0)
        last = self._told.read().decode(errors="replace").strip().rpartition("\n")[2]
        self.close()
        if code < 0:
            return PeerDied(f"died: signal {-code} ({signal.Signals(-code).name})")
        return PeerDied(f"died: exit code {code}" + (f" ({last})" if last else ""))


def _line(stream: IO[bytes], timeout_s: float) -> bytes | None:
    """The next line, or what came before the stream's end; None where the time is over."""
    deadline, line = monotonic() + timeout_s, b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([stream], [], [], max(0.0, deadline - monotonic()))
        if not ready:
            return None
        more = os.read(stream.fileno(), 1 << 16)
        if not more:
            break
        line += more
    return line


def _end(process: subprocess.Popen, told: IO[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, told):
        with suppress(OSError):  # what was still to be written to it is of no use
            stream.close()


def main() -> None:
    """Answer the requests on stdin until it ends."""
    # Libraries write to stdout, which belongs to the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the benchmark's, which ends its peers
    decoding = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if decoding is None:
                decoding, answer = _build(request), {}
            else:
                from dejavu.bench.decode import decode_times

                answer = decode_times(decoding, request["prompt"], request["new_tokens"], request["skip"])._asdict()
        except Exception as error:  # other people's software raises what it likes
            answer = {"error": " ".join(f"{error}".split()) or type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)


def _build(request: dict[str, Any]):
    import torch

    from dejavu.bench.peers import Peer, Source

    torch.set_num_threads(request["threads"])
    peer, source = dict(request["peer"]), request["source"]
    folder = source["folder"] and Path(source["folder"])
    return Peer(**peer | {"packages": tuple(peer["packages"])}).build(
        Source(source["config"], folder, source["seed"]),
        request["weights"],
        capacity=request["capacity"],
        threads=request["threads"],
        work=request["work"],
    )


if __name__ == "__main__":
    main()
