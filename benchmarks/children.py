"""Child processes: one a peer, in an environment that gives all of them the same threads."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Child", "ChildError", "environment", "pinned"]

ROOT = Path(__file__).resolve().parent.parent

#: Variables that tune a library rather than describe the machine. ``OPENBLAS_CORETYPE``, set in
#: some development environments, can halve NumPy's matrix product; no user's machine sets it.
_TUNING = ("OPENBLAS_", "GOTO_", "OMP_", "GOMP_", "KMP_", "MKL_", "BLIS_", "VECLIB_", "GPUCONV_")
_COUNTS = (
    "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS", "GPUCONV_NUM_THREADS",
)  # fmt: skip


class ChildError(RuntimeError):
    """A child process failed, died or did not answer."""


def environment(threads: int, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a child: no variable that tunes BLAS or OpenMP but the counts."""
    source = os.environ if base is None else base
    made = {k: v for k, v in source.items() if not k.startswith(_TUNING)}
    made.update(dict.fromkeys(_COUNTS, str(threads)))
    made["GPUCONV_DEVICE"] = "cpu"
    # Else two threads of OpenMP may share a core, one waiting in a loop until the other's time is
    # up: PyTorch then takes a scheduler's slice, milliseconds, for what it does in a tenth of one.
    made["OMP_PROC_BIND"] = "true"
    path = made.get("PYTHONPATH")
    made["PYTHONPATH"] = str(ROOT) + (os.pathsep + path if path else "")
    return made


def _extras(peer: str, compiled: bool) -> dict[str, str]:
    """Return what keeps gpuconv to NumPy alone, unless its compiled engines are asked for."""
    return {"GPUCONV_NUMBA": "1" if compiled or "numba" in peer else "0"}


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Let processes started in here run on ``threads`` cores only.

    Some peers (JAX) take as many threads as there are cores; so all get the same. Where the
    system cannot do that, nothing happens.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Child:
    """A process of :mod:`benchmarks.worker`, or of another module that serves in the same way.

    Parameters
    ----------
    peer : str
        The peer it holds.
    threads : int
        For the peer.
    module : str
        What is run.
    compiled : bool
        Whether gpuconv may choose its compiled engines.
    """

    def __init__(
        self,
        peer: str,
        threads: int,
        module: str = "benchmarks.worker",
        *,
        compiled: bool = False,
    ) -> None:
        self.peer = peer
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, peer, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
            env={**environment(threads), **_extras(peer, compiled)},
        )
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        if self._process.stdout is not None:
            for line in self._process.stdout:
                self._answers.put(line)
        self._answers.put(None)

    def ask(self, op: str, timeout: float = 300.0, **arguments: Any) -> dict[str, Any]:
        """Send a request and return its answer.

        Raises
        ------
        ChildError
            If the request failed, the process died, or no answer came in time. After the last
            two the process is gone.
        """
        try:
            if self._process.stdin is None:
                raise BrokenPipeError
            self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=timeout)
        except (BrokenPipeError, ValueError):
            line = None
        except queue.Empty:
            self.kill()
            raise ChildError(f"{self.peer}: no answer to {op} in {timeout:g} s") from None
        if line is None:
            self.kill()
            raise ChildError(f"{self.peer}: the process ended at {op}: {self._tail()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ChildError(f"{self.peer}: {answer['error'].strip().splitlines()[-1]}")
        return answer

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def _tail(self) -> str:
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return lines[-1] if lines else f"exit status {self._process.returncode}"

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Let the process end, and make sure that it does."""
        if self.alive and self._process.stdin is not None:
            try:
                self._process.stdin.close()
                self._process.wait(timeout=10)
            except (OSError, subprocess.TimeoutExpired):
                self.kill()
        self._reader.join(timeout=10)
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with suppress(OSError):
                    stream.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.kill()
        self.close()
