"""Which device is the default, in every state CuPy can be in; each made in a fresh process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]

#: A CuPy whose parts behave as a test says; {count} and {zeros} are filled in.
FAKE = """
import types

class ndarray:
    pass

def zeros(*args, **kwargs):
    {zeros}

class Device:
    def __init__(self, index):
        self.id = index
    def __enter__(self):
        return self
    def __exit__(self, *error):
        return None

def count():
    {count}

cuda = types.SimpleNamespace(
    Device=Device, runtime=types.SimpleNamespace(getDeviceCount=count)
)
"""

WORKING = FAKE.format(
    count="return 2",
    zeros="return types.SimpleNamespace(sum=lambda: types.SimpleNamespace(item=lambda: 0.0))",
)


def fake_cupy(folder: Path, source: str) -> Path:
    """Write a package ``cupy`` of this text and return what goes on PYTHONPATH."""
    package = folder / "fake" / "cupy"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text(source)
    return package.parent


def bare_environment(folder: Path) -> Path:
    """Return a folder with NumPy and threadpoolctl alone, for an interpreter without site-packages.

    In there, CuPy is not hidden but absent.
    """
    place = folder / "bare"
    place.mkdir(exist_ok=True)
    site = Path(np.__file__).parents[1]
    for name in ("numpy", "numpy.libs", "threadpoolctl.py"):
        if (site / name).exists():
            (place / name).symlink_to(site / name)
    return place


def python(
    code: str, *path: Path, options: tuple[str, ...] = (), **env: str
) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter that logs gpuconv's INFO lines to stderr."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GPUCONV_")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (*path, ROOT)))
    environment.update(env)
    log = "import logging; logging.basicConfig(level='INFO', format='%(levelname)s %(message)s')\n"
    return subprocess.run(
        [sys.executable, *options, "-c", log + code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


SHOW = "from gpuconv.device import *; print(device(), probe().count, probe().reason, sep='|')"


def fields(done: subprocess.CompletedProcess[str]) -> tuple[str, int, str]:
    assert done.returncode == 0, done.stderr
    name, count, reason = done.stdout.strip().split("|")
    return name, int(count), reason


CASES = {
    "raises ImportError": (
        "raise ImportError('libcudart.so.12: cannot open shared object file')",
        "CuPy does not import: libcudart.so.12",
    ),
    "raises OSError": ("raise OSError('bad ELF header')", "CuPy does not import: bad ELF header"),
    "raises without a word": ("raise RuntimeError", "CuPy does not import: RuntimeError"),
    "a part of CuPy is missing": (
        "import cupy_backends_that_is_not_there",
        "CuPy does not import: No module named 'cupy_backends_that_is_not_there'",
    ),
    "driver too old": (
        FAKE.format(
            count="raise RuntimeError('cudaErrorInsufficientDriver: CUDA driver version')",
            zeros="raise AssertionError",
        ),
        "CUDA does not start: cudaErrorInsufficientDriver",
    ),
    "no device": (
        FAKE.format(count="return 0", zeros="raise AssertionError"),
        "there is no CUDA device",
    ),
    "no context": (
        FAKE.format(
            count="return 1",
            zeros="raise RuntimeError('cudaErrorDevicesUnavailable: busy\\nmore lines')",
        ),
        "the CUDA device does not work: cudaErrorDevicesUnavailable: busy",
    ),
}


@pytest.mark.parametrize(("source", "reason"), CASES.values(), ids=CASES.keys())
def test_falls_back(tmp_path: Path, source: str, reason: str) -> None:
    done = python(SHOW, fake_cupy(tmp_path, source))
    name, count, said = fields(done)
    assert (name, count) == ("cpu", 0)
    assert said.startswith(reason)
    lines = [line for line in done.stderr.splitlines() if line.startswith("INFO")]
    assert lines == [f"INFO computing on the CPU: {said}"]


@pytest.mark.parametrize(("source", "reason"), CASES.values(), ids=CASES.keys())
def test_asking_for_cuda_is_an_error(tmp_path: Path, source: str, reason: str) -> None:
    code = """
from gpuconv.device import *
try:
    use_device("cuda")
except DeviceError as error:
    print(error)
print(device())
"""
    done = python(code, fake_cupy(tmp_path, source))
    assert done.returncode == 0, done.stderr
    message, after = done.stdout.strip().splitlines()
    assert message.startswith(f"device is 'cuda:0', but {reason}")
    assert after == "cpu"


def test_cupy_not_installed(tmp_path: Path) -> None:
    done = python(SHOW, bare_environment(tmp_path), options=("-S",))
    assert fields(done) == ("cpu", 0, "CuPy is not installed")
    assert done.stderr.strip() == "INFO computing on the CPU: CuPy is not installed"


def test_cupy_hidden_by_a_finder() -> None:
    """As where another package forbids the import."""
    hide = "import sys; sys.modules['cupy'] = None\n"
    assert fields(python(hide + SHOW)) == ("cpu", 0, "CuPy is not installed")


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
def test_the_real_wheel_without_a_driver() -> None:
    """CuPy is installed; the machine shows no device."""
    done = python(SHOW, CUDA_VISIBLE_DEVICES="")
    name, count, reason = fields(done)
    assert (name, count) == ("cpu", 0)
    assert reason.startswith(("CUDA does not start", "there is no CUDA device", "CuPy does not"))


def test_one_line_whatever_is_asked_and_how_often() -> None:
    code = """
import threading
from gpuconv.device import *
threads = [threading.Thread(target=device) for _ in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
for _ in range(3):
    device(), probe(), asarray([1.0])
with use_device("cpu"):
    device()
with use_device(None):
    device()
"""
    done = python(code, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("computing on the CPU") == 1


def test_a_device_is_taken_where_there_is_one(tmp_path: Path) -> None:
    done = python(SHOW, fake_cupy(tmp_path, WORKING))
    assert fields(done) == ("cuda:0", 2, "")
    assert "INFO" not in done.stderr


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ("cpu", "cpu"),
        ("CPU", "cpu"),
        ("cuda", "cuda:0"),
        ("cuda:1", "cuda:1"),
        (" cuda:1 ", "cuda:1"),
        ("auto", "cuda:0"),
        ("", "cuda:0"),
    ],
)
def test_environment_variable(tmp_path: Path, wish: str, expected: str) -> None:
    done = python(SHOW, fake_cupy(tmp_path, WORKING), GPUCONV_DEVICE=wish)
    assert fields(done)[0] == expected
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("wish", "kind", "message"),
    [
        ("cuda:2", "DeviceError", "the last CUDA device is cuda:1"),
        ("gpu", "ValueError", "expected 'cpu', 'cuda' or 'cuda:N'"),
        ("cuda:-1", "ValueError", "expected 'cpu', 'cuda' or 'cuda:N'"),
        ("cuda:x", "ValueError", "expected 'cpu', 'cuda' or 'cuda:N'"),
        ("cpu:1", "ValueError", "expected 'cpu', 'cuda' or 'cuda:N'"),
    ],
)
def test_environment_variable_wrong(tmp_path: Path, wish: str, kind: str, message: str) -> None:
    done = python(SHOW, fake_cupy(tmp_path, WORKING), GPUCONV_DEVICE=wish)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert kind in last
    assert "GPUCONV_DEVICE: " in last
    assert message in last


@pytest.mark.parametrize("wish", ["cuda", "cuda:0"])
def test_environment_asks_for_what_is_not_there(wish: str) -> None:
    done = python(SHOW, GPUCONV_DEVICE=wish, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "DeviceError: GPUCONV_DEVICE: device is 'cuda:0', but " in done.stderr


def test_cpu_is_decided_without_importing_cupy(tmp_path: Path) -> None:
    path = fake_cupy(tmp_path, "raise SystemExit('imported')")
    code = "import sys; from gpuconv.device import *; print(device(), 'cupy' in sys.modules)"
    done = python(code, path, GPUCONV_DEVICE="cpu")
    assert done.stdout.strip() == "cpu False", done.stderr
    array = "from gpuconv.device import *; import numpy; print(device_of(numpy.ones(1)))"
    assert python(array, path).stdout.strip() == "cpu"


def test_use_device_sets_and_restores(tmp_path: Path) -> None:
    code = """
from gpuconv.device import *
use_device("cuda:1")
print(device())
with use_device("cpu") as inner:
    print(inner, device())
    with use_device(Device("cuda", 0)):
        print(device())
    print(device())
print(device())
try:
    use_device("cuda:7")
except DeviceError:
    print(device())
try:
    with use_device("cpu"):
        raise KeyError
except KeyError:
    print(device())
use_device(None)
print(device())
"""
    done = python(code, fake_cupy(tmp_path, WORKING))
    assert done.returncode == 0, done.stderr
    expected = ["cuda:1", "cpu cpu", "cuda:0", "cpu", "cuda:1", "cuda:1", "cuda:1", "cuda:0"]
    assert done.stdout.strip().splitlines() == expected


@pytest.mark.parametrize(
    ("spec", "error"),
    [(3, TypeError), (b"cpu", TypeError), ("", ValueError), ("tpu", ValueError)],
)
def test_use_device_bad_input(spec: object, error: type[Exception]) -> None:
    from gpuconv.device import device, use_device

    with use_device("cpu"):
        with pytest.raises(error, match="expected 'cpu', 'cuda' or 'cuda:N'"):
            use_device(spec)  # type: ignore[arg-type]
        assert str(device()) == "cpu"


def test_arrays_on_the_cpu() -> None:
    from gpuconv.device import CPU, asarray, asnumpy, device_of, namespace

    array = np.arange(4, dtype="float32")
    assert asarray(array, device="cpu") is array
    assert asnumpy(array) is array
    assert asarray(array, device="cpu", dtype="float64").dtype == np.float64
    assert asarray([1, 2], device="cpu").dtype == np.array([1, 2]).dtype
    assert device_of(array) == CPU
    assert device_of([1.0]) is None
    assert namespace(array) is np
    with pytest.raises(TypeError, match="expected a NumPy or CuPy array, got list"):
        namespace([1.0])
