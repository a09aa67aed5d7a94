"""Files that are not CIFAR-10 give one error that names the file and what to do, and never run code of their own."""

import contextlib
import os
import pickle
import re
import shutil

import numpy as np
import pytest
from conftest import FILES, ROWS, write_batch
from notebooks import cell_namespace, notebook_paths

CELLS = ["imports", "unpickler", "read-batch", "download", "batches-folder", "load-data"]


@pytest.fixture(scope="module")
def load_cifar10():
    """The loader of the first notebook; the others share its cells."""
    return cell_namespace(notebook_paths()[0], *CELLS)["load_cifar10"]


@pytest.fixture
def folder(small_cifar, tmp_path):
    """cifar-10-batches-py whose files are links to the good ones: replace one to make it bad."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for source in (small_cifar / "cifar-10-batches-py").iterdir():
        try:
            os.link(source, folder / source.name)
        except OSError:
            shutil.copy(source, folder / source.name)
    return folder


def replace(folder, name, content):
    """Put other bytes (or, from a dict, another batch) in the place of a file, without touching what it linked to."""
    (folder / name).unlink()
    if isinstance(content, dict):
        write_batch(folder / name, content)
    else:
        (folder / name).write_bytes(content)


def batch(rows=ROWS, columns=3072, dtype=np.uint8, label=0):
    """A batch of black images."""
    return {b"data": np.zeros((rows, columns), dtype), b"labels": [label] * rows, b"batch_label": b"made"}


def assert_one_clear_error(load_cifar10, folder, name):
    """Loading must fail with an error that names the file (or folder) and the remedy."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_cifar10(folder.parent)
    message = str(caught.value)
    assert name in message
    assert re.search("DATA_DIR|download|fetch", message, re.IGNORECASE)
    chained = caught.value.__cause__ or (caught.value.__context__ and not caught.value.__suppress_context__)
    assert not chained, "one error, not a chain of them"


def test_good_data_load(load_cifar10, small_cifar):
    (x_train, y_train), (x_test, y_test) = load_cifar10(small_cifar)
    assert (x_train.shape, x_train.dtype) == ((50_000, 32, 32, 3), np.uint8)
    assert (x_test.shape, x_test.dtype) == ((10_000, 32, 32, 3), np.uint8)
    assert (y_train.size, y_test.size) == (50_000, 10_000)
    assert set(np.unique(y_train)) == set(range(10))


def test_images_are_put_upright(load_cifar10, folder):
    """The files hold a red, a green and a blue plane, row by row."""
    changed = batch()
    changed[b"data"][0, 5 * 32 + 7] = 200
    changed[b"data"][0, 1024 + 6 * 32 + 8] = 100
    replace(folder, "data_batch_1", changed)
    (x_train, _), _ = load_cifar10(folder.parent)
    assert np.argwhere(x_train[0]).tolist() == [[5, 7, 0], [6, 8, 1]]


def test_files_pickled_by_python_3_load(load_cifar10, folder):
    replace(folder, "test_batch", pickle.dumps(batch(), protocol=2))
    _, (x_test, _) = load_cifar10(folder.parent)
    assert not x_test.any()


def test_a_folder_given_as_text_loads(load_cifar10, small_cifar):
    assert load_cifar10(str(small_cifar))


def test_missing_folder(load_cifar10, tmp_path):
    assert_one_clear_error(load_cifar10, tmp_path / "nowhere" / "cifar-10-batches-py", "nowhere")


@pytest.mark.parametrize("name", FILES)
def test_incomplete_folder(load_cifar10, folder, name):
    (folder / name).unlink()
    assert_one_clear_error(load_cifar10, folder, name)


@pytest.mark.parametrize("keep", [0, 1, 1000, 10_000_000, -1])
def test_truncated_file(load_cifar10, folder, keep):
    replace(folder, "data_batch_3", (folder / "data_batch_3").read_bytes()[:keep])
    assert_one_clear_error(load_cifar10, folder, "data_batch_3")


BAD_BATCHES = {
    "fewer columns": batch(columns=3071),
    "floats": batch(dtype=np.float32),
    "fewer rows": batch(rows=9_999),
    "more rows": batch(rows=10_001),
    "label 10": batch(label=10),
    "label -1": batch(label=-1),
    "label half": batch(label=0.5),
    "label in words": batch(label="cat"),
    "fewer labels": {**batch(), b"labels": [0] * 9_999},
    "nested labels": {**batch(), b"labels": [[0]] * 10_000},
    "ragged labels": {**batch(), b"labels": [0] * 9_999 + [[0, 1]]},
    "no labels": {b"data": batch()[b"data"]},
    "labels of CIFAR-100": {b"data": batch()[b"data"], b"fine_labels": [0] * 10_000},
    "no data": {b"labels": [0] * 10_000},
    "data in a list": {**batch(), b"data": [0] * 3072},
    "images": {**batch(), b"data": np.zeros((10_000, 32, 32, 3), np.uint8)},
}


@pytest.mark.parametrize("content", BAD_BATCHES.values(), ids=BAD_BATCHES.keys())
def test_wrong_content(load_cifar10, folder, content):
    replace(folder, "data_batch_2", content)
    assert_one_clear_error(load_cifar10, folder, "data_batch_2")


NOT_BATCHES = {
    "empty": b"",
    "html": b"<html></html>",
    "gzip": b"\x1f\x8b\x08" + bytes(100),
    "list": pickle.dumps([1]),
}


@pytest.mark.parametrize("content", NOT_BATCHES.values(), ids=NOT_BATCHES.keys())
def test_not_a_batch_at_all(load_cifar10, folder, content):
    replace(folder, "test_batch", content)
    assert_one_clear_error(load_cifar10, folder, "test_batch")


def calls(function, *arguments, protocol=2):
    """A pickle that calls a function when it is loaded."""

    class Call:
        def __reduce__(self):
            return function, arguments

    return pickle.dumps({b"data": Call(), b"labels": [0]}, protocol=protocol)


MALICIOUS = {
    "system": lambda marker: calls(os.system, f"touch '{marker}'"),
    "newer protocol": lambda marker: calls(os.system, f"touch '{marker}'", protocol=4),
    "eval": lambda marker: calls(eval, f"open({marker!r}, 'w')"),
    "open": lambda marker: calls(open, marker, "w"),
    "numpy": lambda marker: calls(np.savetxt, marker, [0]),
    "getattr": lambda marker: (
        b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'system'\ntR"
        + f"(S'touch {marker}'\ntR.".encode()
    ),
    "instance": lambda marker: f"(S'touch {marker}'\nios\nsystem\n.".encode(),
}


@pytest.mark.parametrize("how", MALICIOUS)
def test_a_malicious_pickle_does_not_run(load_cifar10, folder, tmp_path, how):
    marker = tmp_path / "executed"
    replace(folder, "data_batch_4", MALICIOUS[how](str(marker)))
    assert_one_clear_error(load_cifar10, folder, "data_batch_4")
    assert not marker.exists()


@pytest.mark.parametrize("how", MALICIOUS)
def test_the_malicious_pickles_are_malicious(tmp_path, how):
    marker = tmp_path / "executed"
    with contextlib.suppress(Exception):
        pickle.loads(MALICIOUS[how](str(marker)))
    assert marker.exists()


def test_an_array_of_objects_is_refused(load_cifar10, folder):
    replace(folder, "data_batch_5", {**batch(), b"data": np.array([[None] * 3072] * 2, dtype=object)})
    assert_one_clear_error(load_cifar10, folder, "data_batch_5")
