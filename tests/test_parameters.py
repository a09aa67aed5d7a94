"""Parameters of a wrong type or value are refused before anything is created or deleted; ~ is the home folder."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from nbformat.v4 import new_notebook
from notebooks import cell_by_id, cell_namespace, notebook_paths, read, write

FIRST, SECOND = notebook_paths()[:2]  # the second has WEIGHTS as well
CELLS = ["imports", "say", "parameters", "presets", "setup"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Work in an empty folder, and restore the number format that the cells set."""
    import keras

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "here"
    keras.config.set_dtype_policy("float32")


def set_up(path=SECOND, edits=(), **values):
    """Run a notebook's cells up to `setup` with other parameters; return their names."""
    names = cell_namespace(path, *CELLS[:-1])
    names.update({"PRESET": "smoke", **values})
    source = cell_by_id(read(path), CELLS[-1]).source
    for old, new in edits:
        if old not in source:
            raise LookupError(f"the cell has no {old}")
        source = source.replace(old, new)
    exec(compile(source, "<setup>", "exec"), names)
    return names


def finished_run(root, seed=0, notebook=SECOND):
    """Make a file that stands for a finished run in the RUN_DIR `root`; return it."""
    file = Path(root) / notebook.stem / f"smoke-seed{seed}" / "stage" / "epoch-0009.keras"
    file.parent.mkdir(parents=True)
    file.write_text("hours of training")
    return file


def assert_refused(wanted, name, value, **others):
    """`setup` must raise one ValueError that names parameter, value and what is wanted, and touch nothing."""
    file = finished_run("runs")
    before = sorted(Path().rglob("*"))
    values = {"RETRAIN": True, **others, name: value}
    with pytest.raises(ValueError) as caught:
        set_up(**values)
    message = str(caught.value)
    assert message.startswith(f"{name} is {value!r}; it must be ") and wanted in message
    assert "Change the parameters cell" in message
    assert file.read_text() == "hours of training" and sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("value", ["false", "False", "true", "True", "", 0, 1, None, np.True_], ids=repr)
def test_a_word_for_retrain_deletes_nothing(value):
    assert_refused("True or False, without quotes", "RETRAIN", value)


@pytest.mark.parametrize("run_dir", ["runs", "~/kept"])
def test_retrain_deletes_its_own_run_and_no_other(run_dir, own_folder, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(own_folder))
    folder = own_folder / run_dir.removeprefix("~/")
    file, other, further = finished_run(folder), finished_run(folder, 1), finished_run(folder, 0, FIRST)
    assert set_up(RUN_DIR=run_dir)["RUN"].resolve() == file.parents[1].resolve()
    assert file.exists()
    set_up(RUN_DIR=run_dir, RETRAIN=True)
    assert not file.exists() and file.parents[1].is_dir()
    assert other.exists() and further.exists()


@pytest.mark.parametrize(
    ("value", "wanted"), [("cpu", "'cpu' is called 'quick' now"), ("gpu", "'gpu' 'full'")]
)
def test_old_presets_have_new_names(value, wanted):
    assert_refused(wanted, "PRESET", value)


@pytest.mark.parametrize("value", ["Smoke", "", None, True, 0, ["smoke"], {}], ids=repr)
def test_preset(value):
    assert_refused("one of ['auto', 'smoke', 'quick', 'full']", "PRESET", value)


@pytest.mark.parametrize("value", [-1, 1.5, 1.0, True, False, "0", None, 2**32, [0]], ids=repr)
def test_seed(value):
    assert_refused("a whole number from 0 to 4294967295", "SEED", value)


@pytest.mark.parametrize("value", [0, 7, 2**32 - 1])
def test_a_good_seed_names_the_run(value):
    assert set_up(SEED=value)["RUN"] == Path("runs", SECOND.stem, f"smoke-seed{value}")


@pytest.mark.parametrize("value", ["", "  ", "a file", None, 0, True, Path("runs"), ["runs"]], ids=repr)
def test_run_dir(value):
    Path("a file").write_text("a text")
    assert_refused("the path of a folder", "RUN_DIR", value)


@pytest.mark.parametrize("value", ["missing", "~/missing", "", " ", "a file", False, 0, ["runs"]], ids=repr)
def test_data_dir(value):
    Path("a file").write_text("a text")
    assert_refused("None or an existing folder", "DATA_DIR", value)


@pytest.mark.parametrize(
    "value",
    ["missing.h5", "~/missing.h5", "", " ", "None", "ImageNet", "a folder", False, 0, ["imagenet"]],
    ids=repr,
)
def test_weights(value):
    Path("a folder").mkdir()
    assert_refused("'imagenet', None or a file", "WEIGHTS", value)


def test_what_is_right_is_taken():
    """None, "imagenet", files and folders that exist; the first notebook has no WEIGHTS."""
    Path("w.h5").touch()
    for weights in (None, "imagenet", "w.h5"):
        assert set_up(WEIGHTS=weights, DATA_DIR=".")["WEIGHTS"] == weights
    assert "WEIGHTS" not in set_up(FIRST)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home folder; afterwards no folder may be named ~."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home))
    yield home
    assert [path for path in tmp_path.rglob("*") if "~" in path.name] == []


def test_home_in_run_dir(home, own_folder):
    run = set_up(RUN_DIR="~/my runs")["RUN"]
    assert run == home / "my runs" / SECOND.stem / "smoke-seed0" and run.is_dir()
    assert list(own_folder.iterdir()) == []


def test_a_file_in_the_home_is_no_run_dir(home):
    (home / "notes").write_text("a text")
    assert_refused("the path of a folder", "RUN_DIR", "~/notes")


def test_home_in_data_dir(home, small_cifar, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(small_cifar.parent))
    place = f"~/{small_cifar.name}"
    assert set_up(DATA_DIR=place)["DATA_DIR"] == place
    (x_train, _), _ = cell_namespace(SECOND, "imports", "read-data")["load_cifar10"](place)
    assert len(x_train) == 50_000


def test_home_in_weights(home):
    names = set_up(WEIGHTS=None)
    for cell_id in ("backbone-choice", "backbone"):
        exec(cell_by_id(read(SECOND), cell_id).source, names)
    saved = names["backbone"](32, None)
    saved.save_weights(home / "mine.weights.h5")
    assert set_up(WEIGHTS="~/mine.weights.h5")["WEIGHTS"] == "~/mine.weights.h5"
    loaded = names["backbone"](32, "~/mine.weights.h5")
    assert all(np.array_equal(one, other) for one, other in zip(saved.get_weights(), loaded.get_weights()))


FAULTS = {
    "any true value deletes": ("type(RETRAIN) is bool", "True", "RETRAIN", "false"),
    "True is a number": ("type(SEED) is int", "isinstance(SEED, int)", "SEED", True),
    "the folder may be a file": (
        " and not exists(RUN_DIR, os.path.isfile)",
        "",
        "RUN_DIR",
        "a file",
    ),
    "an empty RUN_DIR": (" and RUN_DIR.strip()", "", "RUN_DIR", ""),
    "data are not looked for": ("(DATA_DIR is None", "(True or DATA_DIR is None", "DATA_DIR", "missing"),
    "weights are not looked for": ("(start in", "(True or start in", "WEIGHTS", "missing.h5"),
    "deleted before the check": ("for name, (fits", "shutil.rmtree(RUN_DIR)\nfor name, (fits", "SEED", -1),
    "created before the check": ("for name, (fits", "Path('new').mkdir()\nfor name, (fits", "SEED", -1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_put_back_is_found(fault, monkeypatch):
    """With the fault, what the tests above check does not hold."""
    old, new, name, value = FAULTS[fault]
    Path("a file").write_text("a text")
    monkeypatch.setitem(
        globals(), "set_up", lambda plain=set_up, **values: plain(edits=[(old, new)], **values)
    )
    with pytest.raises((pytest.fail.Exception, AssertionError, OSError)):
        assert_refused("", name, value)


@pytest.mark.parametrize(
    ("word", "handed_over", "deleted"),
    [("false", "'false'", False), ("False", "False", False), ("True", "True", True)],
)
def test_through_papermill(word, handed_over, deleted, tmp_path):
    """Papermill hands over True and False as such, and any other word as text, which is refused."""
    cells = [cell_by_id(read(FIRST), cell_id) for cell_id in CELLS]
    for cell in cells:
        cell.outputs, cell.execution_count = [], None
    write(new_notebook(cells=cells, metadata=read(FIRST).metadata), tmp_path / "in.ipynb")
    file = finished_run(tmp_path / "runs", notebook=FIRST)
    command = [sys.executable, "-m", "papermill", str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb")]
    command += ["--kernel", "python3", "--no-progress-bar", "-p", "PRESET", "smoke"]
    command += ["-p", "RUN_DIR", str(tmp_path / "runs"), "-p", "RETRAIN", word]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    injected = read(tmp_path / "out.ipynb").cells
    assert any(f"RETRAIN = {handed_over}" in cell.source.replace('"', "'") for cell in injected)
    assert file.exists() != deleted
    if handed_over in ("True", "False"):
        assert done.returncode == 0, done.stderr
    else:
        assert (
            done.returncode and "RETRAIN is 'false'; it must be True or False, without quotes" in done.stderr
        )
