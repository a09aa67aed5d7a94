"""Kill the training of a notebook over and over, and check that the end is what an unbroken run gives.

    python tools/interruptions.py --kills 100 --backend tensorflow --seed 0

The code is taken from the notebook's own cells: all up to the test predictions, without those that draw. Only
sizes are overridden. Every run is a process of its own, killed with SIGKILL at a random moment: some time after
it began, in the n-th batch, before the n-th operation on a file in RUN_DIR, halfway through the n-th write
there, or between two stages. It is started again until it finishes; then its weights, curves and predictions
are compared, bit by bit, with those of a run that was left alone. After every kill, each file in RUN_DIR that
bears its final name must be whole.

Then the cost of protection is measured, on whatever device there is: the time of an epoch under the notebook's
callbacks and under none.
"""

import argparse
import builtins
import csv
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
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import h5py
import numpy as np
from notebooks import ROOT, code_cells, notebook_paths, read, tags

LAST_CELL = "test-once"
KINDS = ("time", "batch", "file", "write", "stage")
SMALLER = {
    "imports": "display = lambda *things, **options: None",
    "run-folder": "BUDGET = {key: SMALL.get(key.split('_')[-1], old) for key, old in BUDGET.items()}",
    "split-data": """n = SMALL.get("validation", 100)
x_val, y_val, x_test, y_test = x_val[:n], y_val[:n], x_test[:n], y_test[:n]""",
    "modern-cnn": "modern_cnn.__defaults__ = ((8, 16, 16),)",
}
SMALL = {"images": 200, "epochs": 3, "batch": 50}


def run_cells(notebook, parameters, first=None, last=LAST_CELL, small=SMALL, edits=(), namespace=None):
    """Execute a notebook's code cells, from `first` (or the first) to `last`; return their namespace.

    `parameters` replace those of the parameters cell; `small` overrides the sizes, None leaves the preset's.
    `edits` are (old, new) replacements in the cells' source, for trying out what a change does; each must
    apply. Cells that draw are left out.
    """
    namespace = {"__name__": "cells"} if namespace is None else namespace
    namespace["SMALL"] = small
    cells, left = code_cells(notebook), dict(edits)
    ids = [cell.id for cell in cells]
    for cell in cells[ids.index(first) if first else 0 : ids.index(last) + 1]:
        if "figure" in tags(cell) or cell.id.endswith("-summary"):
            continue
        source = cell.source
        for old, new in edits:
            if old in source:
                source, _ = source.replace(old, new), left.pop(old, None)
        exec(compile(source, f"<{cell.id}>", "exec"), namespace)
        if small:
            exec(SMALLER.get(cell.id, ""), namespace)
        if cell.id == "parameters":
            namespace.update(parameters)
    if left:
        raise ValueError(f"not in the notebook: {list(left)}")
    return namespace


class Trap:
    """Ends this process with SIGKILL at the n-th event of a kind, and writes down what happens until then.

    The notebook knows nothing of it: files are watched through Python's audit events and `open`, batches and
    stages through Keras's list of callbacks.
    """

    def __init__(self, kind="none", number=0, run_dir="none", log=os.devnull):
        self.kind, self.left, self.run_dir, self.log = kind, number, str(run_dir), Path(log)
        self.plain_open = io.open

    def note(self, event, **details):
        """Append one line to the log, in one write."""
        line = json.dumps({"event": event, "time": time.time(), **details}) + "\n"
        with self.plain_open(self.log, "ab", buffering=0) as file:
            file.write(line.encode())

    def comes(self, kind):
        """Count an event; return whether it is the last that this process should see."""
        self.left -= kind == self.kind
        return kind == self.kind and self.left == 0

    def die(self):
        """End the process as the out-of-memory killer or a vanishing machine would."""
        os.kill(os.getpid(), signal.SIGKILL)

    def inside(self, path, folder=-1):
        """Return whether a path, absolute or below an open folder, lies in RUN_DIR."""
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False
        path = os.fsdecode(path)
        if folder != -1 and os.path.exists(f"/proc/self/fd/{folder}"):
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        return path.startswith(self.run_dir + os.sep)

    def audit(self, event, details):
        """Come before every operation that changes a file or folder in RUN_DIR."""
        if event == "open":
            changes = writes(details[1]) and self.inside(details[0])
        elif event in ("os.remove", "os.rmdir"):
            changes = self.inside(*details)
        else:
            changes = event in ("os.rename", "os.mkdir") and self.inside(details[0])
        if changes and self.comes("file"):
            self.die()

    def open(self, path, mode="r", *args, **options):
        """Open a file; come in the middle of every write if it lies in RUN_DIR."""
        file = self.plain_open(path, mode, *args, **options)
        return Halfway(file, self) if writes(mode) and self.inside(path) else file

    def watch_files(self):
        """Come before every operation that changes RUN_DIR, and in the middle of every write to it."""
        sys.addaudithook(self.audit)
        builtins.open = io.open = self.open

    def watch_training(self, results):
        """Come in every batch and after every stage; keep the state in which each training ends."""
        import keras

        callbacks, trap = keras.callbacks.CallbackList, self
        begin_epoch, begin_batch, end_training = (
            callbacks.on_epoch_begin,
            callbacks.on_train_batch_begin,
            callbacks.on_train_end,
        )

        def stage_of(listed):
            folder = next((c.backup_dir for c in listed.callbacks if hasattr(c, "backup_dir")), "none/none")
            return Path(folder).parent.name

        def on_epoch_begin(listed, epoch, logs=None):
            trap.note("epoch", stage=stage_of(listed), epoch=epoch)
            begin_epoch(listed, epoch, logs)

        def on_train_batch_begin(listed, batch, logs=None):
            if trap.comes("batch"):
                trap.die()
            begin_batch(listed, batch, logs)

        def on_train_end(listed, logs=None):
            model = next(c.model for c in listed.callbacks)
            variables = [keras.ops.convert_to_numpy(v) for v in [*model.weights, *model.optimizer.variables]]
            save_arrays(results / f"end-{stage_of(listed)}.npz", variables)
            trap.note("trained", stage=stage_of(listed))
            end_training(listed, logs)
            if trap.comes("stage"):
                trap.die()

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
        """Write everything, or half and die."""
        if self.trap.comes("write"):
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            self.trap.die()
        return self.file.write(content)


def environment(backend, **more):
    """Environment variables of a process that trains on the CPU, with that backend."""
    quiet = {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    return {**os.environ, "KERAS_BACKEND": backend, **quiet, **more}


def writes(mode):
    """Return whether a file is opened to be changed."""
    return isinstance(mode, str) and bool(set(mode) & set("wax+"))


def save_arrays(path, arrays):
    """Write arrays to an .npz file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name("part-" + path.name)
    np.savez(part, *arrays)
    os.replace(part, path)


def work(task):
    """Run the notebook's training in this process, as a task (a dict, see `start`) says."""
    trap = Trap(task["kind"], task["number"], task["parameters"]["RUN_DIR"], task["log"])
    trap.watch_files()
    trap.watch_training(Path(task["results"]))
    import keras

    if keras.backend.backend() == "tensorflow":
        import tensorflow

        tensorflow.config.experimental.enable_op_determinism()
    trap.note("start", keras=keras.__version__, backend=keras.backend.backend())
    namespace = run_cells(read(task["notebook"]), task["parameters"], small=task["small"])
    for name, stage in namespace["stages"].items():
        save_arrays(Path(task["results"]) / f"best-{name}.npz", stage["model"].get_weights())
        save_arrays(Path(task["results"]) / f"test-{name}.npz", [namespace["test_logits"][name]])
    trap.note("done")


@dataclass
class Training:
    """One training of a notebook in a folder of its own, killed and started again until it finishes."""

    notebook: Path
    folder: Path
    data: Path
    backend: str = "tensorflow"
    small: dict = field(default_factory=lambda: dict(SMALL))
    kills: int = 0
    resumes: int = 0
    lost: list = field(default_factory=list)
    complaints: list = field(default_factory=list)

    def start(self, kind="none", number=0):
        """Start a process; kill it by time, or let it kill itself. Returns "killed" or "done"."""
        (scratch := self.folder / "scratch").mkdir(parents=True)
        (log := self.folder / "log" / f"{time.time_ns()}.jsonl").parent.mkdir(exist_ok=True)
        task = {"notebook": str(self.notebook), "small": self.small, "kind": kind, "number": number}
        task |= {"log": str(log), "results": str(self.folder / "results")}
        task["parameters"] = {"PRESET": "smoke", "DATA_DIR": str(self.data), "RUN_DIR": str(self.run_dir)}
        env = environment(
            self.backend,
            TMPDIR=str(scratch),
            JAX_COMPILATION_CACHE_DIR=str(self.folder.parent / "compiled"),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        )
        began = time.time()
        with open(log.with_suffix(".txt"), "wb") as out:
            command = [sys.executable, __file__, "--task", json.dumps(task)]
            process = subprocess.Popen(command, env=env, stdout=out, stderr=out)
            try:
                if kind == "time":
                    wait_for_start(process, log)
                    time.sleep(number)
                    process.kill()
                process.wait(600)
            finally:
                process.kill()
        if process.returncode not in (0, -9) or (process.returncode, kind) == (-9, "none"):
            text = log.with_suffix(".txt").read_text(errors="replace")
            raise RuntimeError(f"the training failed:\n{text[-3000:]}")
        shutil.rmtree(scratch)
        moment = f"{kind} {number} of start {len(list(log.parent.glob('*.jsonl')))}"
        self.complaints += [f"{moment}: {text}" for text in broken_files(self.run_dir)]
        if process.returncode == 0:
            return "done"
        self.kills += 1
        self.account(began, time.time(), events_in(log))
        return "killed"

    def account(self, began, ended, events):
        """Note the seconds that a kill costs: training since the last backup, and a new start-up."""
        last = max((path.stat().st_mtime for path in self.run_dir.rglob("*") if final(path)), default=0)
        trained = [event["time"] for event in events if event["event"] in ("epoch", "trained")]
        start_up = (trained[0] if trained else ended) - began
        work = ended - max(last, trained[0]) if trained else 0
        self.lost.append((max(work, 0), start_up))

    @property
    def run_dir(self):
        """RUN_DIR of this training."""
        return self.folder / "runs"

    def epochs_begun(self):
        """Return {(stage, epoch): how often it was begun}."""
        begun = {}
        for log in sorted((self.folder / "log").glob("*.jsonl")):
            for event in events_in(log):
                if event["event"] == "epoch":
                    key = event["stage"], event["epoch"]
                    begun[key] = begun.get(key, 0) + 1
        return begun

    def finish(self, kills=()):
        """Be killed as `kills`, pairs of (kind, number), say, and start again until the training is done."""
        for kind, number in itertools.chain(kills, [("none", 0)]):
            self.resumes += self.kills > 0
            if self.start(kind, number) == "done":
                return self


def events_in(log):
    """Return the events that a process wrote down."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def wait_for_start(process, log):
    """Return when a process has begun with the cells, or has ended."""
    while process.poll() is None and not log.exists():
        time.sleep(0.02)


def draws(rng, longest):
    """Yield (kind, number) without end: when to kill; `longest` has the largest number for each kind."""
    while True:
        kind = KINDS[rng.choice(len(KINDS), p=[0.25, 0.25, 0.25, 0.2, 0.05])]
        if kind == "time":
            yield kind, float(rng.uniform(0, longest[kind]))
        else:
            yield kind, int(rng.integers(1, longest[kind] + 1))


def final(path):
    """Return whether a path bears the name of a finished file, not of one that is being written."""
    return path.is_file() and not path.name.startswith("partial-")


def broken_files(run_dir):
    """Return what is wrong with the files in RUN_DIR that bear their final names."""
    wrong = []
    for path in filter(final, Path(run_dir).rglob("*")):
        try:
            if path.name.startswith("epoch-"):
                whole = hashlib.sha256(path.read_bytes()).hexdigest()[:16] in path.name
            elif path.suffix == ".h5":
                whole = h5py.is_hdf5(path)
            elif path.suffix == ".keras":
                whole = zipfile.ZipFile(path).testzip() is None
            elif path.suffix == ".csv":
                rows = list(csv.DictReader(io.StringIO(path.read_text())))
                whole = [int(row["epoch"]) for row in rows] == list(range(len(rows)))
                whole = whole and not any(None in (*row.keys(), *row.values()) for row in rows)
            elif path.suffix == ".json":
                whole = isinstance(json.loads(path.read_text()), dict)
            else:
                wrong.append(f"{path.relative_to(run_dir)} should not be there")
                continue
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
            whole = False
        if not whole:
            wrong.append(f"{path.relative_to(run_dir)} is not whole")
    return wrong


def differences(broken, unbroken):
    """Return in what a finished training differs from the unbroken one, as a list of sentences; empty if in nothing."""
    found = []
    names = [sorted(path.name for path in (run.folder / "results").iterdir()) for run in (broken, unbroken)]
    if names[0] != names[1]:
        found.append(f"results {names[0]} instead of {names[1]}")
    for name in set(names[0]) & set(names[1]):
        one, two = (np.load(run.folder / "results" / name) for run in (broken, unbroken))
        if one.files != two.files or any(one[key].tobytes() != two[key].tobytes() for key in two.files):
            found.append(f"{name} differs")
    for path in sorted(unbroken.run_dir.rglob("*")):
        other = broken.run_dir / path.relative_to(unbroken.run_dir)
        if path.name == "history.csv" and (not other.exists() or other.read_bytes() != path.read_bytes()):
            found.append(f"{other.parent.name}/history.csv differs")
        elif path.name == "finished.json" and (not other.exists() or result(other) != result(path)):
            found.append(f"{other.parent.name}/finished.json differs")
    trees = [
        sorted(str(path.relative_to(run.run_dir)) for path in run.run_dir.rglob("*"))
        for run in (broken, unbroken)
    ]
    if extra := set(trees[0]) ^ set(trees[1]):
        found.append(f"only one of the two has {sorted(extra)}")
    return found + broken.complaints


def result(path):
    """Return what a finished.json says, without what differs between any two runs: time, and the file's digest."""
    state = json.loads(path.read_text())["state"]
    return {**state, "seconds": 0, "best": {**state["best"], "sha256": ""}}


def cost(notebook, data, build, images, epochs, folder):
    """Measure what protection costs: medians of an epoch's seconds with it, without, and inside callbacks.

    `build` names the function of the notebook whose model is trained, once under the notebook's callbacks and
    once under none. The first epoch, which compiles, does not count.
    """
    import keras

    parameters = {"PRESET": "gpu", "DATA_DIR": str(data), "RUN_DIR": str(folder)}
    cells = run_cells(read(notebook), parameters, last="train-stage", small=None)
    stage, marks = Path(folder) / "stage", []
    stage.mkdir(parents=True)
    size = cells["BUDGET"][build.split("_")[1] + "_batch"]
    batches = cells["EpochBatches"](cells["x_train"][:images], cells["y_train"][:images], size, 0)
    x_val, y_val = cells["x_val"], cells["y_val"]
    state = {"settings": {}, "epoch": 0, "history": [], "best": None, "seconds": 0.0}
    mark_times(keras.callbacks.CallbackList, marks)
    cells["fit_stage"](cells[build](), stage, state, batches, (x_val, y_val), epochs + 1)
    protected = epoch_times(marks)
    marks.clear()
    options = {"validation_data": (x_val, np.eye(10)[y_val]), "validation_batch_size": 500}
    cells[build]().fit(batches, epochs=epochs + 1, shuffle=False, verbose=0, **options)
    return protected[0], epoch_times(marks)[0], protected[1]


def mark_times(callbacks, marks):
    """Let Keras's list of callbacks append the times before and after each of its epoch events to `marks`."""

    def marked(plain):
        def method(self, *args, **options):
            marks.append(time.perf_counter())
            plain(self, *args, **options)
            marks.append(time.perf_counter())

        return method

    callbacks.on_epoch_begin = marked(callbacks.on_epoch_begin)
    callbacks.on_epoch_end = marked(callbacks.on_epoch_end)


def epoch_times(marks):
    """Return the medians of seconds an epoch and, of these, inside callbacks, from the second epoch on."""
    marks = np.reshape(marks, (-1, 4))[1:]
    inside = marks[:, 1] - marks[:, 0] + marks[:, 3] - marks[:, 2]
    return median(marks[:, 3] - marks[:, 0]), median(inside)


def unbroken(notebook, folder, data, backend, **options):
    """Train without a kill; return the `Training` and the largest numbers worth drawing for each kind of kill."""
    run = Training(notebook, folder, data, backend, **options).finish()
    if run.complaints:
        raise RuntimeError(f"the unbroken training is not whole: {run.complaints}")
    events = events_in(next((folder / "log").glob("*.jsonl")))
    begun = [event["time"] for event in events if event["event"] == "epoch"]
    batches = run.small["images"] // run.small["batch"]
    stages = len({event.get("stage") for event in events if event["event"] == "trained"})
    seconds = (begun[-1] - events[0]["time"]) / stages
    return run, {"time": seconds, "batch": 5 * batches, "file": 40, "write": 12, "stage": 2}


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
    work, start_up = np.array([lost for run in runs for lost in run.lost]).T
    print(f"kills {killed}, resumes {sum(run.resumes for run in runs)}, trainings finished {len(runs)}")
    print(f"epochs trained {sum(map(len, begun))}, of these repeated {repeated}")
    print(f"bit-identical to the unbroken run, files whole after every kill: {'NO' if found else 'yes'}")
    for text in found:
        print(f"  {text}")
    print(f"seconds lost per kill (median): {median(work + start_up):.1f}", end="")
    print(
        f" = {median(work):.2f} of training since the last backup + {median(start_up):.1f} until training goes on"
    )
    return not found


def print_cost(notebook, data, backend, build, images, epochs, folder):
    """Print what protection costs an epoch of a model, measured in a process of its own."""
    task = {"cost": [str(notebook), str(data), build, images, epochs, str(folder / f"cost-{build}")]}
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, __file__, "--task", json.dumps(task)]
    out = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout
    protected, bare, inside = json.loads(out.splitlines()[-1])
    print(
        f"{build}, {images:,} images an epoch: {protected:.2f} s with protection, {bare:.2f} s without",
        end="",
    )
    print(f" (medians of {epochs}), ratio {protected / bare:.3f}")
    print(f"  inside the callbacks {inside:.3f} s an epoch, ratio {protected / (protected - inside):.3f}")


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
    builders = ["compiled_small_cnn", "compiled_modern_cnn"]
    parser.add_argument(
        "--cost-of", nargs="*", default=builders, metavar="BUILDER", help="whose cost to measure"
    )
    parser.add_argument("--cost-images", type=int, default=45_000, help="images an epoch")
    parser.add_argument("--cost-epochs", type=int, default=3)
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        return (
            print(json.dumps(cost(*options.task["cost"]))) if "cost" in options.task else work(options.task)
        )
    with tempfile.TemporaryDirectory() as folder:
        folder, notebook, well = Path(folder), options.notebook.resolve(), True
        data = options.data and options.data.resolve() or made_data(folder)
        if options.kills:
            well = campaign(notebook, data, options.backend, options.kills, options.seed, folder)
        for build in options.cost_of:
            print_cost(
                notebook, data, options.backend, build, options.cost_images, options.cost_epochs, folder
            )
    sys.exit(not well)


def made_data(folder):
    """Return a folder with made-up data in the official layout."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import make_cifar

    return make_cifar(folder / "made")


if __name__ == "__main__":
    main()
