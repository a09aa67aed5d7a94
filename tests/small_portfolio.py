"""A portfolio of one tiny notebook with made-up results, for tests of the tools that need no training."""

import json

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from notebooks import code_cells, read, write

NAME = "1_CNN_Model"
OTHER = "2_MobileNetV2"
DOCUMENTS = {
    "README.md": ("figure", "results", "metrics", "insights", "files"),
    "tools/README.md": ("reproduce",),
}
TITLE = "# Small\n\n<!-- result -->\n<!-- /result -->\n\nText that stays."
LAST = "## 10 Takeaways\n\nThat was it.\n\n<!-- small-print -->\n<!-- /small-print -->"
PARAMETERS = """PRESET = "auto"
SEED = 0
DATA_DIR = None
RUN_DIR = "runs"
RETRAIN = False"""
TRAIN = """import base64, sys, time
from IPython.display import Image, Markdown, display

print("a warning", file=sys.stderr)
handle = display(Markdown("(a): "), display_id=True)
for share in range(0, 100, 20):
    handle.update(Markdown(f"(a): epoch 1: loss 0.9  \\nepoch 2: {share} %"))
    time.sleep(0.02)
handle.update(Markdown("(a): epoch 1: loss 0.9  \\nepoch 2: loss **0.5**"))
empty = display(Markdown("soon gone"), display_id=True)
empty.update(Markdown(""))
print(f"{PRESET} {SEED} {RETRAIN!r}: {0.9 + SEED / 100:.2%}")"""
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
CURVES = f'display(Image(base64.b64decode("{PNG}"), format="png"))'
STAGE = {
    "name": "modern",
    "title": "(e) modern CNN",
    "seed": 0,
    "parameters": 1_973_921,
    "training_flops": 3.21e14,
    "seconds": 700.0,
    "history": [{"epoch": 1, "loss": 0.5, "accuracy": 0.8, "val_loss": 0.6, "val_accuracy": 0.7}],
}
RESULT = {
    "notebook": NAME,
    "preset": "full",
    "seed": 0,
    "backend": "tensorflow",
    "device": "cpu",
    "precision": "mixed_bfloat16",
    "image_size": 32,
    "stages": [STAGE],
    "experiments": {"four networks": {"(a)": [STAGE]}},
    "claims": [
        {
            "claim": "Augmentation | mirror helps",
            "experiment": "four small CNNs, 45,000 images",
            "verdict": "yes",
            "effect": 3.14,
            "margin": 0.42,
            "unit": "points",
            "pairs": 3,
            "outcome": "(b) is above (a).",
        },
        {
            "claim": "One seed decides",
            "experiment": "(e) alone",
            "verdict": "open",
            "effect": -0.2,
            "margin": None,
            "unit": "points",
            "pairs": 1,
            "outcome": "Who knows.",
        },
    ],
    "final": {
        "title": "(e) modern CNN",
        "validation_accuracy": 91.0,
        "test_accuracy": 90.0,
        "margin": 0.6,
        "views": "one view",
        "parameters": 1_973_921,
        "training_flops": 3.21e14,
        "seconds": 700.0,
    },
    "formats": [
        {
            "format": "Keras float32",
            "file": "files/small.keras",
            "MB": 7.9,
            "validation": 91.0,
            "test": 90.0,
            "milliseconds": 1,
        },
        {"format": "LiteRT int8 weights", "file": "files/small.tflite", "MB": 1.5, "test": 88.8},
    ],
    "recommended": "files/small.tflite",
}
LEAVE = f"""import json
from pathlib import Path

result = json.loads({json.dumps(json.dumps(RESULT))})
result |= {{"preset": PRESET, "seed": SEED}}
result["final"]["test_accuracy"] += SEED
folder = Path(RUN_DIR, "{NAME}", f"{{PRESET}}-seed{{SEED}}")
(folder / "files").mkdir(parents=True, exist_ok=True)
(folder / "files" / "small.tflite").write_bytes(bytes(1_500_000))
(folder / "result.json").write_text(json.dumps(result))"""


def make(root, train=TRAIN):
    """Write the portfolio into `root`; `train` is the source of its middle cell. Returns the notebook's path."""
    folded = {"cellView": "form", "jupyter": {"source_hidden": True}}
    cells = [
        new_markdown_cell(TITLE, id="title"),
        new_code_cell(PARAMETERS, id="parameters", metadata={"tags": ["parameters"]}),
        new_markdown_cell("## 5 Training\n\n```\n# no heading\n```\n\n### The first network", id="training"),
        new_code_cell(train, id="train", metadata={"tags": ["shared"], **folded}),
        new_code_cell(CURVES, id="curves", metadata={"tags": ["figure"]}),
        new_markdown_cell(LAST, id="takeaways"),
        new_code_cell(LEAVE, id="result"),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path = root / f"{NAME}.ipynb"
    nbformat.write(new_notebook(cells=cells, metadata=kernel), path)
    for name, blocks in DOCUMENTS.items():
        (root / name).parent.mkdir(exist_ok=True)
        text = "".join(f"\n<!-- {block} -->\n<!-- /{block} -->\n" for block in blocks)
        (root / name).write_text("# Small\n" + text)
    (root / "results").mkdir(exist_ok=True)
    return path


def pretend_run(path, output, parameters, folder=".", screen=None, skip=None):
    """Do what `run.run` does for the tiny notebook, without a kernel: for tests of what comes after."""
    notebook = read(path)
    cells = code_cells(notebook)
    injected = new_code_cell("# Parameters\n", metadata={"tags": ["injected-parameters"]})
    notebook.cells.insert(2, injected)
    seed = parameters["SEED"]
    cells[1].outputs = [
        new_output("stream", name="stderr", text="a warning"),
        new_output("display_data", {"text/markdown": "", "text/plain": "<Markdown object>"}),
        new_output("stream", name="stdout", text=f"{0.9 + seed / 100:.2%}\n"),
    ]
    cells[2].outputs = [new_output("display_data", {"image/png": PNG})]
    for number, cell in enumerate(code_cells(notebook), 1):
        cell.execution_count = number
    write(notebook, output)
    made = folder / parameters["RUN_DIR"] / NAME / f"{parameters['PRESET']}-seed{seed}"
    (made / "files").mkdir(parents=True, exist_ok=True)
    result = RESULT | {"preset": parameters["PRESET"], "seed": seed}
    result["final"] = RESULT["final"] | {"test_accuracy": 90.0 + seed}
    (made / "result.json").write_text(json.dumps(result))
    (made / "files" / "small.tflite").write_bytes(bytes(1_500_000))
    return 0


def add_other(root, **changes):
    """Add a second notebook and its record, the first one's with other values in `final` and elsewhere."""
    notebook = read(root / f"{NAME}.ipynb")
    write(notebook, root / f"{OTHER}.ipynb")
    other = json.loads((root / "results" / f"{NAME}.json").read_text()) | {"notebook": OTHER, "claims": []}
    final = {key: changes.pop(key) for key in list(changes) if key in other["final"]}
    other["final"] |= final
    (root / "results" / f"{OTHER}.json").write_text(json.dumps(other | {"recommended": None} | changes))
