"""Data sets, and ways to run notebooks and single cells, for all tests."""

import importlib.util
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from notebooks import notebook_paths, read  # noqa: E402

FILES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
ROWS = 10_000
pytest_plugins = ["stage_under_test"]


class OfficialPickler(pickle._Pickler):
    """Pickles the way Python 2 did for the official files: `bytes` and `str` are both plain strings there."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_string(self, value):
        """Write `value` with the opcode BINSTRING."""
        data = value if isinstance(value, bytes) else value.encode("ascii")
        self.write(b"T" + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[bytes] = save_string
    dispatch[str] = save_string


def write_batch(path, batch):
    """Write a dict as the official files hold it: a protocol-2 pickle of Python 2, with NumPy's old module names."""
    with open(path, "wb") as file:
        OfficialPickler(file, protocol=2).dump(batch)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))


def make_cifar(folder, rows=ROWS, seed=0):
    """Write learnable data (a pattern for each class, plus noise) in the official layout below `folder`."""
    rng = np.random.default_rng(seed)
    folder = Path(folder) / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    coarse = rng.integers(0, 160, (10, 3, 8, 8), dtype=np.uint8)
    patterns = coarse.repeat(4, axis=2).repeat(4, axis=3).reshape(10, 3072)
    noise = rng.integers(0, 96, (rows, 3072), dtype=np.uint8)
    for number, name in enumerate(FILES):
        labels = rng.permutation(np.arange(rows) % 10)
        batch = {
            b"batch_label": name.encode(),
            b"labels": labels.tolist(),
            b"data": patterns[labels] + np.roll(noise, number * rows // 7, axis=0),
            b"filenames": [b"image_%d.png" % i for i in range(rows)],
        }
        write_batch(folder / name, batch)
    meta = {b"num_cases_per_batch": rows, b"label_names": [c.encode() for c in CLASSES], b"num_vis": 3072}
    write_batch(folder / "batches.meta", meta)
    return folder.parent


@pytest.fixture(scope="session")
def small_cifar(tmp_path_factory):
    """Folder for DATA_DIR with made-up data in the official layout and counts."""
    folder = make_cifar(tmp_path_factory.mktemp("made"))
    yield folder
    shutil.rmtree(folder)


def real_cifar_folder():
    """Where the real CIFAR-10 is at hand without a download: a folder, or a script that unpacks it, or None."""
    if folder := os.environ.get("CIFAR10_DIR"):
        return Path(folder).resolve()
    scripts = [base / "shared" / "cifar10" / "unpack.py" for base in (ROOT.parent, ROOT)]
    return next((script for script in scripts if script.exists()), None)


@pytest.fixture(scope="session")
def real_cifar(tmp_path_factory):
    """Folder for DATA_DIR with the real CIFAR-10; skips the test where it is not at hand."""
    found = real_cifar_folder()
    if found is None:
        pytest.skip("no real CIFAR-10: set CIFAR10_DIR to the folder that holds cifar-10-batches-py")
    if found.is_dir():
        yield found
        return
    folder = tmp_path_factory.mktemp("real")
    subprocess.run([sys.executable, str(found), str(folder)], check=True)
    yield folder
    shutil.rmtree(folder)


def find_weights_file(name):
    """Path of ImageNet weights for a notebook's backbone, None where no file of them is at hand."""
    backbone = name.partition("_")[2].lower()
    for folder in (os.environ.get("WEIGHTS_DIR"), ROOT.parent / "shared" / "weights"):
        if folder and (found := sorted(Path(folder).glob(f"{backbone}_*notop.weights.h5"))):
            return found[0].resolve()
    return None


def require_backend(name):
    """Skip the test where the Keras backend of that name is not installed."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")


@dataclass
class Run:
    """What came of running a notebook: where it was saved, how it ended, what it printed, how long it took."""

    path: Path
    returncode: int
    log: str
    seconds: float

    @property
    def notebook(self):
        """The executed notebook."""
        return read(self.path)


def run_notebook(path, out, timeout=1800, check=True, env=None, **parameters):
    """Run the notebook `path` with papermill in a process of its own, save it as `out`, return a `Run`.

    The kernel works in the folder of `out`. With `check`, a failure is raised with the end of the log.
    """
    out = Path(out).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "papermill", str(Path(path).resolve()), str(out), "--kernel", "python3"]
    command += ["--cwd", str(out.parent), "--no-progress-bar", "-y", json.dumps(parameters)]
    env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONUNBUFFERED": "1", **(env or {})}
    started = time.monotonic()
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        log, _ = process.communicate(timeout=timeout)
    except BaseException:
        stop_group(process)
        raise
    run = Run(out, process.returncode, log, time.monotonic() - started)
    if check and run.returncode:
        raise AssertionError(f"{Path(path).name} failed after {run.seconds:.0f} s:\n{log[-6000:]}")
    return run


def stop_group(process):
    """End a process started with `start_new_session` and the kernels it started."""
    for name in ("SIGTERM", "SIGKILL"):
        if hasattr(os, "killpg"):
            try:
                os.killpg(process.pid, getattr(signal, name))
            except ProcessLookupError:
                return
        else:
            process.kill()
        time.sleep(1)
    process.wait()


def pytest_generate_tests(metafunc):
    """Run every test that takes `notebook_path` on each notebook that exists."""
    if "notebook_path" in metafunc.fixturenames:
        paths = notebook_paths()
        metafunc.parametrize("notebook_path", paths, ids=[path.stem for path in paths])


@pytest.fixture
def notebook(notebook_path):
    """The notebook at `notebook_path`."""
    return read(notebook_path)
