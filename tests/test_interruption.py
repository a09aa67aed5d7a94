"""A training that is interrupted at any moment ends as if it had not been."""

import os
import shutil
import subprocess
import sys
import warnings
from functools import partial

import numpy as np
import pytest
import stage_under_test
from conftest import require_backend
from interruptions import Training, broken_files, contents, differences, environment, run_cells, unbroken
from notebooks import read
from stage_under_test import (
    BATCH,
    EPOCHS,
    FIRST,
    LAST,
    NOTEBOOK,
    TRAP,
    Stage,
    Stopped,
    at_batch,
    check_format,
    hole_is_found,
    interrupted,
    no_training,
    run_setup,
    small_disk,
    tiny_model,
    tiny_network,
)

KILLS = [("write", 30), ("file", 4), ("batch", 5), ("time", 3.0)]


# Whole processes, killed.


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_killed_training_ends_like_an_unbroken_one(backend, small_cifar, tmp_path):
    require_backend(backend)
    options = {"small": {"images": 100, "epochs": 2, "batch": 50, "seeds": 2}, "last": "train-arms"}
    whole, _ = unbroken(NOTEBOOK, tmp_path / "unbroken", small_cifar, backend, **options)
    killed = Training(NOTEBOOK, tmp_path / "killed", small_cifar, backend, **options).finish(KILLS)
    assert killed.kills >= len(KILLS) - 1
    assert differences(killed, whole) == []
    begun = killed.epochs_begun()
    assert set(begun) == set(whole.epochs_begun())
    assert sum(begun.values()) - len(begun) <= killed.kills


# One process: the same cells, a tiny model, and exceptions in the place of kills.
# Each check is also run on cells with a hole put back, where it must fail.


def check_resumes(stage, whole):
    """Ctrl-C in every epoch, running the cell again each time, changes nothing."""
    for epoch in range(1, EPOCHS + 1):
        interrupted(stage, epoch)
        assert len(stage.backups) == min(epoch - 1, 2)
    stage.train().assert_like(whole)


def check_operations(stage, whole):
    """An interruption before any one change to the files of the stage, in any epoch, changes nothing."""
    assert check_interruptions(stage, whole, "file") >= 3 * EPOCHS


def check_half_writes(stage, whole):
    """A write that stops halfway leaves no broken file behind and changes nothing."""
    assert check_interruptions(stage, whole, "write", step=5) >= 3 * EPOCHS


def check_interruptions(stage, whole, kind, step=1):
    """Interrupt each epoch at its first event of a kind, at its second, and so on; return how often it was stopped."""
    number, before = 1, []
    for stops in range(1000):
        try:
            with TRAP.set(kind, number, stage.run):
                stage.train().assert_like(whole)
            return stops
        except Stopped:
            assert broken_files(stage.run) == []
            number, before = number + step if stage.backups == before else 1, stage.backups


def check_two_backups(stage, whole):
    """No more than two backups lie there, however long the training."""
    interrupted(stage, 4, epochs=4)
    assert [path.name for path in stage.backups] == ["epoch-0002.keras", "epoch-0003.keras"]


def check_leftovers(stage, whole):
    """What killed writes left behind is gone when the stage is finished."""
    interrupted(stage)
    for number in range(3):
        (stage.folder / f"part-{number}.keras").write_bytes(b"half a file")
    stage.train().assert_like(whole)
    assert stage.files() == ["epoch-0003.keras"]


def check_finished_is_loaded(stage, whole):
    """A finished stage is loaded, and says what it said."""
    before = stage.train().outcome()
    with no_training():
        stage.train()
    assert stage.outcome() == before == whole.outcome()
    assert stage.said.count("\n") == 1 + EPOCHS and stage.said.startswith("A stage\nepoch 1: loss ")


def check_nothing_is_written(stage, whole):
    """A finished stage is loaded without any change of a file, so that it may lie in a read-only folder."""
    stage.train()
    with TRAP.set("file", 10**6, stage.run), no_training():  # counts, and never comes
        stage.train()
    assert TRAP.seen["file"] == 0
    stage.assert_like(whole)


def check_finished_is_small(stage, whole):
    """A finished stage keeps the network without the optimizer, whenever it was interrupted."""
    interrupted(stage)
    assert any("optimizer" in name for name in contents(stage.backups[-1]))
    stage.train()
    assert not any("optimizer" in name for name in contents(stage.result["file"]))


def check_stages_do_not_mix(stage, whole):
    """A second stage of the same model does not take over what the first left behind, finished or not."""
    other = interrupted(Stage(stage.cells, stage.run, "other"), options={"seed": 1})
    stage.train().assert_like(whole)
    fresh = Stage(stage.cells, stage.run.with_name("alone"), "other").train(options={"seed": 1})
    assert other.train(options={"seed": 1}).outcome() == fresh.outcome() != stage.outcome()


def check_models_are_compiled_once(stage, whole):
    """Models of the same make are compiled once, and end like ones that were compiled alone, interrupted or not."""
    names, known = stage.cells, lambda: [id(model) for model in stage.cells["COMPILED"].values()]

    def train(name, title, seed, lines):
        own = Stage(names, stage.run, name)
        if seed == 2:
            interrupted(own, 2, options={"seed": seed})
            assert known() == []  # what was interrupted is not used again
        return own.train(options={"seed": seed}).result | {"known": known()}

    names["COMPILED"].clear()
    arms = names["run_arms"]("arms", {"arm": {}}, 3, train=train)["arm"]
    assert arms[0]["known"] == arms[1]["known"] and len(arms[2]["known"]) == 1
    for seed, shared in enumerate(arms):
        names["COMPILED"].clear()
        alone = Stage(names, stage.run.with_name("alone"), f"seed-{seed}").train(options={"seed": seed})
        assert contents(shared["file"]) == contents(alone.result["file"])


def check_other_makes_are_compiled_anew(stage, whole):
    """Another rate, loss, layer or class of a layer is another make; only the newest four are kept."""
    import keras

    names, run = stage.cells, stage.run
    names["COMPILED"].clear()
    plain = names["RandomShift"]
    other_class = {**names, "RandomShift": type("RandomShift", (plain,), {"__module__": plain.__module__})}
    changes = [{}, {"cells": other_class}, {"rate": 0.01}, {"smoothing": 0.1}]
    changes += [{"optimizer": keras.optimizers.SGD}, {"network": partial(tiny_network, names, drop=0.2)}]
    for number, change in enumerate(changes):
        build = partial(tiny_model, **({"cells": names} | change))
        Stage(names, run, str(number)).train(build=build, epochs=1)
        assert len(names["COMPILED"]) == min(number + 1, 4)
    Stage(names, run, "again").train(build=build, epochs=1, options={"seed": 1})
    assert len(names["COMPILED"]) == 4  # another seed is the same make


def check_compiling_leaves_no_trace(stage, whole):
    """A training that compiles its model first ends like one in a model that was compiled before."""
    stage.cells["COMPILED"].clear()
    stage.train().assert_like(whole)
    Stage(stage.cells, stage.run.with_name("again")).train().assert_like(whole)


def check_two_runs(stage, whole):
    """Of two runs in one folder the later one notices; nothing is lost, and a rerun ends like an unbroken one."""
    other = Stage(stage.cells, stage.run)
    for first in (partial(interrupted, other), other.train):  # in its last epoch, and finished
        with (
            at_batch(1, 0, first),
            pytest.raises(RuntimeError, match=r"Another run is at work in .*stage\. Stop"),
        ):
            stage.train()
        assert broken_files(stage.run) == [] and stage.backups[-1].name >= "epoch-0002.keras"
        stage.train().assert_like(whole)
        shutil.rmtree(stage.run)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]
CHECKS = [check for check in CHECKS if check not in (check_interruptions, check_format)]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_in_one_process(check, stage, whole):
    check(stage, whole)


IN_PLACE = [('self.model, self.folder / f"part-{os.getpid()}.keras"', "self.model, path")]
SAME_ORDER = [
    ("np.random.default_rng([seed, epoch]).permutation(len(inputs))", "np.random.permutation(len(inputs))")
]
TWO_STEPS = [
    ("model.save(part)\n", "model.save(part)\n            os.replace(part, path)\n            part = path\n")
]
LAST_EPOCH = 'if epoch + 1 == self.params["epochs"]:'
HOLES = {
    "files are written in place": (IN_PLACE, "", check_half_writes),
    "an unfinished file has its final name": (IN_PLACE, "", check_operations),
    "weights and epoch are written in two steps": (TWO_STEPS, "", check_operations),
    "noise does not know the epoch": (
        [("variable.assign([seeds.integers(2**31), epoch])", "pass")],
        "",
        check_resumes,
    ),
    "order does not follow from seed and epoch": (SAME_ORDER, "", check_resumes),
    "order starts anew": ([("batches_from(done, x", "batches_from(0, x")], "", check_resumes),
    "the curve starts empty": (
        [("done, steps, new = len(state", "done, steps, new = 0 * len(state")],
        "",
        check_resumes,
    ),
    "the optimizer is not restored": ([(LAST_EPOCH, "if True:")], "", check_resumes),
    "the optimizer is kept for good": ([(LAST_EPOCH, "if False:")], "", check_finished_is_small),
    "the backup before is not kept": ([("for path in old[:-1]:", "for path in old:")], "", check_resumes),
    "all backups are kept": ([("for path in old[:-1]:", "for path in []:")], "", check_two_backups),
    "nothing is backed up": ([], "ExactBackup.on_epoch_end = lambda *args: None", check_resumes),
    "initial values do not follow from the seed": (
        [("keras.utils.set_random_seed(chance)", "pass")],
        "",
        check_resumes,
    ),
    "leftovers stay": ([("other.unlink(missing_ok=True)", "pass")], "", check_leftovers),
    "a finished stage is not recognised": ([("if done < epochs:", "if True:")], "", check_finished_is_loaded),
    "a finished stage says something else": (
        [("    show_curve(title,", '    print("loaded" if done else "trained")\n    show_curve(title,')],
        "",
        check_finished_is_loaded,
    ),
    "a finished stage is written again": (
        [("    for other in set", "    os.replace(path, path)\n    for other in set")],
        "",
        check_nothing_is_written,
    ),
    "two stages share a folder": (
        [("folder, chance = RUN / name", 'folder, chance = RUN / "stage"')],
        "",
        check_stages_do_not_mix,
    ),
    "a compiled model keeps its weights": (
        [("                variable.assign(value)", "                pass")],
        "",
        check_models_are_compiled_once,
    ),
    "an interrupted model is used again": (
        [("COMPILED.pop(make, fresh)", "COMPILED.setdefault(make, fresh)")],
        "",
        check_models_are_compiled_once,
    ),
    "the make of a model is not looked at": (
        [("make = json.dumps(kept),", "make = len(kept) > 0,")],
        "",
        check_other_makes_are_compiled_anew,
    ),
    "classes are not looked at": (
        [("*map(type, [*every_layer(fresh), fresh.optimizer])", "*[]")],
        "",
        check_other_makes_are_compiled_anew,
    ),
    "all compiled models are kept": (
        [("in [*COMPILED][:-4]", "in []")],
        "",
        check_other_makes_are_compiled_anew,
    ),
    "another run is not noticed": ([("if old and old[-1] >= path:", "if False:")], "", check_two_runs),
}


@pytest.mark.parametrize("hole", HOLES)
def test_hole_put_back_is_found(hole, cells, whole, tmp_path):
    hole_is_found(HOLES[hole], cells, whole, tmp_path / "runs")


# Number formats.


@pytest.mark.parametrize("built", [False, True], ids=["not built", "built before"])
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_number_format_resumes(policy, built, cells, tmp_path):
    """Also float16, where Keras wraps the optimizer and the scale of the loss is part of the backup."""
    check_format(cells, tmp_path, policy, built)


def test_number_formats_resume_on_jax(small_cifar, tmp_path):
    require_backend("jax")
    command = [sys.executable, stage_under_test.__file__, str(small_cifar), str(tmp_path)]
    paths = os.pathsep.join([str(NOTEBOOK.parent / "tools"), str(NOTEBOOK.parent / "tests")])
    env = environment("jax", PYTHONPATH=paths)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("like an unbroken one: jax") == 4


def test_a_loss_scale_that_is_not_restored_is_found(cells, tmp_path):
    """The hole of float16: the scale of the loss and the counter of steps begin anew."""
    names = dict(cells)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore")
        edits = [(LAST_EPOCH, "if True:")]
        run_cells(read(NOTEBOOK), {}, FIRST, LAST, small=None, edits=edits, namespace=names)
        with pytest.raises(AssertionError):
            check_format(names, tmp_path / "silent", "mixed_float16", True)


def test_a_warning_of_keras_while_restoring_is_an_error(stage, cells, tmp_path, monkeypatch):
    """A backup whose optimizer does not fit stops the training, instead of being left out with a warning."""
    interrupted(stage)
    monkeypatch.setitem(cells, "differences", lambda then, now: [])
    with warnings.catch_warnings():
        run_setup(PRESET="smoke", RUN_DIR=str(tmp_path))
        with no_training(), pytest.raises((UserWarning, ValueError), match="Skipping variable loading"):
            stage.train(build=partial(tiny_model, cells, optimizer=keras_sgd))


def keras_sgd(rate):
    """An optimizer with other variables than the tiny model's own."""
    import keras

    return keras.optimizers.SGD(rate)


def test_read_only_folder(cells, whole, tmp_path):
    """A finished stage is loaded from a file system that cannot be written to."""
    with small_disk(tmp_path / "disk", 2**24) as disk:
        parameters = {"PRESET": "smoke", "RUN_DIR": str(disk)}
        stage = Stage(cells, run_setup(**parameters)["RUN"]).train()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(OSError):
            (disk / "file").write_text("")
        assert run_setup(**parameters)["RUN"] == stage.run
        with no_training():
            stage.train().assert_like(whole)


def test_order_follows_from_seed_and_epoch(cells):
    batches = cells["batches_from"]
    x, y = np.arange(8), np.arange(8)
    from_first = [next(generator)[0].tolist() for generator in [batches(0, x, y, 4, 7)] for _ in range(6)]
    from_third = [next(generator)[0].tolist() for generator in [batches(2, x, y, 4, 7)] for _ in range(2)]
    assert from_first[4:] == from_third and from_first[:2] != from_first[2:4]
    assert sorted(from_first[0] + from_first[1]) == x.tolist() and BATCH * 2 == len(cells["x_train"])
