"""A record names an origin of the initial weights only if it was checked."""

import hashlib
import json
import shutil

import notebooks
import origins
import pytest
import record
import small_portfolio
from notebooks import cell_by_id, read
from small_portfolio import NAME

SIZES = (32, 64, 96, 128, 160, 192, 224)


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Keras's folder of downloaded weights, empty."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    (tmp_path / "keras" / "models").mkdir(parents=True)
    return tmp_path / "keras" / "models"


def assert_no_claim(text):
    """`text` must say that nothing was checked, or that it is another file, and not name an origin besides."""
    assert "not checked" in text or "*not* Keras's file (MD5 differs)" in text
    rest = (
        text.replace("*not* Keras's file", "")
        .replace("in Keras's folder", "")
        .replace("Keras holds no sum", "")
    )
    assert "keras's" not in rest.lower() and "imagenet weights" not in rest.lower()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("notebook", origins.KERAS_WEIGHTS)
def test_random_weights_under_kerass_name_are_not_called_its_own(notebook, size, models):
    """At every image size, also those for which MobileNetV2 takes another file."""
    name, _ = origins.KERAS_WEIGHTS[notebook]
    for used in origins.MOBILENET_SIZES:
        (models / name.format(size=used)).write_bytes(b"random weights")
    found = origins.identify_weights(notebook, "imagenet", size=size)
    assert_no_claim(found["weights"])
    assert "imagenet" not in found["weights"].lower()
    assert found["weights_sha256"] == hashlib.sha256(b"random weights").hexdigest()


@pytest.mark.parametrize("notebook", origins.KERAS_WEIGHTS)
def test_a_note_does_not_vouch_for_kerass_folder(notebook, models):
    name, _ = origins.KERAS_WEIGHTS[notebook]
    (models / name.format(size=224)).write_bytes(b"random weights")
    assert_no_claim(origins.identify_weights(notebook, "imagenet", "Keras's ImageNet weights")["weights"])


@pytest.mark.parametrize("notebook", origins.KERAS_WEIGHTS)
def test_weights_that_are_gone_are_not_vouched_for(notebook, models):
    found = origins.identify_weights(notebook, "imagenet")
    assert_no_claim(found["weights"])
    assert found["weights_sha256"] is None


@pytest.mark.parametrize("notebook", origins.KERAS_WEIGHTS)
def test_a_name_given_by_path_proves_nothing(notebook, models, tmp_path):
    """A file that only bears the name of Keras's, somewhere else."""
    path = tmp_path / origins.KERAS_WEIGHTS[notebook][0].format(size=224)
    path.write_bytes(b"random weights")
    found = origins.identify_weights(notebook, str(path))
    assert_no_claim(found["weights"])
    assert found["weights_file"] == path.name


def test_the_sum_is_taken_anew_for_every_record(models, monkeypatch):
    """Weights that were Keras's own a moment ago and were exchanged since then."""
    notebook, file = "3_DenseNet121", models / origins.KERAS_WEIGHTS["3_DenseNet121"][0]
    known = (file.name, hashlib.md5(b"Keras's own").hexdigest())
    monkeypatch.setitem(origins.KERAS_WEIGHTS, notebook, known)
    file.write_bytes(b"Keras's own")
    assert (
        "Keras's ImageNet weights (MD5 compared)" in origins.identify_weights(notebook, "imagenet")["weights"]
    )
    file.write_bytes(b"random weights")
    assert_no_claim(origins.identify_weights(notebook, "imagenet")["weights"])


@pytest.mark.parametrize("known", [None, "0" * 32], ids=["no sum is known", "another sum"])
def test_a_published_record_claims_nothing(known, models, tmp_path, monkeypatch):
    """From the command to the record, README and the notebook."""
    monkeypatch.setattr(record, "run", small_portfolio.pretend_run)
    monkeypatch.setitem(origins.KERAS_WEIGHTS, NAME, ("small_{size}_notop.h5", known))
    for size in (32, 224):
        (models / f"small_{size}_notop.h5").write_bytes(b"random weights")
    path = small_portfolio.make(tmp_path)
    notebook = read(path)
    cell_by_id(notebook, "parameters").source += '\nWEIGHTS = "imagenet"'
    notebooks.write(notebook, path)
    assert record.main([NAME, "--weights", "imagenet"], tmp_path) == 0
    published = json.loads((tmp_path / "results" / f"{NAME}.json").read_text())
    assert_no_claim(published["weights"])
    shutil.rmtree(tmp_path / "results")
    for file in (tmp_path / "README.md", path):
        text = file.read_text(encoding="utf-8")
        assert "ImageNet weights" not in text and "MD5 compared" not in text
    assert published["weights"] in (tmp_path / "README.md").read_text(encoding="utf-8")
