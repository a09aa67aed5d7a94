"""Files that are not CIFAR-10 give one error that names the file and what to do, and never run code of their own."""

import contextlib
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from conftest import FILES, ROOT, ROWS, write_batch
from notebooks import cell_namespace, notebook_paths

OFFLINE = """
import sys

sys.path.insert(0, "tools")
from notebooks import cell_namespace, notebook_paths

cell_namespace(notebook_paths()[0], "imports", "read-data")["load_cifar10"](None)
"""


@pytest.fixture(scope="module")
def load_cifar10():
    """The loader of the first notebook; the others share its cells."""
    return cell_namespace(notebook_paths()[0], "imports", "read-data")["load_cifar10"]


@pytest.fixture
def folder(small_cifar, tmp_path):
    """a/b/cifar-10-batches-py whose files are links to the good ones: replace one to make it bad."""
    folder = tmp_path / "a" / "b" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
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
    """Loading must fail with an error that names the file and the remedy."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_cifar10(str(folder.parent))
    message = str(caught.value)
    assert name in message and str(folder.parent) in message
    assert re.search("Name a folder that|again from https://www.cs.toronto.edu", message)
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
    (x_train, _), _ = load_cifar10(str(folder.parent))
    assert np.argwhere(x_train[0]).tolist() == [[5, 7, 0], [6, 8, 1]]


def test_files_pickled_by_python_3_load(load_cifar10, folder):
    replace(folder, "test_batch", pickle.dumps(batch(), protocol=2))
    _, (x_test, _) = load_cifar10(str(folder.parent))
    assert not x_test.any()


@pytest.mark.parametrize("up", [0, 2, 3], ids=["cifar-10-batches-py", "one too high", "two too high"])
def test_another_level_of_the_folder_will_do(load_cifar10, folder, up):
    """DATA_DIR may be the folder of the files, or up to two folders above the one that holds it."""
    place = [folder, *folder.parents][up]
    marked = batch(label=7)
    replace(folder, "test_batch", marked)
    (x_train, _), (_, y_test) = load_cifar10(str(place))
    assert len(x_train) == 50_000 and set(y_test) == {7}


def test_a_link_to_the_folder_will_do(load_cifar10, folder, tmp_path):
    """Data that many share are often linked into a folder of one's own."""
    (tmp_path / "mine").mkdir()
    try:
        (tmp_path / "mine" / folder.name).symlink_to(folder, target_is_directory=True)
    except OSError:
        pytest.skip("links are not allowed here")
    (x_train, _), _ = load_cifar10(str(tmp_path / "mine"))
    assert len(x_train) == 50_000


@pytest.mark.parametrize("up", [0, 1, 2])
def test_a_packed_archive_is_to_be_unpacked(load_cifar10, tmp_path, up):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz"):
        pass
    place = str([folder, *folder.parents][up])
    with pytest.raises(FileNotFoundError, match="unpack cifar-10-python.tar.gz with tar -xf") as caught:
        load_cifar10(place)
    assert f"DATA_DIR {place}" in str(caught.value)


def test_missing_folder(load_cifar10, tmp_path):
    assert_one_clear_error(load_cifar10, tmp_path / "nowhere" / "cifar-10-batches-py", "nowhere")


def test_offline_without_files(tmp_path):
    """One error that says what to set, in a process that reaches nobody and has no earlier download."""
    nobody = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    env = {**os.environ, **nobody, "no_proxy": "", "NO_PROXY": "", "KERAS_HOME": str(tmp_path)}
    command = [sys.executable, "-c", OFFLINE]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert re.fullmatch(r"OSError: CIFAR-10 could not be downloaded \(.+\)\. Set DATA_DIR\.", last)
    assert done.stderr.count("Traceback") == 1, "one error, not a chain of them"


@pytest.mark.parametrize("name", FILES)
def test_incomplete_folder(load_cifar10, folder, name):
    (folder / name).unlink()
    assert_one_clear_error(load_cifar10, folder, name)


@pytest.mark.parametrize("keep", [0, 1, 1000, 10_000_000, -1])
def test_truncated_file(load_cifar10, folder, keep):
    replace(folder, "data_batch_1", (folder / "data_batch_1").read_bytes()[:keep])
    assert_one_clear_error(load_cifar10, folder, "data_batch_1")


FLIPS = {
    "protocol": (b"\x80\x02", 1, 6),
    "name of the labels": (b"labels", 0, 0),
    "name of the images": (b"\x04\x00\x00\x00data", 7, 4),
    "a label": (b"K\x00", 1, 4),
    "number format": (b"u1", 0, 0),
    "number of columns": (b"M\x00\x0c", 2, 0),
    "a name that is called": (b"_reconstruct", 0, 1),
    "end": (b"", -1, 0),
}


@pytest.mark.parametrize("where", FLIPS)
def test_flipped_bit(load_cifar10, folder, where):
    """A bit outside the pixels; files hold no sum that would tell a pixel from a wrong one."""
    text, offset, bit = FLIPS[where]
    data = bytearray((folder / "data_batch_1").read_bytes())
    data[data.index(text) + offset if text else offset] ^= 1 << bit
    replace(folder, "data_batch_1", bytes(data))
    assert_one_clear_error(load_cifar10, folder, "data_batch_1")


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
    "columns before rows": {**batch(), b"data": np.zeros((3072, 10_000), np.uint8)},
}


@pytest.mark.parametrize("content", BAD_BATCHES.values(), ids=BAD_BATCHES.keys())
def test_wrong_content(load_cifar10, folder, content):
    replace(folder, "data_batch_1", content)
    assert_one_clear_error(load_cifar10, folder, "data_batch_1")


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


def test_no_module_is_imported_for_a_pickle(load_cifar10, folder, monkeypatch):
    """Importing runs code, too: only what NumPy's arrays need is looked up, not everything below numpy."""
    monkeypatch.delitem(sys.modules, "numpy.f2py.symbolic", raising=False)
    replace(folder, "data_batch_1", b"cnumpy.f2py.symbolic\ndtype\n.")
    assert_one_clear_error(load_cifar10, folder, "data_batch_1")
    assert "numpy.f2py.symbolic" not in sys.modules


def test_an_array_of_objects_is_refused(load_cifar10, folder):
    replace(folder, "data_batch_5", {**batch(), b"data": np.array([[None] * 3072] * 2, dtype=object)})
    assert_one_clear_error(load_cifar10, folder, "data_batch_5")
