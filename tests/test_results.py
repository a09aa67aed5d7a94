"""README, records, and the outputs of the notebooks tell the same story, and the outputs are those of the code."""

import json
import re
import shutil

import overview
import pytest
import record
import refresh
from conftest import ROOT
from notebooks import TITLES, cell_by_id, code_cells, code_digest, notebook_paths, output_texts, read, write

RECORD_KEYS = set(
    "notebook title preset seed weights data data_official split image_size device precision versions date code_sha256 "
    "seconds stages final claims".split()
)
STAGE_KEYS = set(
    "name title epochs best_epoch parameters flops_per_image training_flops seconds train_accuracy "
    "validation_accuracy test_accuracy gap".split()
)
FINAL_KEYS = set("stage validation_accuracy test_accuracy parameters training_flops seconds".split())
VERSION_KEYS = set("python keras backend backend_version numpy".split())
EARLIER_RUN = "outputs are older than the code"


def complaints(root):
    """Everything in the portfolio at `root` that does not agree, as a list of sentences."""
    found = [f"{name} is stale" for name in refresh.refresh(root, check=True)]
    found += [f"{name} is left out" for name in refresh.report_left_out(root)]
    for path in notebook_paths(root):
        published = refresh.load_record(path.stem, root)
        if published is not None:
            found += [f"{path.name}: {complaint}" for complaint in notebook_complaints(path, published, root)]
    return found


def notebook_complaints(path, published, root):
    """What does not agree between a notebook and its published record."""
    notebook = read(path)
    if code_digest(notebook) != published["code_sha256"]:
        yield EARLIER_RUN
    text = "\n".join(text for cell in code_cells(notebook) for text in output_texts(cell))
    for stage in published["stages"]:
        if not shows(text, stage["test_accuracy"]):
            yield f"no output shows the test accuracy of stage {stage['name']}"
    folder = root / "results" / path.stem
    saved = {file.name: file.read_bytes() for file in folder.glob("*.png")}
    if saved != record.figures(notebook):
        yield "the figures in results/ are not those of the outputs"


def shows(text, fraction):
    """Whether `text` holds an accuracy, in percent or as a fraction."""
    forms = [f"{fraction:.1%}", f"{fraction:.2%}", f"{100 * fraction:.2f}", f"{fraction:.4f}", repr(fraction)]
    return any(re.search(rf"(?<![\d.]){re.escape(form)}(?!\d)", text) for form in forms)


def check_record(published):
    """Assert that a record has everything README and readers need, and that its numbers are possible."""
    assert set(published) >= RECORD_KEYS
    assert set(published["versions"]) >= VERSION_KEYS
    assert set(published["final"]) >= FINAL_KEYS
    assert published["stages"]
    for stage in published["stages"]:
        assert set(stage) >= STAGE_KEYS
        assert all(0 <= stage[f"{part}_accuracy"] <= 1 for part in ("train", "validation", "test"))
        assert stage["gap"] == pytest.approx(stage["train_accuracy"] - stage["validation_accuracy"], abs=1e-6)
        assert 1 <= stage["best_epoch"] <= stage["epochs"]
        assert (
            min(stage["parameters"], stage["training_flops"], stage["flops_per_image"], stage["seconds"]) > 0
        )
    final = next(stage for stage in published["stages"] if stage["name"] == published["final"]["stage"])
    assert all(published["final"][key] == final[key] for key in FINAL_KEYS - {"stage"})
    assert all(set(claim) >= {"claim", "experiment", "outcome"} for claim in published["claims"])
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", published["date"])
    assert re.fullmatch(r"[0-9a-f]{64}", published["code_sha256"])


def test_everything_agrees():
    assert complaints(ROOT) == []


def test_every_record_belongs_to_a_notebook():
    names = {re.sub(r"-seed\d+$", "", path.stem) for path in (ROOT / "results").glob("*.json")}
    assert names <= set(TITLES)
    assert [name for name in names if not (ROOT / f"{name}.ipynb").exists()] == []


def test_records_are_whole(notebook_path):
    published = refresh.load_record(notebook_path.stem)
    if published is None:
        pytest.skip("recorded run pending")
    check_record(published)
    assert published["notebook"] == notebook_path.stem
    assert published["split"] == {"train": 45000, "validation": 5000, "test": 10000}
    assert published["preset"] in ("cpu", "gpu")


def test_readme_prose_has_no_measured_numbers():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", text, flags=re.DOTALL)
    assert re.findall(r"\d[\d.]*\s*(?:%|percent|PFLOP|images/s)", text) == []


@pytest.fixture
def copy(tmp_path):
    """A copy of the portfolio with a recorded notebook in it, and the name of that notebook."""
    name = next((path.stem for path in notebook_paths() if refresh.load_record(path.stem)), None)
    if name is None:
        pytest.skip("recorded run pending")
    for path in [ROOT / "README.md", *notebook_paths()]:
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "results", tmp_path / "results")
    return tmp_path, name


def test_a_number_changed_in_readme_is_noticed(copy):
    root, name = copy
    readme = root / "README.md"
    shown = refresh.percent(refresh.load_record(name, root)["stages"][0]["test_accuracy"])
    accuracy = refresh.percent(refresh.load_record(name, root)["final"]["test_accuracy"])
    text = readme.read_text(encoding="utf-8")
    assert accuracy in text and shown
    readme.write_text(text.replace(accuracy, "99.99", 1), encoding="utf-8")
    assert "README.md is stale" in complaints(root)


def test_a_number_changed_in_the_record_is_noticed(copy):
    root, name = copy
    path = root / "results" / f"{name}.json"
    published = json.loads(path.read_text(encoding="utf-8"))
    published["stages"][0]["test_accuracy"] = 0.123456
    published["final"]["test_accuracy"] = 0.98765
    path.write_text(json.dumps(published), encoding="utf-8")
    found = complaints(root)
    assert {"README.md is stale", f"{name}.ipynb is stale"} <= set(found)
    assert any("no output shows" in complaint for complaint in found)


def test_code_that_changed_after_the_run_is_noticed(copy):
    root, name = copy
    notebook = read(root / f"{name}.ipynb")
    code_cells(notebook)[-1].source += "\nprint('later')"
    write(notebook, root / f"{name}.ipynb")
    assert complaints(root) == [f"{name}.ipynb: {EARLIER_RUN}"]


def test_other_parameters_are_no_other_code(copy):
    root, name = copy
    notebook = read(root / f"{name}.ipynb")
    cell_by_id(notebook, "parameters").source += "\nSEED = 7"
    write(notebook, root / f"{name}.ipynb")
    assert complaints(root) == []


def test_outputs_of_another_run_are_noticed(copy):
    root, name = copy
    notebook = read(root / f"{name}.ipynb")
    for cell in code_cells(notebook):
        cell.outputs = []
    write(notebook, root / f"{name}.ipynb")
    assert any("no output shows" in complaint for complaint in complaints(root))


def test_a_figure_of_other_results_is_noticed(copy):
    root, name = copy
    path = root / "results" / f"{name}.json"
    published = json.loads(path.read_text(encoding="utf-8"))
    published["final"]["training_flops"] *= 2
    path.write_text(json.dumps(published), encoding="utf-8")
    assert "results/overview.png is stale" in complaints(root)
    refresh.refresh(root)
    assert not any(complaint.startswith("results/overview.png") for complaint in complaints(root))
    drawn = {point["notebook"]: point["pflop"] for point in overview.drawn(root)}
    assert drawn[name] == published["final"]["training_flops"] / 1e15
