"""tools/: shared cells are carried, runs are recorded, tables are made from records."""

import json
import os
from pathlib import Path

import notebooks
import pytest
import record
import refresh
import small_portfolio
import sync_cells
from notebooks import PENDING, cell_by_id, read
from small_portfolio import NAME


@pytest.fixture
def portfolio(tmp_path):
    """Folder with the tiny portfolio, nothing recorded."""
    small_portfolio.make(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Folder with the tiny portfolio and its recorded run; not to be changed."""
    root = tmp_path_factory.mktemp("recorded")
    small_portfolio.make(root)
    assert record.main([f"{NAME}.ipynb", "--preset", "gpu"], root) == 0
    return root


def second_notebook(root, **changes):
    """Copy the tiny notebook as number 2, with other sources for the cells named in `changes`."""
    notebook = read(root / f"{NAME}.ipynb")
    for cell_id, source in changes.items():
        cell_by_id(notebook, cell_id).source = source
    notebooks.write(notebook, root / "2_MobileNetV2.ipynb")
    return root / "2_MobileNetV2.ipynb"


def test_sync_carries_shared_cells_and_no_others(portfolio, capsys):
    path = second_notebook(portfolio, train="print('old')", curves="print('the lesson')")
    before = path.read_text()
    assert sync_cells.main(["--check"], portfolio) == 1
    assert "2_MobileNetV2.ipynb: train differs from 1_CNN_Model.ipynb" in capsys.readouterr().out
    assert path.read_text() == before
    assert sync_cells.main([], portfolio) == 0
    assert cell_by_id(read(path), "train").source == small_portfolio.TRAIN
    assert cell_by_id(read(path), "curves").source == "print('the lesson')"
    assert sync_cells.main(["--check"], portfolio) == 0


def test_sync_tags_a_copy_that_is_not_tagged(portfolio):
    path = second_notebook(portfolio)
    notebook = read(path)
    cell_by_id(notebook, "train").metadata["tags"] = []
    notebooks.write(notebook, path)
    assert sync_cells.main(["--check"], portfolio) == 1
    sync_cells.main([], portfolio)
    assert cell_by_id(read(path), "train").metadata["tags"] == ["shared"]


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
    assert "[2_MobileNetV2]" not in readme
    assert PENDING in cell_by_id(read(portfolio / f"{NAME}.ipynb"), "title").source
    assert refresh.main(["--check"], portfolio) == 0


def test_recording_publishes_record_outputs_figures_and_tables(recorded):
    notebook = read(recorded / f"{NAME}.ipynb")
    published = json.loads((recorded / "results" / f"{NAME}.json").read_text())
    assert published["code_sha256"] == notebooks.code_digest(notebook)
    assert (published["preset"], published["seed"]) == ("gpu", 0)
    assert [cell.execution_count for cell in notebooks.code_cells(notebook)] == [1, 2, 3, 4]
    assert cell_by_id(notebook, "parameters").source == small_portfolio.PARAMETERS
    assert [cell.id for cell in notebook.cells] == ["title", "parameters", "train", "curves", "record"]
    assert "papermill" not in json.dumps(notebook.metadata) + "".join(
        str(cell.metadata) for cell in notebook.cells
    )
    assert (recorded / "results" / NAME / "curves.png").read_bytes().startswith(b"\x89PNG")
    title = cell_by_id(notebook, "title").source
    assert "test accuracy **89.00 %**" in title and title.endswith("Text that stays.")
    readme = (recorded / "README.md").read_text()
    for text in ("**89.00**", "1,234,567", "0.321", "12 min on a CPU", "90.00 % for a", "a \\| plain"):
        assert text in readme
    assert refresh.main(["--check"], recorded) == 0


@pytest.mark.skipif(os.name != "posix", reason="peak memory is not known on Windows")
def test_peak_memory_is_noted_unless_the_beginning_of_a_run_was_missed(portfolio):
    record.main([NAME, "--preset", "gpu"], portfolio)
    result = portfolio / "results" / f"{NAME}.json"
    assert 10e6 < json.loads(result.read_text())["peak_memory_bytes"] < 1e11
    (note,) = portfolio.glob("runs/*-peak-memory.json")
    note.write_text("123456789012")
    record.main([NAME, "--preset", "gpu"], portfolio)
    assert json.loads(result.read_text())["peak_memory_bytes"] == 123456789012
    assert " 123.5 |" in (portfolio / "README.md").read_text()
    note.unlink()
    record.main([NAME, "--preset", "gpu"], portfolio)
    assert "peak_memory_bytes" not in json.loads(result.read_text())


def test_a_further_seed_is_averaged_and_leaves_the_notebook_alone(recorded, portfolio):
    copy_recorded(recorded, portfolio)
    before = (portfolio / f"{NAME}.ipynb").read_bytes()
    assert record.main([NAME, "--preset", "gpu", "--seed", "2"], portfolio) == 0
    assert (portfolio / f"{NAME}.ipynb").read_bytes() == before
    assert "| **90.00 ± 1.41** | 2 |" in (portfolio / "README.md").read_text()


def test_a_run_that_is_not_to_be_published_changes_nothing(recorded, portfolio, capsys):
    copy_recorded(recorded, portfolio)
    before = {path: path.read_bytes() for path in published_files(portfolio)}
    assert record.main([NAME, "--preset", "gpu", "--seed", "2", "--no-publish"], portfolio) == 0
    assert {path: path.read_bytes() for path in published_files(portfolio)} == before
    accuracy = refresh.percent(refresh.load_record(NAME, portfolio)["final"]["test_accuracy"] + 0.02)
    assert f"{NAME}: test accuracy {accuracy} %" in capsys.readouterr().out


def published_files(root):
    """Notebooks, README and everything in results/, at the folder `root`."""
    return [*root.glob("*.ipynb"), root / "README.md", *filter(Path.is_file, root.glob("results/**/*"))]


def test_a_seed_of_other_code_is_left_out(recorded, portfolio, capsys):
    copy_recorded(recorded, portfolio)
    other = json.loads((portfolio / "results" / f"{NAME}.json").read_text())
    other |= {"seed": 1, "code_sha256": "0" * 64}
    (portfolio / "results" / f"{NAME}-seed1.json").write_text(json.dumps(other))
    assert refresh.main(["--check"], portfolio) == 1
    assert f"{NAME}-seed1.json is left out" in capsys.readouterr().out


def copy_recorded(recorded, root):
    """Copy what `recorded` has published to `root`."""
    (root / "results" / NAME).mkdir(exist_ok=True)
    for name in (f"{NAME}.ipynb", "README.md", f"results/{NAME}.json", f"results/{NAME}/curves.png"):
        (root / name).write_bytes((recorded / name).read_bytes())


def test_data_that_are_not_official_get_a_footnote(recorded, portfolio):
    copy_recorded(recorded, portfolio)
    path = portfolio / "results" / f"{NAME}.json"
    changed = json.loads(path.read_text()) | {"data_official": False, "data": "93 images are re-encoded"}
    path.write_text(json.dumps(changed))
    refresh.main([], portfolio)
    readme = (portfolio / "README.md").read_text()
    assert "**89.00** <sup>1</sup>" in readme
    assert "\n<sup>1</sup> 93 images are re-encoded\n" in readme


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("raise ValueError('no')", "did not finish"),
        (
            small_portfolio.TRAIN + "\nprint('/home/ann/data')",
            "train names a path of this machine: /home/ann",
        ),
        (small_portfolio.TRAIN + "\nIn.append('more')", "other code"),
    ],
    ids=["error", "path", "digest"],
)
def test_what_must_not_be_published_is_refused(tmp_path, train, message):
    path = small_portfolio.make(tmp_path, train)
    before = path.read_bytes()
    with pytest.raises(SystemExit, match=message):
        record.main([NAME, "--preset", "gpu"], tmp_path)
    assert path.read_bytes() == before
    assert list((tmp_path / "results").iterdir()) == []
    assert (tmp_path / "runs" / f"{NAME}-gpu-seed0.ipynb").exists()


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
