"""tools/: shared cells are carried, runs are recorded, origins are checked, outputs are fit to be published."""

import base64
import hashlib
import importlib.util
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import notebooks
import numpy as np
import origins
import pytest
import record
import refresh
import small_portfolio
import sync_cells
from nbformat.v4 import new_output
from notebooks import PENDING, cell_by_id, code_cells, code_digest, read
from PIL import Image
from small_portfolio import LEAVE, NAME, OTHER, RESULT


@pytest.fixture
def portfolio(tmp_path, monkeypatch):
    """Folder with the tiny portfolio, nothing recorded; runs are only pretended."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setattr(record, "run", small_portfolio.pretend_run)
    small_portfolio.make(tmp_path)
    return tmp_path


def second_notebook(root, **changes):
    """Copy the tiny notebook as number 2, with other sources for the cells named in `changes`."""
    notebook = read(root / f"{NAME}.ipynb")
    for cell_id, source in changes.items():
        cell_by_id(notebook, cell_id).source = source
    notebooks.write(notebook, root / f"{OTHER}.ipynb")
    return root / f"{OTHER}.ipynb"


def edit(path, cell_id, change):
    """Apply `change` to one cell of the notebook at `path`."""
    notebook = read(path)
    change(cell_by_id(notebook, cell_id))
    notebooks.write(notebook, path)


def test_sync_carries_shared_cells_and_no_others(portfolio, capsys):
    path = second_notebook(portfolio, train="print('old')", curves="print('the lesson')")
    before = path.read_text()
    assert sync_cells.main(["--check"], portfolio) == 1
    assert f"{OTHER}.ipynb: train differs from {NAME}.ipynb" in capsys.readouterr().out
    assert path.read_text() == before
    assert sync_cells.main([], portfolio) == 0
    assert cell_by_id(read(path), "train").source == small_portfolio.TRAIN
    assert cell_by_id(read(path), "curves").source == "print('the lesson')"
    assert sync_cells.main(["--check"], portfolio) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda cell: cell.metadata.update(tags=[]),
        lambda cell: cell.metadata.pop("cellView"),
        lambda cell: cell.metadata.update(jupyter={"source_hidden": False}),
    ],
    ids=["tag", "Colab", "JupyterLab"],
)
def test_sync_carries_tags_and_folding(portfolio, change):
    path = second_notebook(portfolio)
    edit(path, "train", change)
    assert sync_cells.main(["--check"], portfolio) == 1
    sync_cells.main([], portfolio)
    assert (
        cell_by_id(read(path), "train").metadata
        == cell_by_id(read(portfolio / f"{NAME}.ipynb"), "train").metadata
    )


def test_sync_unfolds_a_copy_whose_original_is_open(portfolio):
    path = second_notebook(portfolio)
    edit(portfolio / f"{NAME}.ipynb", "train", lambda cell: cell.metadata.pop("cellView"))
    sync_cells.main([], portfolio)
    assert "cellView" not in cell_by_id(read(path), "train").metadata


def test_writing_an_unchanged_notebook_changes_nothing(portfolio):
    path = portfolio / f"{NAME}.ipynb"
    before = path.read_bytes()
    notebooks.write(read(path), path)
    assert path.read_bytes() == before


def test_without_records_everything_is_pending(portfolio):
    assert refresh.main(["--check"], portfolio) == 1
    assert refresh.main([], portfolio) == 0
    readme = (portfolio / "README.md").read_text()
    assert readme.count("recorded run pending") == 1
    assert readme.count("in preparation") == 4
    assert f"{OTHER}.ipynb" not in readme
    notebook = read(portfolio / f"{NAME}.ipynb")
    assert PENDING in notebook.cells[0].source and PENDING in cell_by_id(notebook, "takeaways").source
    assert refresh.main(["--check"], portfolio) == 0


def test_recording_publishes_record_outputs_figures_model_and_tables(tmp_path, monkeypatch):
    """In a kernel, from the command to README."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setattr(record.os, "cpu_count", lambda: 7)
    path = small_portfolio.make(tmp_path)
    assert record.main([f"{NAME}.ipynb"], tmp_path) == 0
    notebook = read(path)
    published = json.loads((tmp_path / "results" / f"{NAME}.json").read_text())
    assert published | RESULT == published
    assert published["code_sha256"] == code_digest(notebook)
    assert set(published["versions"]) == {"python", "keras", "tensorflow", "numpy"}
    assert published["weights"] == "none, trained from scratch"
    assert [cell.execution_count for cell in code_cells(notebook)] == [1, 2, 3, 4]
    assert [cell.source for cell in code_cells(notebook)][0] == small_portfolio.PARAMETERS
    assert "papermill" not in json.dumps(notebook)
    train = cell_by_id(notebook, "train")
    assert [output.get("text", "a display") for output in train.outputs] == [
        "a display",
        "full 0 False: 90.00%\n",
    ]
    folder = tmp_path / "results" / NAME
    assert sorted(file.name for file in folder.iterdir()) == ["curves.png", "small.tflite"]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "**90.0 %** of the test images (95 % interval 89.4 to 90.6)" in notebook.cells[0].source
    assert notebook.cells[0].source.endswith("Text that stays.")
    assert "Python" in cell_by_id(notebook, "takeaways").source
    readme = (tmp_path / "README.md").read_text()
    for text in (
        "**90.00** (89.40–90.57)",
        "2.0 M",
        "0.321",
        "12 min, 7 CPU cores, bfloat16",
        "small.tflite",
    ):
        assert text in readme
    assert refresh.main(["--check"], tmp_path) == 0


@pytest.mark.parametrize("alpha, mode", [(255, "RGB"), (254, "RGBA")])
def test_published_pictures_are_the_same_in_fewer_bytes(alpha, mode):
    pixels = np.random.default_rng(0).integers(0, 4, (90, 120, 4)).cumsum(axis=1).astype(np.uint8)
    pixels[..., 3] = alpha
    Image.fromarray(pixels).save(file := io.BytesIO(), "png", compress_level=1)
    packed = base64.b64decode(record.compressed(base64.b64encode(file.getvalue())))
    assert len(packed) < len(file.getvalue())
    assert (picture := Image.open(io.BytesIO(packed))).mode == mode
    assert np.array_equal(np.array(picture.convert("RGBA")), pixels)


def test_only_full_runs_publish_a_model_file(portfolio):
    assert record.main([NAME], portfolio) == 0
    assert (portfolio / "results" / NAME / "small.tflite").exists()
    assert record.main([NAME, "--preset", "quick"], portfolio) == 0
    assert not (portfolio / "results" / NAME / "small.tflite").exists()


@pytest.mark.skipif(os.name != "posix", reason="peak memory is not known on Windows")
def test_peak_memory_is_noted_unless_the_beginning_of_a_run_was_missed(portfolio, monkeypatch):
    monkeypatch.setattr(record, "peak_memory", lambda: 5_000_000_000)
    result = portfolio / "results" / f"{NAME}.json"
    record.main([NAME], portfolio)
    assert json.loads(result.read_text())["peak_memory_bytes"] == 5_000_000_000
    (note,) = portfolio.glob("runs/*-peak-memory.json")
    note.write_text("123456789012")
    record.main([NAME], portfolio)
    assert json.loads(result.read_text())["peak_memory_bytes"] == 123456789012
    note.unlink()
    record.main([NAME], portfolio)
    assert "peak_memory_bytes" not in json.loads(result.read_text())


def published_files(root):
    """{path: content} of notebooks, texts and everything in results/, at the folder `root`."""
    paths = [
        *root.glob("*.ipynb"),
        root / "README.md",
        *filter(lambda path: path.is_file(), root.glob("results/**/*")),
    ]
    return {path: path.read_bytes() for path in paths}


def test_a_further_seed_is_averaged_and_leaves_the_notebook_alone(portfolio):
    record.main([NAME], portfolio)
    code = [cell.outputs for cell in code_cells(read(portfolio / f"{NAME}.ipynb"))]
    assert record.main([NAME, "--seed", "2"], portfolio) == 0
    assert [cell.outputs for cell in code_cells(read(portfolio / f"{NAME}.ipynb"))] == code
    assert "**91.00** ± 1.41" in (portfolio / "README.md").read_text()
    assert "mean of 2 seeds" in read(portfolio / f"{NAME}.ipynb").cells[0].source


def test_a_run_that_is_not_to_be_published_changes_nothing(portfolio, capsys):
    record.main([NAME], portfolio)
    before = published_files(portfolio)
    assert record.main([NAME, "--seed", "2", "--no-publish"], portfolio) == 0
    assert published_files(portfolio) == before
    assert f"{NAME}: test accuracy 92.00 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change", [{"code_sha256": "0" * 64}, {"preset": "quick"}, {"weights": "others"}, {"seed": 0}]
)
def test_a_seed_of_another_run_is_left_out(portfolio, capsys, change):
    record.main([NAME], portfolio)
    other = json.loads((portfolio / "results" / f"{NAME}.json").read_text()) | {"seed": 1} | change
    (portfolio / "results" / f"{NAME}-seed1.json").write_text(json.dumps(other))
    assert refresh.main(["--check"], portfolio) == 1
    assert f"{NAME}-seed1.json is left out" in capsys.readouterr().out


def test_a_run_that_failed_publishes_nothing(portfolio, monkeypatch):
    monkeypatch.setattr(record, "run", lambda *arguments, **options: 130)
    before = published_files(portfolio)
    assert record.main([NAME], portfolio) == 130
    assert published_files(portfolio) == before


def spoil(what):
    """Return a pretended run whose outcome has a fault."""

    def spoiled(path, output, parameters, folder, **options):
        small_portfolio.pretend_run(path, output, parameters, folder)
        ran = read(output)
        if what == "edited":
            edit(path, "train", lambda cell: cell.update(source="print('later')"))
        elif what == "order":
            code_cells(ran)[-1].execution_count = 9
        elif what == "path":
            code_cells(ran)[2].outputs[-1].text = "/home/ann/data"
        elif what == "host":
            code_cells(ran)[2].outputs[-1].text = "from 192.168.7.9"
        elif what == "error":
            code_cells(ran)[2].outputs = [new_output("error", ename="E", evalue="no", traceback=[])]
        elif what == "size":
            code_cells(ran)[2].outputs[-1].text = "x" * 1_000_001
        notebooks.write(ran, output)
        result = next(folder.glob("runs/*/*/result.json"))
        changes = {"seed": {"seed": 5}, "lacks": {"final": {}}, "model": {"recommended": "absent.onnx"}}
        result.write_text(json.dumps(json.loads(result.read_text()) | changes.get(what, {})))
        return 0

    return spoiled


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("edited", "was edited while it ran"),
        ("order", "in order"),
        ("path", "train names this machine: /home/ann"),
        ("host", "train names this machine: 192.168.7.9"),
        ("error", "train ended with E: no"),
        ("size", "1,000,000 is the most"),
        ("seed", "another notebook, preset or seed"),
        ("lacks", "result.json lacks margin"),
        ("model", "absent.onnx is not in"),
    ],
)
def test_what_must_not_be_published_is_refused(portfolio, monkeypatch, what, message):
    monkeypatch.setattr(record, "run", spoil(what))
    with pytest.raises(SystemExit, match=message):
        record.main([NAME], portfolio)
    assert list((portfolio / "results").iterdir()) == []


def test_parameters_are_handed_over_with_their_types(tmp_path):
    (tmp_path / "w.h5").touch()
    file = str((tmp_path / "w.h5").resolve())
    for text, meant in (("none", None), ("imagenet", "imagenet"), (file, file)):
        args = record.arguments([NAME, "--weights", text, "--seed", "3"])
        assert record.notebook_parameters(args)["WEIGHTS"] == meant
    assert record.notebook_parameters(args)["SEED"] == 3
    assert "WEIGHTS" not in record.notebook_parameters(record.arguments([NAME]))


def test_data_are_official_only_if_their_sums_agree(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    assert origins.identify_data(None) == {
        "data": "files not found again and not checked",
        "data_official": False,
    }
    folder = tmp_path / "datasets" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in origins.OFFICIAL_MD5:
        (folder / name).write_text(f"the images of {name}")
    made = origins.identify_data(folder.parent, "Made up.")
    assert made == {
        "data": "not the official files of CIFAR-10 (MD5 differs). Made up",
        "data_official": False,
    }
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    sums = origins.data_sums(folder)
    shutil.copytree(folder, tmp_path / "far" / "a" / "b" / "c")
    assert origins.data_sums(tmp_path / "far") == sums, "found as far down as the notebooks find it"
    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "far")
    assert sums == origins.data_sums(tmp_path) == origins.data_sums(tmp_path / "cifar-10-python.tar.gz")
    monkeypatch.setattr(origins, "OFFICIAL_MD5", sums)
    assert origins.identify_data(None) == {
        "data": "CIFAR-10, the official files (MD5 compared)",
        "data_official": True,
    }


def test_weights_are_kerass_only_if_their_sum_agrees(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    densenet, mobilenet = "3_DenseNet121", "2_MobileNetV2"
    assert "not checked" in origins.identify_weights(densenet, "imagenet")["weights"]
    file = tmp_path / "models" / origins.KERAS_WEIGHTS[densenet][0]
    file.write_bytes(b"random")
    assert "*not* Keras's file (MD5" in origins.identify_weights(densenet, "imagenet")["weights"]
    monkeypatch.setitem(origins.KERAS_WEIGHTS, densenet, (file.name, hashlib.md5(b"random").hexdigest()))
    assert origins.identify_weights(densenet, "imagenet")["weights"].endswith(
        "Keras's ImageNet weights (MD5 compared)"
    )
    for size, used in ((128, 128), (64, 224)):
        file = tmp_path / "models" / origins.KERAS_WEIGHTS[mobilenet][0].format(size=used)
        file.write_bytes(b"random")
        found = origins.identify_weights(mobilenet, "imagenet", size=size)
        assert file.name in found["weights"] and "origin was not checked" in found["weights"]
        assert found["weights_sha256"] == hashlib.sha256(b"random").hexdigest()
    assert name_file(tmp_path, "mine.").endswith("…): mine") and "not checked" in name_file(tmp_path, "")
    for none in (None, "scratch"):
        assert origins.identify_weights(mobilenet, none)["weights"] == "none, trained from scratch"


def name_file(folder, note):
    """What a record says of a file of weights given by path."""
    (folder / "w.h5").write_bytes(b"x")
    return origins.identify_weights(OTHER, str(folder / "w.h5"), note)["weights"]


@pytest.mark.parametrize(
    ("notebook", "module"),
    [
        ("2_MobileNetV2", "mobilenet_v2"),
        ("3_DenseNet121", "densenet"),
        ("4_EfficientNetB0", "efficientnet"),
        ("5_EfficientNetV2B0", "efficientnet_v2"),
    ],
)
def test_known_sums_are_those_in_keras(notebook, module):
    keras = Path(importlib.util.find_spec("keras").origin).parent
    source = (keras / "src" / "applications" / f"{module}.py").read_text(encoding="utf-8")
    known = origins.KERAS_WEIGHTS[notebook][1]
    assert known in source if known else "file_hash" not in source


@pytest.mark.parametrize(
    "text", ["/home/ann/x", "in '/tmp/ipykernel_1/2.py'", "/root/.keras", r"C:\Users\Ann"]
)
def test_paths_of_a_machine_are_found(text):
    assert notebooks.machine_paths(text)


@pytest.mark.parametrize(
    "text", ["https://a.org/home/x", "runs/home/x", "and/or", "/content/drive/MyDrive", "~/tmp/x"]
)
def test_other_paths_are_let_be(text):
    assert notebooks.machine_paths(text) == []


def test_hosts_are_found(monkeypatch):
    monkeypatch.setattr(notebooks.platform, "node", lambda: "lab-7")
    assert notebooks.hosts("on 10.0.0.12:8080, Keras 3.15.1, http://127.0.0.1") == ["10.0.0.12"]
    monkeypatch.setattr(notebooks.platform, "node", lambda: "laptop-of-ann")
    assert notebooks.hosts("at laptop-of-ann") == ["laptop-of-ann"]


def test_the_last_cell_of_the_tiny_notebook_leaves_what_a_record_needs():
    assert set(RESULT) >= record.RESULT_KEYS and "result.json" in LEAVE
