"""A portfolio of one tiny notebook, for tests of the tools that need no training."""

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

NAME = "1_CNN_Model"
README = "# Small\n" + "".join(
    f"\n<!-- {name} -->\n<!-- /{name} -->\n" for name in ("results", "claims", "stages")
)
TITLE = "# Small\n\n<!-- result -->\n<!-- /result -->\n\nText that stays."
PARAMETERS = """PRESET = "auto"
SEED = 0
DATA_DIR = None
DATA_NOTE = ""
RUN_DIR = "runs"
RETRAIN = False"""
TRAIN = """import base64
from IPython.display import Image, display

ACCURACY = 0.9 + SEED / 100
print("trained", PRESET)"""
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
CURVES = f'display(Image(base64.b64decode("{PNG}"), format="png"))'
RECORD = """import hashlib
import json
from pathlib import Path

sources = [source.rstrip() for source in In if source.strip()]
code = [s for s in sources if not s.startswith(("# Parameters", "PRESET ="))]
stage = {"name": "a", "title": "a | plain", "epochs": 2, "best_epoch": 1, "parameters": 1234567, "gap": 0.05}
stage |= {"flops_per_image": 1e9, "training_flops": 3.21e14, "seconds": 700.0}
stage |= {"train_accuracy": ACCURACY + 0.05, "validation_accuracy": ACCURACY, "test_accuracy": ACCURACY - 0.01}
final = {"stage": "a"} | {k: stage[k] for k in ("validation_accuracy", "test_accuracy", "parameters")}
final |= {k: stage[k] for k in ("training_flops", "seconds")}
claim = {"claim": "it helps", "experiment": "a against b", "outcome": f"{100 * ACCURACY:.2f} % for a"}
versions = {"python": "3.11.0", "keras": "3.8.0", "backend": "tensorflow", "backend_version": "2.18.0"}
record = {"notebook": "1_CNN_Model", "title": "Small", "preset": PRESET, "seed": SEED, "weights": "none"}
record |= {"data": "made up" + DATA_NOTE, "data_official": not DATA_NOTE, "image_size": 32, "device": "a CPU"}
record |= {"split": {"train": 45000, "validation": 5000, "test": 10000}, "precision": "float32"}
record |= {"versions": versions | {"numpy": "2.0.0"}, "date": "2026-01-31", "seconds": 700.0}
record |= {"code_sha256": hashlib.sha256("\\n\\n".join(code).encode()).hexdigest()}
record |= {"stages": [stage], "final": final, "claims": [claim]}
folder = Path(RUN_DIR, "1_CNN_Model", f"{PRESET}-seed{SEED}")
folder.mkdir(parents=True, exist_ok=True)
(folder / "record.json").write_text(json.dumps(record))
print(json.dumps(record, indent=1))"""


def make(root, train=TRAIN):
    """Write the portfolio into `root`; `train` is the source of its middle cell. Returns the notebook's path."""
    cells = [
        new_markdown_cell(TITLE, id="title"),
        new_code_cell(PARAMETERS, id="parameters", metadata={"tags": ["parameters"]}),
        new_code_cell(train, id="train", metadata={"tags": ["shared"]}),
        new_code_cell(CURVES, id="curves", metadata={"tags": ["figure"]}),
        new_code_cell(RECORD, id="record"),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path = root / f"{NAME}.ipynb"
    nbformat.write(new_notebook(cells=cells, metadata=kernel), path)
    (root / "README.md").write_text(README)
    (root / "results").mkdir(exist_ok=True)
    return path
