"""A stage of training with the notebooks' own cells, a tiny model, and ways to interrupt it within one process."""

import builtins
import contextlib
import io
import json
import signal
import subprocess
import sys
import zipfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from interruptions import Trap, broken_files, contents, run_cells
from notebooks import notebook_paths, read

NOTEBOOK = notebook_paths()[0]
FIRST, LAST = "batches", "run-arms"
EPOCHS, BATCH, IMAGES = 3, 50, 100
FAILURES = (AssertionError, pytest.fail.Exception, ValueError, OSError, RuntimeError, UserWarning, KeyError)


class Stopped(BaseException):
    """What an interruption looks like from inside; no `except` of the notebook catches it."""


class SoftTrap(Trap):
    """Interrupts with an exception, so that it can be used in one process again and again."""

    def die(self):
        """Raise `Stopped`."""
        raise Stopped

    @contextmanager
    def set(self, kind, number, run_dir):
        """Come at the n-th event of a kind in `run_dir`."""
        self.kind, self.number, self.run_dir, self.seen = kind, number, str(run_dir), Counter()
        builtins.open = io.open = self.open
        try:
            yield
        finally:
            builtins.open = io.open = self.plain_open
            self.kind = "none"


TRAP = SoftTrap()


def load_cells(data, run_dir):
    """Names that the notebook's cells define, up to `trained`; float32, so that a test chooses the number format."""
    import keras

    if keras.backend.backend() == "tensorflow":
        import tensorflow

        tensorflow.config.experimental.enable_op_determinism()
    parameters = {"PRESET": "smoke", "DATA_DIR": str(data), "RUN_DIR": str(run_dir), "RETRAIN": False}
    small = {"images": IMAGES, "epochs": EPOCHS, "batch": BATCH, "validation": 50}
    names = run_cells(read(NOTEBOOK), parameters, last=LAST, small=small)
    keras.config.set_dtype_policy("float32")
    names.update(PRECISION="float32")
    return names


@pytest.fixture(scope="session")
def cells(small_cifar, tmp_path_factory):
    """Names that the notebook's cells define, see `load_cells`."""
    sys.addaudithook(TRAP.audit)
    return load_cells(small_cifar, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def whole(cells, tmp_path_factory):
    """The stage, trained without an interruption."""
    stage = Stage(cells, tmp_path_factory.mktemp("whole")).train()
    assert stage.files() == ["epoch-0003.keras"]
    return stage


@pytest.fixture
def stage(cells, tmp_path):
    """A stage that was not trained yet."""
    return Stage(cells, tmp_path / "runs")


@dataclass
class Stage:
    """A stage of training in a folder of its own, with what it says."""

    cells: dict
    run: Path
    name: str = "stage"
    said: str = ""

    def train(self, build=None, epochs=EPOCHS, batch_size=BATCH, options=None, **changes):
        """Run `train_stage` with `options`; `changes` are other values of the cells' global names.

        Without a `build`, it trains the tiny model.
        """
        values = {"RUN": self.run, **changes}
        kept = {key: self.cells[key] for key in values if key in self.cells}
        self.cells.update(values)
        if build is None:
            build = partial(tiny_model, self.cells)
        try:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                train = self.cells["train_stage"]
                self.result = train(self.name, "A stage", build, epochs, batch_size, **(options or {}))
        finally:
            self.cells.update(kept)
        self.said = out.getvalue()
        return self

    @property
    def folder(self):
        """Where the stage is backed up."""
        return self.run / self.name

    @property
    def backups(self):
        """Backups of the stage, oldest first."""
        return sorted(self.folder.glob("epoch-*"))

    def files(self):
        """Names of all files of the stage."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*"))

    def outcome(self):
        """All that must not depend on interruptions."""
        told = {key: self.result[key] for key in ("title", "seed", "history", "training_flops", "parameters")}
        kept = contents(self.result["file"])
        return kept | {"result": json.dumps(told), "files": self.files(), "said": self.said}

    def assert_like(self, other):
        """Compare two outcomes; name what differs."""
        mine, its = self.outcome(), other.outcome()
        assert [key for key in {*mine, *its} if mine.get(key) != its.get(key)] == []
        assert broken_files(self.run) == []


def tiny_model(cells, built=False, rate=None, optimizer=None, network=None, smoothing=0.0):
    """A compiled network with all that must be restored: BatchNorm, noise, momenta, a schedule.

    `built` builds the optimizer before it is handed over; the rest replaces parts.
    """
    import keras

    steps = IMAGES // BATCH * EPOCHS
    rate = rate or keras.optimizers.schedules.CosineDecay(0.02, steps)
    optimizer = optimizer(rate) if optimizer else keras.optimizers.AdamW(rate, weight_decay=0.01)
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=smoothing)
    model = network() if network else tiny_network(cells)
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=cells["JIT"])
    if built:
        model.optimizer.build(model.trainable_variables)
    return model


def tiny_network(
    cells, shift=4, scale=1 / 255, size=1, width=4, drop=0.1, swap=False, frozen=False, cross=False
):
    """The tiny model's layers: images (batch, 32, 32, 3) to logits (batch, 10)."""
    import keras
    from keras import layers

    inputs = keras.Input((32, 32, 3), dtype="uint8")
    x = cells["RandomShift"](shift)(layers.RandomFlip("horizontal")(inputs))
    x = layers.UpSampling2D(size)(layers.Rescaling(scale)(x))
    x = layers.Conv2D(width, 4, strides=4, trainable=not frozen)(x)
    parts = [layers.BatchNormalization(momentum=0.5), layers.ReLU()]
    for part in reversed(parts) if swap else parts:
        x = part(x)
    x = layers.GlobalAveragePooling2D()(layers.Dropout(drop)(x))
    first = layers.Dense(8)(x)
    second = layers.Dense(8)(first)
    x = layers.Concatenate()([layers.Dense(8)(second), second if cross else first])
    return keras.Model(inputs, layers.Dense(10, dtype="float32")(x))


@contextmanager
def at_batch(epoch, batch, action):
    """Call `action` before a batch of an epoch, both counted from 0, of the next training that gets there."""
    import keras

    callbacks = keras.callbacks.CallbackList
    begin_epoch, begin_batch, now = callbacks.on_epoch_begin, callbacks.on_train_batch_begin, []

    def on_epoch_begin(self, number, logs=None):
        now[:] = [number]
        begin_epoch(self, number, logs)

    def on_train_batch_begin(self, number, logs=None):
        begin_batch(self, number, logs)
        if [*now, number] == [epoch, batch]:
            callbacks.on_epoch_begin, callbacks.on_train_batch_begin = begin_epoch, begin_batch
            action()

    callbacks.on_epoch_begin, callbacks.on_train_batch_begin = on_epoch_begin, on_train_batch_begin
    try:
        yield
    finally:
        callbacks.on_epoch_begin, callbacks.on_train_batch_begin = begin_epoch, begin_batch


def interrupted(stage, epoch=EPOCHS, **changes):
    """Train a stage until Ctrl-C, as the system sends it, in an epoch counted from 1."""
    # A process started in the background by a shell ignores Ctrl-C; a kernel never does.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with (
            at_batch(epoch - 1, 1, partial(signal.raise_signal, signal.SIGINT)),
            pytest.raises(KeyboardInterrupt),
        ):
            stage.train(**changes)
    finally:
        signal.signal(signal.SIGINT, handler)
    return stage


@contextmanager
def no_training():
    """Fail if a model is fitted."""
    import keras

    def fit(*args, **options):
        pytest.fail("a stage is trained that must not be")

    plain, keras.Model.fit = keras.Model.fit, fit
    try:
        yield
    finally:
        keras.Model.fit = plain


def run_setup(**values):
    """Run the cells that hold parameters and check them, with other values; return their names."""
    import keras

    notebook = read(NOTEBOOK)
    names = run_cells(notebook, {}, last="imports", small=None)
    try:
        return run_cells(notebook, values, "parameters", "setup", small=None, namespace=names)
    finally:
        keras.config.set_dtype_policy("float32")


def hole_is_found(hole, cells, whole, run):
    """Put a hole, (replacements in the cells, code to run after them, check), back, and see its check fail."""
    edits, code, check = hole
    names = run_cells(read(NOTEBOOK), {}, FIRST, LAST, small=None, edits=edits, namespace=dict(cells))
    exec(code, names)
    with pytest.raises(FAILURES) as caught:
        check(Stage(names, run), whole)
    print(f"{caught.type.__name__}: {str(caught.value)[:300]}")


def edit_state(path, change):
    """Let `change` alter the state (a dict) in a backup."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    state = json.loads(parts["state.json"])
    change(state)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (parts | {"state.json": json.dumps(state)}).items():
            archive.writestr(name, data)


@contextmanager
def small_disk(folder, size):
    """Mount a small file system in memory; skip the test where that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small file system cannot be mounted here; the checks without one have run")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def check_format(cells, run, policy, built):
    """A stage in that number format, interrupted in its second and third epoch, ends like an unbroken one."""
    import keras

    plain = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        options = {"build": partial(tiny_model, cells, built), "PRECISION": policy}
        model = options["build"]()
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer) == (policy == "mixed_float16")
        assert {layer.compute_dtype for layer in model.layers[-2:]} == {
            policy.removeprefix("mixed_"),
            "float32",
        }
        whole = Stage(cells, run / "whole").train(**options)
        stage = Stage(cells, run / "broken")
        for epoch in (2, 3):
            interrupted(stage, epoch, **options)
        stage.train(**options).assert_like(whole)
    finally:
        keras.config.set_dtype_policy(plain)


if (
    __name__ == "__main__"
):  # python stage_under_test.py DATA_DIR FOLDER: the number formats on KERAS_BACKEND, compiled
    data, folder = map(Path, sys.argv[1:])
    names = load_cells(data, folder / "runs")
    for policy in ("mixed_float16", "mixed_bfloat16"):
        for built in (False, True):
            check_format(names, folder / f"{policy}-{built}", policy, built)
            print(
                "like an unbroken one:",
                names["backend"],
                policy,
                "built before" if built else "not built",
                flush=True,
            )
