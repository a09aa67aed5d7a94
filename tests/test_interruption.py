"""A training that is interrupted at any moment ends as if it had not been, or stops and says why."""

import builtins
import errno
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from conftest import require_backend
from interruptions import Training, Trap, broken_files, differences, result, run_cells, unbroken
from notebooks import notebook_paths, read

NOTEBOOK = notebook_paths()[0]
FIRST, LAST = "derived-seed", "train-stage"
EPOCHS, BATCH = 3, 50
KILLS = [("write", 4), ("file", 21), ("batch", 6), ("stage", 1), ("time", 0.5)]


# Whole processes, killed.


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_killed_training_ends_like_an_unbroken_one(backend, small_cifar, tmp_path):
    require_backend(backend)
    small = {"images": 100, "epochs": 2, "batch": 25}
    whole, _ = unbroken(NOTEBOOK, tmp_path / "unbroken", small_cifar, backend, small=small)
    killed = Training(NOTEBOOK, tmp_path / "killed", small_cifar, backend, small=small).finish(KILLS)
    assert killed.kills == len(KILLS)
    assert differences(killed, whole) == []
    begun = killed.epochs_begun()
    assert set(begun) == set(whole.epochs_begun())
    assert sum(begun.values()) - len(begun) <= killed.kills
    assert killed.start() == "done"
    assert killed.epochs_begun() == begun, "a finished training was trained again"


# One process: the same cells, a tiny model, and exceptions in the place of kills.


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
        self.kind, self.left, self.run_dir = kind, number, str(run_dir)
        builtins.open = io.open = self.open
        try:
            yield
        finally:
            builtins.open = io.open = self.plain_open
            self.kind = "none"


TRAP = SoftTrap()


@pytest.fixture(scope="module")
def cells(small_cifar, tmp_path_factory):
    """Names that the notebook's cells define, up to the training."""
    import keras

    if keras.backend.backend() == "tensorflow":
        import tensorflow

        tensorflow.config.experimental.enable_op_determinism()
    sys.addaudithook(TRAP.audit)
    run_dir = tmp_path_factory.mktemp("runs")
    parameters = {"PRESET": "smoke", "DATA_DIR": str(small_cifar), "RUN_DIR": str(run_dir), "RETRAIN": False}
    small = {"images": 2 * BATCH, "epochs": EPOCHS, "batch": BATCH}
    names = run_cells(read(NOTEBOOK), parameters, last=LAST, small=small)
    yield names
    keras.mixed_precision.set_global_policy("float32")


@dataclass
class Stage:
    """A stage of training in a folder of its own, with what it leaves behind in memory."""

    cells: dict
    run: Path
    name: str = "stage"

    def train(self, retrain=False, epochs=EPOCHS, build=None, **changes):
        """Run `train_stage` as a notebook does; keep the last values of all variables in `self.end`."""
        import keras

        globals_ = {"RUN": self.run, "RETRAIN": retrain, **changes}
        kept = {key: self.cells[key] for key in globals_}
        self.cells.update(globals_)
        callbacks, plain = keras.callbacks.CallbackList, keras.callbacks.CallbackList.on_train_end

        def on_train_end(listed, logs=None):
            model = listed.callbacks[0].model
            self.end = [keras.ops.convert_to_numpy(v) for v in [*model.weights, *model.optimizer.variables]]
            plain(listed, logs)

        callbacks.on_train_end = on_train_end
        try:
            build = build or partial(tiny_model, len(self.cells["x_train"]) // BATCH)
            self.result = self.cells["train_stage"](self.name, "A stage", build, epochs, BATCH)
            return self
        finally:
            callbacks.on_train_end = plain
            self.cells.update(kept)

    @property
    def folder(self):
        """Where the stage is backed up."""
        return self.run / self.name

    @property
    def backups(self):
        """Backups of the stage, oldest first."""
        return sorted(self.folder.glob("backup/*"))

    def files(self):
        """Names of all files of the stage."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*"))

    def outcome(self):
        """All that must not depend on interruptions, as bytes."""
        best = self.result["model"].get_weights()
        return {
            "last weights": [array.tobytes() for array in self.end],
            "best weights": [array.tobytes() for array in best],
            "history.csv": (self.folder / "history.csv").read_bytes(),
            "curve": json.dumps(self.result["history"]),
            "finished.json": json.dumps(result(self.folder / "finished.json"), sort_keys=True),
            "files": self.files(),
        }

    def assert_like(self, other):
        """Compare two outcomes; name what differs."""
        mine, its = self.outcome(), other.outcome()
        assert [key for key in mine if mine[key] != its[key]] == []
        assert broken_files(self.run) == []


def tiny_model(steps):
    """A network with all that must be restored: BatchNorm, noise, momenta, a schedule.

    It learns for two epochs and is then ruined by a huge rate, so its best epoch is not its last.
    """
    import keras
    from keras import layers

    inputs = keras.Input((32, 32, 3), dtype="uint8")
    x = layers.RandomFlip()(layers.Rescaling(1 / 255)(inputs))
    x = layers.Conv2D(4, 4, strides=4)(x)
    x = layers.Dropout(0.1)(layers.ReLU()(layers.BatchNormalization(momentum=0.5)(x)))
    logits = layers.Dense(10, dtype="float32")(layers.Flatten()(x))
    model = keras.Model(inputs, logits)
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([2 * steps - 1], [0.02, 10.0])
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"], run_eagerly=True)
    return model


@pytest.fixture(scope="module")
def whole(cells, tmp_path_factory):
    """The stage, trained without an interruption."""
    stage = Stage(cells, tmp_path_factory.mktemp("whole")).train()
    assert stage.files() == ["best-0002.keras", "finished.json", "history.csv"]
    assert stage.result["best"]["epoch"] == 2 and len(stage.result["history"]) == EPOCHS
    return stage


@pytest.fixture
def stage(cells, tmp_path):
    """A stage that was not trained yet."""
    return Stage(cells, tmp_path / "runs")


@contextmanager
def interruption(epoch, batch=1, error=None):
    """Raise in a batch of an epoch (both from 0): Ctrl-C, as the system sends it, or `error`."""
    import keras

    callbacks = keras.callbacks.CallbackList
    begin_epoch, begin_batch, now = callbacks.on_epoch_begin, callbacks.on_train_batch_begin, []

    def on_epoch_begin(self, number, logs=None):
        now[:] = [number]
        begin_epoch(self, number, logs)

    def on_train_batch_begin(self, number, logs=None):
        begin_batch(self, number, logs)
        if (now[0], number) == (epoch, batch):
            if error:
                raise error
            signal.raise_signal(signal.SIGINT)

    callbacks.on_epoch_begin, callbacks.on_train_batch_begin = on_epoch_begin, on_train_batch_begin
    # A process started in the background by a shell ignores Ctrl-C; a kernel never does.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(type(error) if error else KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGINT, handler)
        callbacks.on_epoch_begin, callbacks.on_train_batch_begin = begin_epoch, begin_batch


@contextmanager
def no_training():
    """Fail if a model is fitted."""
    import keras

    def fit(*args, **options):
        raise AssertionError("a finished stage is trained again")

    plain, keras.Model.fit = keras.Model.fit, fit
    try:
        yield
    finally:
        keras.Model.fit = plain


def interrupted(stage, epoch=EPOCHS, **changes):
    """Train a stage until it is interrupted in an epoch, counted from 1."""
    with interruption(epoch - 1):
        stage.train(**changes)
    return stage


# What must hold. Each check is also run on cells with a hole put back, where it must fail.


def check_resumes(stage, whole):
    """Ctrl-C in every epoch, running the cell again each time, changes nothing."""
    for epoch in range(1, EPOCHS + 1):
        interrupted(stage, epoch)
        assert len(stage.backups) == min(epoch - 1, 2)
    stage.train().assert_like(whole)


def check_operations(stage, whole, first=1):
    """An interruption before any one change to the files of the stage changes nothing."""
    assert check_interruptions(stage, whole, "file", first) > 20


def check_half_writes(stage, whole):
    """A write that stops halfway leaves no broken file behind and changes nothing."""
    assert check_interruptions(stage, whole, "write") > 8


def check_leftovers(stage, whole):
    """What an interrupted write left behind goes when training goes on, not only when it is over."""
    with TRAP.set("write", 5, stage.run), pytest.raises(Stopped):
        stage.train()
    assert list(stage.run.rglob("partial-*"))
    assert not list(interrupted(stage).run.rglob("partial-*"))


def check_interruptions(stage, whole, kind, first=1):
    """Interrupt at each event of a kind, once; return how many there are."""
    for number in itertools.count(first):
        try:
            with TRAP.set(kind, number, stage.run):
                stage.train()
            return number
        except Stopped:
            assert broken_files(stage.run) == []
            stage.train().assert_like(whole)
            shutil.rmtree(stage.run)


def check_finished_is_loaded(stage, whole):
    """A finished stage is loaded, and says what it said."""
    stage.train()
    before = stage.outcome()
    with no_training():
        stage.train()
    assert stage.outcome() == before


def check_retrain(stage, whole):
    """RETRAIN throws the old training away, and only then."""
    stage.train(epochs=2)
    stage.train(retrain=True).assert_like(whole)


def check_retrain_is_not_ignored(stage, whole):
    """Where the old training cannot be deleted, RETRAIN does not pass it off as new."""
    stage.train()
    plain, shutil.rmtree = shutil.rmtree, lambda path, ignore_errors=False, **options: refuse(ignore_errors)
    try:
        with no_training(), pytest.raises(OSError):
            stage.train(retrain=True)
    finally:
        shutil.rmtree = plain


def refuse(quietly):
    """Fail like a drive that deletes nothing."""
    if not quietly:
        raise PermissionError(errno.EACCES, "Permission denied")


def check_stages_do_not_mix(stage, whole):
    """A second stage of the same model does not take over what the first left behind, finished or not."""
    other = interrupted(Stage(stage.cells, stage.run, "other"))
    stage.train().assert_like(whole)
    fresh = Stage(stage.cells, stage.run.with_name("alone"), "other").train()
    assert other.train().outcome() == fresh.outcome() != stage.outcome()


def check_changes_are_refused(stage, whole):
    """A changed parameter is reported and nothing is lost, whether the stage had finished or not."""

    def another_model(steps):
        model = tiny_model(steps)
        model.compile("sgd", model.loss, metrics=["accuracy"], run_eagerly=True)
        return model

    images = stage.cells["x_train"]
    changes = {
        "epochs: 3 then, 4 now": {"epochs": EPOCHS + 1},
        "seed: 0 then, 1 now": {"SEED": 1},
        "training images: 100 then, 75 now": {"x_train": images[:75], "y_train": stage.cells["y_train"][:75]},
        "data: ": {"DATA_SHA256": "0" * 64},
        "precision: ": {"PRECISION": "another"},
        "model: ": {"build": partial(another_model, 2)},
    }
    for finish in (False, True):
        stage.train() if finish else interrupted(stage)
        kept = {path: path.read_bytes() for path in stage.folder.rglob("*") if path.is_file()}
        for text, change in changes.items():
            with no_training(), pytest.raises(ValueError) as caught:
                stage.train(**change)
            assert text in str(caught.value) and str(stage.folder) in str(caught.value)
            assert "RUN_DIR" in str(caught.value) and "RETRAIN" in str(caught.value)
        assert {path: path.read_bytes() for path in stage.folder.rglob("*") if path.is_file()} == kept
    stage.train().assert_like(whole)


def flipped(data, position):
    """Return bytes with one bit changed."""
    position = int(position * len(data))
    return data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :]


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "flipped": lambda data: flipped(data, 0.5),
    "flipped late": lambda data: flipped(data, 0.9),
}


def damage(path, kind):
    """Spoil a file in one of four ways."""
    path.write_bytes(DAMAGES[kind](path.read_bytes()))


def check_damaged_backup(stage, whole, kinds=tuple(DAMAGES)):
    """Where the newest backup is damaged, the one before takes over; where none is left, the error names them."""
    for kind in kinds:
        interrupted(stage)
        damage(stage.backups[-1], kind)
        interrupted(stage)
        assert len(stage.backups) == 2 and broken_files(stage.run) == []
        stage.train().assert_like(whole)
        shutil.rmtree(stage.run)
    interrupted(stage)
    for path in stage.backups:
        damage(path, kinds[0])
    with no_training(), pytest.raises(ValueError, match=r"epoch-0002.*epoch-0001.*Delete"):
        stage.train()


def check_damaged_best(stage, whole):
    """A damaged best model is never passed off as the best, while training and after."""
    interrupted(stage)
    damage(stage.folder / "best-0002.keras", "flipped")
    stage.train().assert_like(whole)
    for kind in DAMAGES:
        shutil.copy(whole.folder / "best-0002.keras", stage.folder)
        shutil.copy(whole.folder / "finished.json", stage.folder)
        damage(stage.folder / "best-0002.keras", kind)
        with no_training(), pytest.raises(ValueError, match=r"best-0002\.keras is damaged.*[Dd]elete"):
            stage.train()


def check_damaged_note(stage, whole):
    """A damaged note about the end is refused by name, also where it still is readable JSON."""
    stage.train()
    note = stage.folder / "finished.json"
    text = note.read_text()
    spoiled = {kind: function(text.encode()) for kind, function in DAMAGES.items()}
    spoiled["another epoch"] = text.replace('"epoch": 2,', '"epoch": 1,').encode()
    spoiled["a list"] = b"[]"
    for kind, data in spoiled.items():
        note.write_bytes(data)
        with no_training(), pytest.raises(ValueError, match=r"finished\.json is damaged.*[Dd]elete"):
            stage.train()
            pytest.fail(kind)


def check_damaged_curve(stage, whole):
    """history.csv is made anew from the backup, while training and after."""
    for kind in DAMAGES:
        interrupted(stage)
        damage(stage.folder / "history.csv", kind)
        stage.train().assert_like(whole)
        damage(stage.folder / "history.csv", kind)
        with no_training():
            stage.train()
        stage.assert_like(whole)
        shutil.rmtree(stage.run)


def check_flaky_drive(stage, whole):
    """A drive on which every other rename and every deletion fails costs time, and nothing else."""
    replace, unlink, count = os.replace, os.unlink, [0]

    def flaky(source, target):
        count[0] += 1
        if count[0] % 2:
            raise OSError(errno.EIO, "Input/output error", str(source))
        replace(source, target)

    def failing(path, *args, **options):
        if str(path).startswith(str(stage.run)):
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected", str(path))
        unlink(path, *args, **options)

    sleep = stage.cells["time"].sleep
    os.replace, os.unlink, stage.cells["time"].sleep = flaky, failing, lambda seconds: None
    try:
        stage.train()
    finally:
        os.replace, os.unlink, stage.cells["time"].sleep = replace, unlink, sleep
    with no_training():
        stage.train()
    stage.assert_like(whole)


def check_write_fails(stage, whole, number=5):
    """Where a write fails for good, training stops with an error that names file and remedy; later it goes on."""
    for code, message in ((errno.ENOSPC, "No space left on device"), (errno.EDQUOT, "Disk quota exceeded")):
        with full_disk(stage, number, OSError(code, message)), pytest.raises(OSError) as caught:
            stage.train()
        assert_clear(caught.value, stage.run, code)
        assert broken_files(stage.run) == []
        assert not list(stage.run.rglob("partial-*"))
        stage.train().assert_like(whole)
        shutil.rmtree(stage.run)


@contextmanager
def full_disk(stage, number, error):
    """Let the n-th write to the stage's files, and each later one, fail."""
    left, plain = [number], os.fsync

    def fsync(descriptor):
        left[0] -= 1
        if left[0] <= 0:
            raise error
        plain(descriptor)

    os.fsync = fsync
    try:
        yield
    finally:
        os.fsync = plain


def assert_clear(error, folder, code=errno.ENOSPC):
    """The error has the number, names a file and says what to do."""
    assert error.errno == code and str(error.filename).startswith(str(folder)), error
    assert "RUN_DIR" in str(error) and "space" in str(error) and "again" in str(error)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]
CHECKS.remove(check_interruptions)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_in_one_process(check, stage, whole):
    check(stage, whole)


# The holes that these checks are for, put back one at a time: (replacements in the cells, code to run after them).

TWO_STEPS = """
new_state = restore

def save_backup(model, folder, state):
    (folder / "backup").mkdir(exist_ok=True)
    model.save_weights(folder / "backup" / "latest.weights.h5")
    (folder / "backup" / "training_metadata.json").write_text(json.dumps(state))

def restore(model, folder, settings):
    if not (folder / "backup" / "training_metadata.json").exists():
        return new_state(model, folder, settings)
    model.optimizer.build(model.trainable_variables)
    model.load_weights(folder / "backup" / "latest.weights.h5")
    return json.loads((folder / "backup" / "training_metadata.json").read_text())
"""
IN_PLACE = """
def write_whole(path, content):
    with open(path, "wb") as file:
        file.write(content)
"""
SAME_NOISE = "EpochSeed.on_epoch_begin = lambda self, epoch, logs=None: self.batches.start_epoch(epoch)"
SAME_ORDER = """
def start_epoch(self, epoch):
    self.order = np.random.permutation(len(self.inputs))

EpochBatches.start_epoch = start_epoch
"""
EMPTY_HISTORY = """
whole_restore = restore

def restore(model, folder, settings):
    return {**whole_restore(model, folder, settings), "history": []}
"""
FAILURES = (AssertionError, pytest.fail.Exception, ValueError, OSError, zipfile.BadZipFile)
HOLES = {
    "weights and epoch are written in two steps": ([], TWO_STEPS, partial(check_operations, first=12)),
    "files are written in place": ([], IN_PLACE, check_half_writes),
    "noise does not know the epoch": ([], SAME_NOISE, check_resumes),
    "shuffling does not know the epoch": ([], SAME_ORDER, check_resumes),
    "the history restarts empty": ([], EMPTY_HISTORY, check_resumes),
    "the best value so far is forgotten": (
        [("initial_value_threshold=best_so_far", "initial_value_threshold=None")],
        "",
        check_resumes,
    ),
    "a finished stage is forgotten": ([], "def read_finished(folder): pass", check_finished_is_loaded),
    "two stages share a folder": ([("RUN / name", 'RUN / "stage"')], "", check_stages_do_not_mix),
    "nothing is backed up": ([], "def save_backup(*args): pass", check_resumes),
    "changed settings are not noticed": ([], "def check_settings(*args): pass", check_changes_are_refused),
    "backups are not checked": (
        [("checksum(path) not in path.name", "False")],
        "",
        partial(check_damaged_backup, kinds=["flipped"]),
    ),
    "the backup before is not kept": (
        [('glob("epoch-*"))[:-2]', 'glob("epoch-*"))[:-1]')],
        "",
        check_damaged_backup,
    ),
    "damaged backups stay": ([('*folder.glob("backup/epoch-*")', "")], "", check_damaged_backup),
    "the best model is not checked": (
        [
            ('or checksum(best) != state["best"]["sha256"]', ""),
            ('and checksum(path) == note["state"]["best"]["sha256"]', ""),
        ],
        "",
        check_damaged_best,
    ),
    "the note is not checked": (
        [('hexdigest() == note["sha256"]', "hexdigest() > ''")],
        "",
        check_damaged_note,
    ),
    "the curve is not made anew": (
        [('write_whole(folder / "history.csv", history_text(state))', "pass")],
        "",
        check_damaged_curve,
    ),
    "leftovers of a kill stay": ([], "def clear_leftovers(*args): pass", check_leftovers),
    "leftovers of a finished stage stay": (
        [("        clear_finished(folder, state)\n        print", "        print")],
        "",
        partial(check_operations, first=22),
    ),
    "RETRAIN ignores errors": (
        [("shutil.rmtree(folder)", "shutil.rmtree(folder, ignore_errors=True)")],
        "",
        check_retrain_is_not_ignored,
    ),
    "a write is tried once": ([("attempts=3", "attempts=1")], "", check_flaky_drive),
    "a full disk is not explained": ([], "def not_saved(error, path): return error", check_write_fails),
}


@pytest.mark.parametrize("hole", HOLES)
def test_hole_put_back_is_found(hole, cells, whole, tmp_path):
    edits, code, check = HOLES[hole]
    names = run_cells(read(NOTEBOOK), {}, FIRST, LAST, small=None, edits=edits, namespace=dict(cells))
    exec(code, names)
    with pytest.raises(FAILURES) as caught:
        check(Stage(names, tmp_path / "runs"), whole)
    print(f"{hole}: {caught.type.__name__}: {str(caught.value)[:300]}")


def test_disk_full(cells, whole, tmp_path):
    """On a real file system that is full at different moments, training stops clearly, and goes on later."""
    size = sum(path.stat().st_size for path in whole.folder.iterdir())
    with small_disk(tmp_path / "disk", 100 * size) as disk:
        for room in (0, 1, 2, 3, 4):
            stage, filler = Stage(cells, disk / "runs"), disk / "filler"
            stage.folder.mkdir(parents=True)
            free = shutil.disk_usage(disk).free - room * size - 4096
            filler.write_bytes(bytes(free))
            with pytest.raises(OSError) as caught:
                stage.train()
            assert_clear(caught.value, stage.run)
            assert broken_files(stage.run) == [] and not list(stage.run.rglob("partial-*"))
            filler.unlink()
            stage.train().assert_like(whole)
            shutil.rmtree(stage.run)


def test_temporary_folder_full(cells, whole, stage, tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", 16_384) as disk:
        monkeypatch.setattr("tempfile.tempdir", str(disk))
        with pytest.raises(OSError) as caught:
            stage.train()
        assert_clear(caught.value, disk)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stage.train().assert_like(whole)


@contextmanager
def small_disk(folder, size):
    """Mount a small file system in memory; skip the test where that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small file system cannot be mounted here; the checks with failing writes have run")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_float16_with_a_scaled_loss_resumes(cells, tmp_path):
    """The number format of older GPUs: Keras wraps the optimizer, and the scale of the loss is in the backup."""
    import keras

    def build():
        model = tiny_model(len(cells["x_train"]) // BATCH)
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        assert [layer.compute_dtype for layer in model.layers[-2:]] == ["float16", "float32"]
        assert model.output.dtype == "float32"
        return model

    policy = keras.mixed_precision.dtype_policy()
    keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        options = {"build": build, "PRECISION": "mixed_float16"}
        unbroken_stage = Stage(cells, tmp_path / "whole").train(**options)
        stage = Stage(cells, tmp_path / "runs")
        for epoch in range(1, EPOCHS + 1):
            interrupted(stage, epoch, **options)
        stage.train(**options).assert_like(unbroken_stage)
    finally:
        keras.mixed_precision.set_global_policy(policy)
