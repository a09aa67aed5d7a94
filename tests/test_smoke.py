"""Each notebook runs from top to bottom with the smoke preset."""

import json
import os

import pytest
from conftest import ROOT, find_weights_file, real_cifar_folder, require_backend, run_notebook
from notebooks import cell_by_id, code_cells, code_digest, errors, notebook_paths, output_texts, read
from test_results import check_result

BUDGET = 100
# TensorFlow has no environment variable for it: IPython runs this before the notebook's first cell.
TWO_DEVICES = f"""import sys

sys.path.insert(0, {str(ROOT / "tools")!r})
from agreement import virtual_devices

virtual_devices(2)
"""


def wants_weights(notebook_path):
    """Whether a notebook starts from a pretrained backbone."""
    return "WEIGHTS" in cell_by_id(read(notebook_path), "parameters").source


def smoke(notebook_path, folder, data_dir, weights=None, devices=1, **env):
    """Run a notebook with the smoke preset in `folder` on that many devices, check what it left, return its result."""
    parameters = {"PRESET": "smoke", "DATA_DIR": str(data_dir), "RUN_DIR": "runs"}
    if wants_weights(notebook_path):
        parameters["WEIGHTS"] = weights and str(weights)
    run = run_notebook(notebook_path, folder / notebook_path.name, env=env, **parameters)
    print(f"{notebook_path.stem}: {run.seconds:.0f} s, budget {BUDGET} s on two cores")
    assert errors(run.notebook) == []
    assert code_digest(run.notebook) == code_digest(read(notebook_path))
    made = folder / "runs" / notebook_path.stem / "smoke-seed0"
    result = json.loads((made / "result.json").read_text(encoding="utf-8"))
    check_result(result)
    assert (result["notebook"], result["preset"], result["seed"]) == (notebook_path.stem, "smoke", 0)
    assert [file for file in made.glob(f"**/files/{notebook_path.stem}.keras") if file.stat().st_size > 0]
    backups = [path.parent for path in made.glob("**/epoch-*.keras")]
    assert backups and len(set(backups)) == len(backups), "a finished stage keeps one file"
    printed = "".join(text for cell in code_cells(run.notebook) for text in output_texts(cell))
    assert f"on {devices} {result['device']}" in printed
    return result


def weights_at_hand(notebook_path):
    """The file of pretrained weights for a notebook, None if it wants none or there is none here."""
    return find_weights_file(notebook_path.stem) if wants_weights(notebook_path) else None


def test_on_made_data(notebook_path, small_cifar, tmp_path):
    """With random weights; left out where the longer test below runs the same cells on the real data."""
    pretrained = weights_at_hand(notebook_path) or not wants_weights(notebook_path)
    if pretrained and real_cifar_folder() and not os.environ.get("ALL_RUNS"):
        pytest.skip("runs on the real data, with any pretrained weights; ALL_RUNS=1 runs both")
    smoke(notebook_path, tmp_path, small_cifar)


def test_on_real_data(notebook_path, real_cifar, tmp_path):
    """With pretrained weights as well, where they are at hand."""
    smoke(notebook_path, tmp_path, real_cifar, weights_at_hand(notebook_path))


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_on_another_backend(notebook_path, backend, small_cifar, tmp_path):
    """JAX on the first two notebooks; the rest, which takes long on a CPU, with ALL_RUNS."""
    require_backend(backend)
    if not os.environ.get("ALL_RUNS") and (backend != "jax" or notebook_path not in notebook_paths()[:2]):
        pytest.skip("ALL_RUNS=1 runs every notebook on every backend that is installed")
    assert smoke(notebook_path, tmp_path, small_cifar, KERAS_BACKEND=backend)["backend"] == backend


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_on_two_devices(notebook_path, backend, small_cifar, tmp_path):
    """On two virtual devices of one CPU, in full; a comparison with one device is in test_agreement.py."""
    require_backend(backend)
    if not os.environ.get("ALL_RUNS"):
        pytest.skip("ALL_RUNS=1 runs every notebook on two devices")
    start_up = tmp_path / "ipython" / "profile_default" / "startup" / "two_devices.py"
    start_up.parent.mkdir(parents=True)
    start_up.write_text(TWO_DEVICES)
    env = {"KERAS_BACKEND": backend, "IPYTHONDIR": str(start_up.parents[2])}
    env |= {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu"}
    smoke(notebook_path, tmp_path, small_cifar, devices=2, **env)
