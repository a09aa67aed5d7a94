"""Kill the training of a notebook over and over, and check that the end is what an unbroken run gives.

    python tools/interruptions.py --kills 100 --backend tensorflow --seed 0

The code is taken from the notebook's own cells, up to the last training, without those that draw or show seconds;
only sizes are overridden. Every run is a process of its own, killed with SIGKILL at a random moment: some time after
it began, in the n-th batch, before the n-th operation on a file in RUN_DIR, halfway through the n-th write there, or
after a stage. It is started again until it finishes. Then its weights, its curves, what it printed and the names of
its files are compared, bit by bit, with those of a run that was left alone. After every kill, each file in RUN_DIR
that bears its final name must be whole.
"""

import argparse
import builtins
import hashlib
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
from notebooks import ROOT, code_cells, notebook_paths, read, tags

LAST_CELL = "train-modern"
KINDS = {"time": 0.25, "batch": 0.25, "file": 0.25, "write": 0.2, "stage": 0.05}
SMALL = {"images": 200, "epochs": 3, "batch": 50, "validation": 100, "seeds": 2}
SMALLER = [
    ("(64, 64, 256, 256, 256, 256)", "(8, 8, 16, 16, 16, 16)"),
    ("for arm in builds}", 'for arm in ["(d) both"]}'),
]


def run_cells(notebook, parameters, first=None, last=LAST_CELL, small=SMALL, edits=(), namespace=None):
    """Execute a notebook's code cells, from `first` (or the first) to `last`; return their namespace.

    `parameters` replace those of the parameters cell; `small` overrides the sizes of the preset `smoke`, None leaves
    them. `edits` are (old, new) replacements in the cells' source, for trying out what a change does; each must
    apply. Cells that draw, or whose outputs hold seconds, are left out.
    """
    names = {"__name__": "cells"} if namespace is None else namespace
    left, cells = {old for old, _ in edits}, code_cells(notebook)
    ids = [cell.id for cell in cells]
    for cell in cells[ids.index(first) if first else 0 : ids.index(last) + 1]:
        if {"figure", "seconds"} & set(tags(cell)) or cell.id.endswith("-summary"):
            continue
        source = cell.source
        for old, new in [*edits, *(SMALLER if small else ())]:
            left -= {old} if old in source else set()
            source = source.replace(old, new)
        exec(compile(source, f"<{cell.id}>", "exec"), names)
        if cell.id == "parameters":
            names.update(parameters)
        elif cell.id == "presets" and small:
            preset = names["PRESETS"]["smoke"]
            sizes = small | {"step": small["batch"]}  # as in images_per_step
            numbers = [key for key, value in preset.items() if isinstance(value, int)]
            preset.update({key: sizes.get(key.split("_")[-1], preset[key]) for key in numbers})
        elif cell.id == "split-data" and small:
            images = small.get("validation", 100)
            names.update({name: names[name][:images] for name in ("x_val", "y_val", "x_test", "y_test")})
    if left:
        raise ValueError(f"not in the notebook: {sorted(left)}")
    return names


class Trap:
    """Ends this process with SIGKILL at the n-th event of a kind, and writes down what happens until then.

    The notebook knows nothing of it: files are watched through Python's audit events and `open`, batches and
    stages through Keras's list of callbacks.
    """

    def __init__(self, kind="none", number=0, run_dir="none", log=os.devnull):
        self.kind, self.number, self.run_dir, self.log = kind, number, str(run_dir), Path(log)
        self.seen, self.plain_open = Counter(), io.open

    def note(self, event, **details):
        """Append one line to the log, in one write."""
        line = json.dumps({"event": event, "time": time.time(), **details}) + "\n"
        with self.plain_open(self.log, "ab", buffering=0) as file:
            file.write(line.encode())

    def come(self, kind):
        """Count an event, and die if it is the last that this process should see."""
        self.seen[kind] += 1
        if kind == self.kind and self.seen[kind] == self.number:
            self.die()

    def die(self):
        """End the process as the out-of-memory killer or a vanishing machine would."""
        os.kill(os.getpid(), signal.SIGKILL)

    def inside(self, path):
        """Return whether a path lies in RUN_DIR."""
        return isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith(
            self.run_dir + os.sep
        )

    def audit(self, event, details):
        """Come before every operation that changes a file or folder in RUN_DIR."""
        if event == "open":
            changes = writes(details[1]) and self.inside(details[0])
        else:
            changes = event in ("os.remove", "os.rmdir", "os.rename", "os.mkdir") and self.inside(details[0])
            changes = changes and not (event == "os.mkdir" and os.path.isdir(details[0]))
        if changes:
            self.come("file")

    def open(self, path, mode="r", *args, **options):
        """Open a file; come in the middle of every write if it lies in RUN_DIR."""
        file = self.plain_open(path, mode, *args, **options)
        return Halfway(file, self) if writes(mode) and self.inside(path) else file

    def watch_files(self):
        """Come before every operation that changes RUN_DIR, and in the middle of every write to it."""
        sys.addaudithook(self.audit)
        builtins.open = io.open = self.open

    def watch_training(self):
        """Come in every batch and after every stage."""
        import keras

        callbacks, trap = keras.callbacks.CallbackList, self
        begin_epoch, begin_batch = callbacks.on_epoch_begin, callbacks.on_train_batch_begin
        end_training = callbacks.on_train_end

        def on_epoch_begin(listed, epoch, logs=None):
            for folder in [part.folder for part in listed.callbacks if hasattr(part, "folder")]:
                trap.note("epoch", stage=os.path.relpath(folder, trap.run_dir), epoch=epoch)
            begin_epoch(listed, epoch, logs)

        def on_train_batch_begin(listed, batch, logs=None):
            trap.come("batch")
            begin_batch(listed, batch, logs)

        def on_train_end(listed, logs=None):
            end_training(listed, logs)
            trap.come("stage")

        callbacks.on_epoch_begin = on_epoch_begin
        callbacks.on_train_batch_begin = on_train_batch_begin
        callbacks.on_train_end = on_train_end


class Halfway:
    """A file that, when the trap is due, writes half of what it is given, and no more."""

    def __init__(self, file, trap):
        self.file, self.trap = file, trap

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, content):
        """Write one half, then the other: between them the trap may come."""
        half = len(content) // 2
        self.file.write(content[:half])
        self.file.flush()
        self.trap.come("write")
        return half + self.file.write(content[half:])


def environment(backend, **more):
    """Environment variables of a process that trains on the CPU, with that backend."""
    quiet = {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    return {**os.environ, "KERAS_BACKEND": backend, **quiet, **more}


def writes(mode):
    """Return whether a file is opened to be changed."""
    return isinstance(mode, str) and bool(set(mode) & set("wax+"))


def work(task):
    """Run the notebook's training in this process, as a task (a dict, see `Training.start`) says."""
    trap = Trap(task["kind"], task["number"], task["parameters"]["RUN_DIR"], task["log"])
    trap.watch_files()
    import keras

    trap.watch_training()
    trap.note("start", keras=keras.__version__, backend=keras.backend.backend())
    run_cells(read(task["notebook"]), task["parameters"], last=task["last"], small=task["small"])
    trap.note("done", seen=trap.seen)


@dataclass
class Training:
    """One training of a notebook in a folder of its own, killed and started again until it finishes."""

    notebook: Path
    folder: Path
    data: Path
    backend: str = "tensorflow"
    small: dict = field(default_factory=lambda: dict(SMALL))
    last: str = LAST_CELL
    kills: int = 0
    starts: int = 0
    said: str = ""
    complaints: list = field(default_factory=list)

    @property
    def run_dir(self):
        """RUN_DIR of this training."""
        return self.folder / "runs"

    def events(self):
        """Return what all its processes wrote down, oldest first."""
        logs = sorted(self.folder.glob("start-*.jsonl"))
        return [json.loads(line) for log in logs for line in log.read_text().splitlines()]

    def epochs_begun(self):
        """Return how often each (stage, epoch) was begun."""
        return Counter((e["stage"], e["epoch"]) for e in self.events() if e["event"] == "epoch")

    def start(self, kind="none", number=0):
        """Start a process; kill it by time, or let it kill itself. Return whether it reached the end."""
        self.starts += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / f"start-{self.starts:04d}.jsonl"
        parameters = {"PRESET": "smoke", "DATA_DIR": str(self.data), "RUN_DIR": str(self.run_dir)}
        task = {"notebook": str(self.notebook), "small": self.small, "last": self.last}
        task |= {"log": str(log), "parameters": parameters, "kind": kind, "number": number}
        compiled = {"JAX_COMPILATION_CACHE_DIR": str(self.folder.parent / "compiled")}
        env = environment(self.backend, **compiled, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
        out, err = log.with_suffix(".out"), log.with_suffix(".err")
        with open(out, "wb") as stdout, open(err, "wb") as stderr:
            command = [sys.executable, __file__, "--task", json.dumps(task)]
            process = subprocess.Popen(command, env=env, stdout=stdout, stderr=stderr)
            try:
                if kind == "time":
                    while process.poll() is None and not log.exists():
                        time.sleep(0.02)
                    time.sleep(number)
                    process.kill()
                process.wait(900)
            finally:
                process.kill()
        if process.returncode not in (0, -9) or (process.returncode, kind) == (-9, "none"):
            raise RuntimeError(f"the training failed:\n{err.read_text(errors='replace')[-3000:]}")
        self.said = out.read_text()
        moment = f"{kind} {number} of start {self.starts}"
        self.complaints += [f"{moment}: {text}" for text in broken_files(self.run_dir)]
        self.kills += process.returncode != 0
        return process.returncode == 0

    def finish(self, kills=()):
        """Be killed as `kills`, pairs of (kind, number), say, and start again until the training is done."""
        for kind, number in itertools.chain(kills, [("none", 0)]):
            if self.start(kind, number):
                break
        return self


def draws(rng, longest):
    """Yield (kind, number) without end: when to kill; `longest` has the largest number for each kind."""
    while True:
        kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
        if kind == "time":
            yield kind, float(rng.uniform(0, longest[kind]))
        else:
            yield kind, int(rng.integers(1, longest[kind] + 1))


def broken_files(run_dir):
    """Return what is wrong with the files in RUN_DIR, apart from those that are still being written."""
    wrong = []
    for path in sorted(path for path in Path(run_dir).rglob("*") if path.is_file()):
        if path.name.startswith("part-"):
            continue
        try:
            with zipfile.ZipFile(path) as archive:
                epochs = len(json.loads(archive.read("state.json"))["history"])
                whole = archive.testzip() is None and path.name == f"epoch-{epochs:04d}.keras"
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            whole = False
        if not whole:
            wrong.append(f"{path.relative_to(run_dir)} is not whole")
    return wrong


def contents(path):
    """Return what a backup holds: {"curve": text, "settings": text, name of each array: digest of its values}."""
    with zipfile.ZipFile(path) as archive:
        state = json.loads(archive.read("state.json"))
        state["settings"].pop(
            "initial weights"
        )  # a sum, whose last digits depend on how its terms are grouped
        found = {key: json.dumps(state[key], sort_keys=True) for key in ("history", "settings")}
        with h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file:
            arrays = {}
            file.visititems(
                lambda name, item: arrays.update({name: item}) if hasattr(item, "shape") else None
            )
            for name, array in arrays.items():
                found[name] = hashlib.sha256(np.asarray(array).tobytes()).hexdigest() + str(array.dtype)
    return found


def differences(broken, unbroken):
    """Return in what a finished training differs from an unbroken one, as a list of sentences; empty if in nothing."""
    one, two = (
        {path.relative_to(run.run_dir): path for path in run.run_dir.rglob("*.*") if path.is_file()}
        for run in (broken, unbroken)
    )
    found = [f"only one of the two has {name}" for name in sorted(one.keys() ^ two.keys())]
    for name in sorted(one.keys() & two.keys()):
        mine, its = contents(one[name]), contents(two[name])
        found += [f"{name}: {key} differs" for key in {*mine, *its} if mine.get(key) != its.get(key)]
    if broken.said != unbroken.said:
        found.append(f"it says\n{broken.said}\ninstead of\n{unbroken.said}")
    return found + broken.complaints


def unbroken(notebook, folder, data, backend, **options):
    """Train without a kill; return the `Training` and the largest numbers worth drawing for each kind of kill."""
    run = Training(notebook, folder, data, backend, **options).finish()
    if run.complaints:
        raise RuntimeError(f"the unbroken training is not whole: {run.complaints}")
    events = run.events()
    seen = {kind: max(number // 3, 1) for kind, number in events[-1]["seen"].items()}
    return run, seen | {"time": (events[-1]["time"] - events[0]["time"]) / 4}


def campaign(notebook, data, backend, kills, seed, folder):
    """Kill trainings, one after the other, until there were `kills`; print the findings; return whether all is well."""
    whole, longest = unbroken(notebook, folder / "unbroken", data, backend)
    rng, runs, found = np.random.default_rng(seed), [], []
    while (killed := sum(run.kills for run in runs)) < kills:
        run = Training(notebook, folder / f"killed-{len(runs)}", data, backend)
        runs.append(run.finish(itertools.islice(draws(rng, longest), kills - killed)))
        found += [f"training {len(runs)}: {text}" for text in differences(run, whole)]
        shutil.rmtree(run.run_dir)
        print(f"training {len(runs)}: {run.kills} kills, {killed + run.kills} of {kills} so far", flush=True)
    begun = [run.epochs_begun() for run in runs]
    repeated = sum(sum(counts.values()) - len(counts) for counts in begun)
    if any(set(counts) != set(whole.epochs_begun()) for counts in begun) or repeated > killed:
        found.append("epochs are missing, or more were repeated than interrupted")
    print(f"{backend}: kills {killed}, trainings finished {len(runs)}")
    print(f"epochs trained {sum(map(len, begun))}, of these repeated {repeated}")
    print(f"bit-identical to the unbroken run, files whole after every kill: {'NO' if found else 'yes'}")
    for text in found:
        print(f"  {text}")
    return not found


def made_data(folder):
    """Return a folder with made-up data in the official layout."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import make_cifar

    return make_cifar(folder / "made")


def main():
    """Read the command line and run a campaign, or one task for it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", nargs="?", type=Path, default=notebook_paths()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--backend", choices=("tensorflow", "jax", "torch"), default="tensorflow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--data", type=Path, help="folder that holds cifar-10-batches-py; otherwise data are made up"
    )
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        return work(options.task)
    with tempfile.TemporaryDirectory() as folder:
        folder, notebook = Path(folder), options.notebook.resolve()
        data = options.data.resolve() if options.data else made_data(folder)
        sys.exit(not campaign(notebook, data, options.backend, options.kills, options.seed, folder))


if __name__ == "__main__":
    main()
