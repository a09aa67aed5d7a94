"""A stage goes on only from what is whole and its own; what is not is named, and nothing is lost."""

import copy
import errno
import json
import os
import shutil
import zipfile
from contextlib import contextmanager
from functools import partial

import pytest
from interruptions import broken_files, contents
from stage_under_test import (
    BATCH,
    EPOCHS,
    IMAGES,
    Stage,
    edit_state,
    hole_is_found,
    interrupted,
    no_training,
    run_setup,
    small_disk,
    tiny_model,
    tiny_network,
)


@pytest.fixture(scope="module")
def started(cells, tmp_path_factory):
    """The stage, interrupted in its last epoch: two backups."""
    return interrupted(Stage(cells, tmp_path_factory.mktemp("started")))


def copy_of(started, stage):
    """Put a copy of the files of `started` in the folder of `stage`; return `stage`."""
    shutil.copytree(started.folder, stage.folder, dirs_exist_ok=True)
    return stage


def flipped(data, position):
    """Return bytes with one bit changed."""
    position = int(position * (len(data) - 1))
    return data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :]


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "short by a byte": lambda data: data[:-1],
    "empty": lambda data: b"",
    "flipped": lambda data: flipped(data, 0.5),
    "something else": lambda data: b"<html></html>",
}


def damage(path, kind):
    """Spoil a file in one of these ways."""
    path.write_bytes(DAMAGES[kind](path.read_bytes()))


def check_damaged_backup(stage, whole, kinds=("truncated", "empty", "flipped")):
    """Where the newest backup is damaged, the one before takes over, with a warning that names the file."""
    for kind in kinds:
        interrupted(stage)
        damage(stage.backups[-1], kind)
        with pytest.warns(UserWarning, match="epoch-0002.keras is damaged"):
            stage.train().assert_like(whole)
        shutil.rmtree(stage.run)


def check_all_damaged(stage, whole):
    """Where no backup is whole, the error names them; training is not begun anew, and nothing is deleted."""
    interrupted(stage)
    kept = {path: path.read_bytes() for path in stage.backups}
    for kind in DAMAGES:
        for path, data in kept.items():
            path.write_bytes(DAMAGES[kind](data))
        with no_training(), pytest.raises(ValueError, match=r"Damaged.*epoch-0002.*epoch-0001.*delete"):
            stage.train()
        assert stage.files() == ["epoch-0001.keras", "epoch-0002.keras"]
    shutil.rmtree(stage.run)
    stage.train()
    damage(stage.backups[0], "flipped")
    with no_training(), pytest.raises(ValueError, match=r"Damaged.*epoch-0003.*delete"):
        stage.train()


def check_write_fails(stage, whole):
    """Where a write fails for good, training stops with an error that names file and remedy; later it goes on."""
    for code, text in ((errno.ENOSPC, "No space left on device"), (errno.EDQUOT, "Disk quota exceeded")):
        for number in (1, 3):
            with failing_writes(number, OSError(code, text)), pytest.raises(OSError) as caught:
                stage.train()
            assert_clear(caught.value, stage.run, code)
            assert stage.files() == [f"epoch-{epoch:04d}.keras" for epoch in range(1, number)]
        stage.train().assert_like(whole)
        shutil.rmtree(stage.run)


@contextmanager
def failing_writes(number, error):
    """Let the n-th write to the disk, and each later one, fail."""
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
    assert "space" in str(error) and "again" in str(error) and "resumes" in str(error)


def schedule(cells, edited=False):
    """A schedule of one's own, and one of the same name and configuration whose code was edited."""
    import keras

    class Ramp(keras.optimizers.schedules.LearningRateSchedule):
        """A rate that falls to zero."""

        def __call__(self, step):
            """Return the rate at a step."""
            part = 1 - keras.ops.cast(step, "float32") / (IMAGES // BATCH * EPOCHS)
            return 0.02 * (part**2 if edited else part)

        def get_config(self):
            """Return nothing, as the schedule has no parameters."""
            return {}

    return Ramp()


def changes(cells):
    """{what the error must name: changes of `Stage.train`} for everything that the result of a stage depends on."""
    import keras

    def network(**options):
        return {"build": partial(tiny_model, cells, network=partial(tiny_network, cells, **options))}

    def model(**options):
        return {"build": partial(tiny_model, cells, **options)}

    def other_weights():
        found = tiny_network(cells)
        kernel = found.layers[-1].kernel
        kernel.assign(kernel + 0.01)
        return found

    x, y, x_new, y_new = (cells[name].copy() for name in ("x_train", "y_train", "x_val", "y_val"))
    x[7, 3, 3, 1] ^= 1
    x_new[-1, 0, 0, 0] ^= 1
    y[5], y_new[5] = (y[5] + 1) % 10, (y_new[5] + 1) % 10
    cosine, adamw = keras.optimizers.schedules.CosineDecay, keras.optimizers.AdamW
    return [
        ("epochs: 3 then, 4 now", {"epochs": EPOCHS + 1}),
        ("seed: ", {"SEED": 1}),
        ("seed: ", {"options": {"seed": 1}}),
        ("batch size: 50 then, 25 now", {"batch_size": BATCH // 2}),
        ("data ", {"x_train": x}),
        ("data ", {"y_train": y}),
        ("data ", {"x_val": x_new}),
        ("data ", {"y_val": y_new}),
        ("data ", {"x_train": x[:75], "y_train": cells["y_train"][:75]}),
        ("learning rates: ", model(rate=cosine(0.03, IMAGES // BATCH * EPOCHS))),
        ("learning rates: ", model(rate=cosine(0.02, IMAGES // BATCH * EPOCHS, alpha=0.1))),
        ("label_smoothing: 0.0 then, 0.1 now", model(smoothing=0.1)),
        ("weight_decay: 0.01 then, 0.02 now", model(optimizer=partial(adamw, weight_decay=0.02))),
        ("optimizer class_name: AdamW then, SGD now", model(optimizer=keras.optimizers.SGD)),
        ("beta_1: 0.9 then, 0.8 now", model(optimizer=partial(adamw, weight_decay=0.01, beta_1=0.8))),
        ("rate: 0.1 then, 0.2 now", network(drop=0.2)),
        ("filters: 4 then, 5 now", network(width=5)),
        ("class_name: BatchNormalization then, ReLU now", network(swap=True)),
        ("keras_history: ", network(cross=True)),
        ("pixels: 4 then, 2 now", network(shift=2)),
        ("scale: ", network(scale=1 / 127.5)),
        ("size: 1 then, 2 now", network(size=2)),
        ("trainable: True then, False now", network(frozen=True)),
        ("initial weights: ", model(network=other_weights)),
        ("number format: float32 then, mixed_bfloat16 now", {"PRECISION": "mixed_bfloat16"}),
        ("backend: tensorflow on 1 cpu then, jax on 1 cpu now", {"backend": "jax"}),
        ("backend: tensorflow on 1 cpu then, tensorflow on 2 gpu now", {"DEVICES": 2, "DEVICE": "gpu"}),
    ]


def check_changes_are_refused(stage, whole, first="", finished=(False, True)):
    """A changed setting is named and nothing is lost, whether the stage had finished or not."""
    for finish in finished:
        stage.train() if finish else interrupted(stage)
        kept = {path: path.read_bytes() for path in stage.backups}
        for text, change in changes(stage.cells):
            if not text.startswith(first):
                continue
            with no_training(), pytest.raises(ValueError) as caught:
                stage.train(**change)
                pytest.fail(text)
            message = str(caught.value)
            assert text in message and str(stage.folder) in message
            assert "RUN_DIR" in message and "RETRAIN" in message and len(message) < 1200
        assert {path: path.read_bytes() for path in stage.backups} == kept
    stage.train().assert_like(whole)


def check_edited_schedule(stage, whole):
    """A schedule whose code was edited is noticed, though its name and its configuration are what they were."""
    plain, edited = (
        partial(tiny_model, stage.cells, rate=schedule(stage.cells, kind)) for kind in (False, True)
    )
    interrupted(stage, build=plain)
    with no_training(), pytest.raises(ValueError, match="learning rates: 0.0"):
        stage.train(build=edited)


def with_defaults(settings):
    """Return settings with a key more in every dict, as a newer Keras writes them down."""
    if isinstance(settings, dict):
        return {key: with_defaults(value) for key, value in settings.items()} | {"new_default": 1}
    return [with_defaults(value) for value in settings] if isinstance(settings, list) else settings


def check_another_keras(stage, whole):
    """A newer or older Keras alone is no change, for a stage that had begun and for one that had finished."""

    def newer(state):
        state["keras"] = "9.9.9"
        state["settings"] = with_defaults(state["settings"])

    def stage_settings(*arguments):
        return with_defaults(plain(*arguments))

    plain = stage.cells["stage_settings"]
    for finish in (False, True):
        for now in (plain, stage_settings):
            stage.train() if finish else interrupted(stage)
            if now is plain:
                edit_state(stage.backups[-1], newer)
            stage.train(stage_settings=now)
            mine, its = stage.outcome(), whole.outcome()
            assert {key for key in mine if mine[key] != its[key]} <= {"settings"}
            with (
                no_training(),
                pytest.raises(ValueError, match=r"epochs: 3 then, 4 now; .*; Keras \d.* then, \d.* now"),
            ):
                stage.train(epochs=EPOCHS + 1)
            shutil.rmtree(stage.run)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_in_one_process(check, stage, whole):
    check(stage, whole)


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_of_any_kind_is_passed_over(kind, started, stage, cells):
    settings = copy.deepcopy(started_settings(copy_of(started, stage)))
    damage(stage.backups[-1], kind)
    with pytest.warns(UserWarning, match="epoch-0002.keras is damaged"):
        state, path = cells["restore"](stage.folder, settings)
    assert path.name == "epoch-0001.keras" and len(state["history"]) == 1
    assert stage.files() == ["epoch-0001.keras"]


def started_settings(stage):
    """The settings that a stage was begun with."""
    with zipfile.ZipFile(stage.backups[-1]) as archive:
        return json.loads(archive.read("state.json"))["settings"]


@pytest.mark.filterwarnings("ignore:.*is damaged")
def test_a_flipped_bit_anywhere_is_harmless_or_passed_over(started, stage, cells):
    settings, good = started_settings(started), started.backups[-1].read_bytes()
    expected, passed = contents(started.backups[-1]), 0
    for number in range(200):
        copy_of(started, stage)
        stage.backups[-1].write_bytes(flipped(good, number / 199))
        state, path = cells["restore"](stage.folder, settings)
        passed += path.name == "epoch-0001.keras"
        assert path.name == "epoch-0001.keras" or contents(path) == expected
    assert passed > 150


@pytest.mark.parametrize("value", [True, False, "False", "false", "True", 1, 0, None])
def test_only_retrain_true_deletes(value, whole, cells, tmp_path):
    """RETRAIN deletes in the cell that checks the parameters, if it is exactly True; any other word is refused."""
    stage = copy_of(whole, Stage(cells, tmp_path / "1_CNN_Model" / "smoke-seed0"))
    parameters = {"PRESET": "smoke", "RUN_DIR": str(tmp_path), "RETRAIN": value}
    if type(value) is bool:
        assert run_setup(**parameters)["RUN"] == stage.run
    else:
        with pytest.raises(ValueError, match="RETRAIN is .* must be True or False"):
            run_setup(**parameters)
    assert stage.folder.exists() == (value is not True) and stage.run.exists()


def test_retrain_is_not_ignored_where_nothing_can_be_deleted(tmp_path, monkeypatch):
    def refuse(path, ignore_errors=False, **options):
        if not ignore_errors:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (tmp_path / "1_CNN_Model" / "smoke-seed0").mkdir(parents=True)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(PermissionError):
        run_setup(PRESET="smoke", RUN_DIR=str(tmp_path), RETRAIN=True)


def test_disk_full(cells, whole, tmp_path):
    """On a real file system that is full at different moments, training stops clearly, and goes on later."""
    stage = Stage(cells, tmp_path / "size")
    size = interrupted(stage).backups[-1].stat().st_size
    with small_disk(tmp_path / "disk", 20 * size) as disk:
        for room in (0.5, 1.5, 2.5):
            stage, filler = Stage(cells, disk / "runs"), disk / "filler"
            stage.folder.mkdir(parents=True)
            filler.write_bytes(bytes(int(shutil.disk_usage(disk).free - room * size)))
            with pytest.raises(OSError) as caught:
                stage.train()
            assert_clear(caught.value, stage.run)
            assert broken_files(stage.run) == [] and not list(stage.run.rglob("part-*"))
            filler.unlink()
            stage.train().assert_like(whole)
            shutil.rmtree(stage.run)


def hole(old, new, check):
    """A hole that is one replacement in the cells."""
    return [(old, new)], "", check


def refused(name):
    """The check that a change of what is named is refused, on a stage that had begun."""
    return partial(check_changes_are_refused, first=name, finished=[False])


def forgotten(name):
    """Code that leaves a setting out."""
    code = (
        f"{{key: value for key, value in whole_settings(*arguments).items() if not key.startswith({name!r})}}"
    )
    return f"whole_settings = stage_settings\n\ndef stage_settings(*arguments):\n    return {code}"


OLD_KEYS = "for k in then if k in now for text in differences(then[k], now[k],"
ALL_KEYS = "for k in {**then, **now} for text in differences(then.get(k), now.get(k),"
HOLES = {
    "backups are not checked": hole("if archive.testzip() is None else None", "", check_damaged_backup),
    "damaged backups stay": hole("damaged.unlink(missing_ok=True)", "pass", check_damaged_backup),
    "damaged backups begin anew": hole(
        "if found:\n        raise", "if False:\n        raise", check_all_damaged
    ),
    "a full disk is not explained": hole("except OSError as", "except KeyError as", check_write_fails),
    "half a file stays": hole("        part.unlink(missing_ok=True)", "        pass", check_write_fails),
    "a newer Keras is refused": hole(OLD_KEYS, ALL_KEYS, check_another_keras),
    "changes are not noticed": ([], "def differences(*args): return []", check_changes_are_refused),
    "an edited schedule": ([], forgotten("learning rates"), check_edited_schedule),
    "wiring": hole("str(ids.setdefault(name[0], len(ids)))", "'0'", refused("keras_history")),
    "a number in the name of an option": hole('"[^:])', '")', refused("beta_1")),
    "other data": ([], forgotten("data"), refused("data")),
    "other initial weights": ([], forgotten("initial weights"), refused("initial weights")),
    "another network": ([], forgotten("config"), refused("filters")),
    "another recipe": ([], forgotten("compile_config"), refused("label_smoothing")),
    "another number format": ([], forgotten("number format"), refused("number format")),
    "another device": ([], forgotten("backend"), refused("backend")),
}


@pytest.mark.parametrize("name", HOLES)
def test_hole_put_back_is_found(name, cells, whole, tmp_path):
    hole_is_found(HOLES[name], cells, whole, tmp_path / "runs")
