"""What a resumed run leaves in the notebook is what the unbroken one leaves, to the last character and pixel."""

import json
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT, run_notebook, stop_group
from notebooks import code_cells, is_injected, lasting_outputs, read, tags, write

LAST = "curves-arms"
LEFT_OUT = {
    "first-fits",
    "show-overfitting",
    "whitening",
    "show-whitening",
    "modern-cnn",
    "orthogonalised",
    "muon",
}
LEFT_OUT |= {"train-modern", "train-plain-recipe"}


def shortened(path):
    """Write the first notebook up to the curves of its experiment, without what takes long; return `path`."""
    notebook = read(ROOT / "1_CNN_Model.ipynb")
    last = [cell.id for cell in notebook.cells].index(LAST) + 1
    notebook.cells = [cell for cell in notebook.cells[:last] if cell.id not in LEFT_OUT]
    write(notebook, path)
    return path


def published(path):
    """{id: outputs that are published} of an executed notebook's cells, but for those that hold seconds."""
    cells = [cell for cell in code_cells(read(path)) if "seconds" not in tags(cell) and not is_injected(cell)]
    return {cell.id: json.dumps(lasting_outputs(cell)) for cell in cells}


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
def test_a_killed_and_resumed_notebook_shows_what_the_unbroken_one_shows(small_cifar, tmp_path):
    path = shortened(tmp_path / "short.ipynb")
    parameters = {"PRESET": "smoke", "DATA_DIR": str(small_cifar), "RUN_DIR": "runs"}
    env = {"TF_DETERMINISTIC_OPS": "1"}
    whole = run_notebook(path, tmp_path / "whole" / "out.ipynb", env=env, **parameters)
    folder = tmp_path / "resumed"
    folder.mkdir()
    command = [sys.executable, "-m", "papermill", str(path), str(folder / "out.ipynb"), "--cwd", str(folder)]
    command += ["--kernel", "python3", "--no-progress-bar", "-y", json.dumps(parameters)]
    process = subprocess.Popen(
        command, env=os.environ | env, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while not list(folder.glob("runs/**/(b) augmented, seed 0/epoch-0001.keras")):
        assert process.poll() is None, "the notebook ended before it could be killed"
        time.sleep(0.05)
    stop_group(process)
    finished = sorted(folder.glob("runs/**/epoch-0002.keras"))
    times = [file.stat().st_mtime_ns for file in finished]
    resumed = run_notebook(path, folder / "out.ipynb", env=env, **parameters)
    assert finished and times == [file.stat().st_mtime_ns for file in finished], "what was finished is loaded"
    mine, its = published(resumed.path), published(whole.path)
    assert [cell_id for cell_id in its if mine[cell_id] != its[cell_id]] == []
    assert "epoch 2: loss" in its["train-arms"] and "image/png" in its[LAST]
