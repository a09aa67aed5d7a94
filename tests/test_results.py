"""README, records, and the outputs of the notebooks tell the same story, and the outputs are those of the code."""

import json
import re
from pathlib import Path

import overview
import pytest
import record
import records
import refresh
import small_portfolio
import tables
from conftest import ROOT
from notebooks import TITLES, cell_by_id, code_cells, code_digest, notebook_paths, output_texts, read, write
from small_portfolio import NAME, OTHER

MAINTAINERS_KEYS = set(
    "data data_official weights weights_sha256 weights_file device_name date versions code_sha256".split()
)
CLAIM_KEYS = set("claim experiment verdict effect margin unit pairs outcome".split())
STAGE_KEYS = set("title seed parameters training_flops seconds history".split())
FORMAT_KEYS = {"format", "file"}
EARLIER_RUN = "outputs are older than the code"


def complaints(root):
    """Everything in the portfolio at `root` that does not agree, as a list of sentences."""
    found = [f"{name} is stale" for name in refresh.refresh(root, check=True)]
    found += [f"{name} is left out" for name in refresh.report_left_out(root)]
    for path in notebook_paths(root):
        published = records.load_record(path.stem, root)
        if published is not None:
            found += [f"{path.name}: {complaint}" for complaint in notebook_complaints(path, published, root)]
    return found


def notebook_complaints(path, published, root):
    """What does not agree between a notebook and its published record."""
    notebook = read(path)
    if code_digest(notebook) != published["code_sha256"]:
        yield EARLIER_RUN
    text = "\n".join(text for cell in code_cells(notebook) for text in output_texts(cell))
    if not shows(text, published["final"]["test_accuracy"]):
        yield "no output shows the test accuracy of the final model"
    saved = {file.name: file for file in (root / "results" / path.stem).glob("*")}
    pictures = {name: file.read_bytes() for name, file in saved.items() if file.suffix == ".png"}
    if pictures != record.figures(notebook):
        yield "the figures in results/ are not those of the outputs"
    wanted = {Path(published["recommended"]).name} if published["preset"] == "full" else set()
    if saved.keys() - pictures.keys() != wanted:
        yield "the model file in results/ is not the recommended one"


def shows(text, percentage):
    """Whether `text` holds a percentage."""
    return any(re.search(rf"(?<![\d.]){percentage:.{digits}f}(?!\d)", text) for digits in (1, 2))


def check_result(result):
    """Assert that what a notebook leaves has everything that is shown of it, and that its numbers are possible."""
    assert set(result) >= record.RESULT_KEYS
    assert set(result["final"]) >= record.FINAL_KEYS
    final = result["final"]
    assert all(1 < final[f"{part}_accuracy"] <= 100 for part in ("validation", "test"))
    assert min(final[key] for key in ("parameters", "training_flops", "seconds")) > 0
    assert result["stages"] and result["claims"]
    assert all(set(stage) >= STAGE_KEYS for stage in result["stages"])
    for claim in result["claims"]:
        assert set(claim) >= CLAIM_KEYS
        assert claim["verdict"] in ("yes", "no", "open") and claim["pairs"] >= 1
        assert claim["verdict"] == "open" or claim["margin"] is not None or claim["unit"] == "PFLOP"
        assert claim["outcome"].endswith(".")
    for row in result["formats"]:
        assert set(row) >= FORMAT_KEYS
        assert set(row) >= {"MB", "validation", "test", "milliseconds"} or row["note"]


def check_record(published):
    """Assert that a record has everything README and readers need."""
    check_result(published)
    assert set(published) >= MAINTAINERS_KEYS
    assert set(published["versions"]) == {"python", "keras", "numpy", published["backend"]}
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", published["date"])
    assert re.fullmatch(r"[0-9a-f]{64}", published["code_sha256"])


def test_everything_agrees():
    assert complaints(ROOT) == []


def test_every_record_belongs_to_a_notebook():
    names = {re.sub(r"-seed\d+$", "", path.stem) for path in (ROOT / "results").glob("*.json")}
    assert names <= set(TITLES)
    assert [name for name in names if not (ROOT / f"{name}.ipynb").exists()] == []


def test_records_are_whole(notebook_path):
    published = records.load_record(notebook_path.stem)
    if published is None:
        pytest.skip("recorded run pending")
    check_record(published)
    assert published["notebook"] == notebook_path.stem
    assert published["preset"] in ("quick", "full")


def test_readme_prose_has_no_measured_numbers():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->|95 % interval", "", text, flags=re.DOTALL)
    assert re.findall(r"\d[\d.]*\s*(?:%|percent|PFLOP|images/s)", text) == []


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Folder with the tiny portfolio and its pretended run, everything in agreement."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setattr(record, "run", small_portfolio.pretend_run)
    small_portfolio.make(tmp_path)
    record.main([NAME], tmp_path)
    assert complaints(tmp_path) == []
    return tmp_path


def change_record(root, **changes):
    """Change entries of the tiny notebook's record; those of `final` by their names."""
    path = root / "results" / f"{NAME}.json"
    found = json.loads(path.read_text())
    for key, value in changes.items():
        (found["final"] if key in found["final"] else found)[key] = value
    path.write_text(json.dumps(found))


def change_cell(root, cell_id, **changes):
    """Change a cell of the tiny notebook."""
    notebook = read(root / f"{NAME}.ipynb")
    cell_by_id(notebook, cell_id).update(changes)
    write(notebook, root / f"{NAME}.ipynb")


def test_a_number_changed_in_readme_is_noticed(published):
    readme = published / "README.md"
    readme.write_text(readme.read_text().replace("90.00", "99.99", 1))
    assert complaints(published) == ["README.md is stale"]


def test_a_number_changed_in_the_record_is_noticed(published):
    change_record(published, test_accuracy=98.765)
    found = complaints(published)
    assert {"README.md is stale", f"{NAME}.ipynb is stale", "results/overview.png is stale"} <= set(found)
    assert any("no output shows" in complaint for complaint in found)
    refresh.refresh(published)
    assert [complaint for complaint in complaints(published) if "stale" in complaint] == []


def test_code_that_changed_after_the_run_is_noticed(published):
    change_cell(published, "curves", source="print('later')")
    assert complaints(published) == [f"{NAME}.ipynb: {EARLIER_RUN}"]


def test_other_parameters_are_no_other_code(published):
    change_cell(published, "parameters", source="SEED = 7")
    assert complaints(published) == []


def test_figures_of_another_run_are_noticed(published):
    change_cell(published, "curves", outputs=[])
    assert any("figures in results/" in complaint for complaint in complaints(published))


def test_a_model_file_that_is_missing_is_noticed(published):
    (published / "results" / NAME / "small.tflite").unlink()
    assert f"{NAME}.ipynb: the model file in results/ is not the recommended one" in complaints(published)


def test_model_files_are_listed_with_their_own_accuracy(published):
    """It is the one that the file was measured to have, not that of the model it was made from."""
    [row] = tables.files(published).splitlines()[2:]
    assert row.endswith(f"| {TITLES[NAME]} | 1.5 MB | 88.80 % |")


def test_the_overview_is_drawn_from_its_points(published):
    change_record(published, training_flops=6.42e14)
    assert "results/overview.png is stale" in complaints(published)
    refresh.refresh(published)
    assert [point["pflop"] for point in overview.drawn(published)] == [0.642]


def test_key_metrics_name_the_best_of_each_kind(published):
    """The second notebook is more accurate for more operations and more time."""
    small_portfolio.add_other(published, test_accuracy=95.0, training_flops=2e15, seconds=1500.0)
    text = tables.metrics(published)
    best = dict(re.findall(r"\*\*(.*?):\*\* \[(.*?)\]", text))
    first, second = TITLES[NAME], TITLES[OTHER]
    assert best == {
        "Best test accuracy": second,
        "Most accuracy per FLOP": first,
        "Fastest training": first,
        "Best accuracy for its time": first,
    }
    assert "95.0 % (94.6–95.4)" in text and "249 points above guessing per PFLOP" in text
    assert text.count("<sup>") == 4


@pytest.mark.parametrize("place", ["a GPU, float16", "2 CPU cores, float16 (1 of 2 stages)"])
def test_times_of_different_machines_are_not_compared(published, place):
    change_record(published, device_name="2 CPU cores")
    small_portfolio.add_other(published, seconds=1.0, trained_on=place)
    text = tables.metrics(published)
    for title in ("Fastest training", "Best accuracy for its time"):
        assert f"**{title}:** [{TITLES[NAME]}]" in text
    assert "of the 1 trained on 2 CPU cores." in text


def test_insights_say_verdict_amount_and_on_what(published):
    rows = tables.insights(published).splitlines()[2:]
    assert rows[0].endswith(
        r"| Augmentation \| mirror helps | **yes** | +3.1 ± 0.4 points, 3 seeds | four small CNNs, 45,000 images |"
    )
    assert "| **open** | -0.20 points, 1 seed | (e) alone |" in rows[1]
    work = {"effect": 0.34, "margin": None, "unit": "PFLOP", "pairs": 1}
    assert tables.amount(work) == "0.34 PFLOP, 1 seed"


def test_every_row_carries_its_footnotes(published):
    notes = {
        "data": "93 images are re-encoded",
        "weights": "file w.h5 (SHA-256 0123…): mine",
        "preset": "quick",
        "weights_file": "w.h5",
    }
    small_portfolio.add_other(published, **notes)
    text = tables.results(published)
    rows = [line for line in text.splitlines() if line.startswith("| [")]
    assert ["<sup>1, 2, 3</sup>" in rows[0], "<sup>3, 4, 5, 6</sup>" in rows[1]] == [True, True]
    for number, note in enumerate(["93 images are re-encoded", r"file w.h5 \(SHA-256 0123…\): mine"], 4):
        assert re.search(rf"^<sup>{number} .*{note}", text, re.MULTILINE)
    assert "notes 1 to 6" in tables.figure(published)
    assert "--preset quick --weights w.h5" in tables.reproduce(published)


def test_the_small_print_names_data_weights_and_software(published):
    places = {"trained_on": "a GPU, float16", "experiments_trained_on": "a TPU, bfloat16 (1 of 2 trainings)"}
    change_record(published, data="93 images are re-encoded", peak_memory_bytes=3_900_000_000, **places)
    refresh.refresh(published)
    text = cell_by_id(read(published / f"{NAME}.ipynb"), "takeaways").source
    for part in (
        "93 images are re-encoded",
        "trained from scratch",
        "Keras ",
        "seed 0",
        "3.9 GB",
        "CPU cores",
        "The best model was trained on a GPU, float16, in ",
        "The experiments were trained on a TPU, bfloat16 (1 of 2 trainings).",
    ):
        assert part in text


def test_the_interval_is_wilsons():
    low, high = records.interval(0.97)
    assert (round(low, 4), round(high, 4)) == (0.9665, 0.9732)
    assert records.interval(1.0, count=10)[1] == pytest.approx(1.0)
    assert records.interval(1.0, count=10)[0] == pytest.approx(0.7225, abs=1e-3)


def test_numbers_are_written_for_people():
    assert [records.duration(seconds) for seconds in (45, 700, 7500)] == ["45 s", "12 min", "2 h 5 min"]
    assert [records.pflop(flops) for flops in (4.5e14, 2.345e11)] == ["0.450", "0.00023"]
    assert records.accuracy_text([0.94, 0.95, 0.96]) == "95.00 ± 1.00"
