"""What the maintainers' tools and the tests share: finding, reading, digesting and writing notebooks."""

import ast
import hashlib
import json
import os
import platform
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
TITLES = {
    "1_CNN_Model": "A CNN from scratch",
    "2_MobileNetV2": "MobileNetV2",
    "3_DenseNet121": "DenseNet121",
    "4_EfficientNetB0": "EfficientNetB0",
    "5_EfficientNetV2B0": "EfficientNetV2B0",
}
PENDING = "*Recorded run pending.*"
TEXT_KINDS = {"text/plain", "text/markdown"}

# Places where files lie on somebody's machine. /content is left out: it is the same for everybody in Colab.
_FOLDERS = "home|root|Users|tmp|private|var|usr|opt|mnt|media|srv|scratch"
_MACHINE_PATH = re.compile(rf"(?<![\w.:/~])(?:/(?:{_FOLDERS})/[\w.+-]+|[A-Z]:\\+Users\\+\w+)")
_ADDRESS = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.])")


def notebook_paths(root=ROOT):
    """Paths of the notebooks that exist in `root`, in reading order."""
    candidates = [Path(root) / f"{name}.ipynb" for name in TITLES]
    return [path for path in candidates if path.exists()]


def read(path):
    """Notebook at `path`, as nbformat 4."""
    return nbformat.read(path, as_version=4)


def write(notebook, path):
    """Write `notebook` the way Jupyter does (so that diffs stay small), all of it or nothing."""
    text = nbformat.writes(notebook).rstrip("\n") + "\n"
    write_text(path, text)


def write_text(path, text):
    """Replace the file at `path` by `text` in one step, so that no interruption leaves half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", newline="\n")
    os.replace(part, path)


def write_json(path, value):
    """Write `value` as JSON, a line for each object or list that holds no other."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    text = re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda found: re.sub(r"\n\s*", " ", found[0]), text)
    write_text(path, text + "\n")


def tags(cell):
    """Tags of a cell, an empty list if it has none."""
    return cell.metadata.get("tags", [])


def code_cells(notebook):
    """Code cells of a notebook, in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def cell_by_id(notebook, cell_id):
    """The cell of that id, or None."""
    return next((cell for cell in notebook.cells if cell.id == cell_id), None)


def cell_namespace(notebook, *ids, **values):
    """Namespace after executing the cells of those ids, in that order, over `values`.

    `notebook` is a path or a notebook.
    """
    if isinstance(notebook, (str, Path)):
        notebook = read(notebook)
    namespace = {"__name__": "cells", **values}
    for cell_id in ids:
        cell = cell_by_id(notebook, cell_id)
        assert cell is not None, f"there is no cell of id {cell_id}"
        exec(compile(cell.source, f"<{cell_id}>", "exec"), namespace)
    return namespace


def is_injected(cell):
    """Whether papermill put this cell there to override parameters."""
    return "injected-parameters" in tags(cell) or cell.source.startswith("# Parameters")


def code_digest(notebook):
    """SHA-256 of the code that ran: all code cells in order, without those that hold parameters."""
    cells = [
        cell for cell in code_cells(notebook) if "parameters" not in tags(cell) and not is_injected(cell)
    ]
    return hashlib.sha256("\n\n".join(cell.source.rstrip() for cell in cells).encode()).hexdigest()


def parameter_names(notebook):
    """Names that the cell tagged `parameters` assigns, in order."""
    cell = next((cell for cell in code_cells(notebook) if "parameters" in tags(cell)), None)
    statements = ast.parse(cell.source).body if cell else []
    return [node.targets[0].id for node in statements if isinstance(node, ast.Assign)]


def lasting_outputs(cell):
    """Outputs of a code cell as they are published: without warnings (stderr) and emptied live lines, prints joined."""
    kept = []
    for output in cell.outputs:
        if output.get("name") == "stderr" or is_blank(output.get("data", {"": "not a display"})):
            continue
        if output.output_type == "stream" and kept and kept[-1].output_type == "stream":
            kept[-1] = nbformat.from_dict(kept[-1] | {"text": kept[-1].text + output.text})
        else:
            kept.append(output)
    return kept


def is_blank(data):
    """Whether a displayed object shows nothing."""
    shown = data.get("text/markdown", data.get("text/plain")) if data.keys() <= TEXT_KINDS else "an image"
    return not shown.strip()


def output_texts(cell):
    """Every text in the outputs of a code cell (streams, plain text, HTML, tracebacks), without images."""
    texts = []
    for output in cell.get("outputs", []):
        texts.append(output.get("text", ""))
        texts.extend(output.get("traceback", []))
        data = output.get("data", {})
        texts.extend(str(value) for kind, value in data.items() if not kind.startswith("image/"))
    return [text for text in texts if text]


def output_images(cell):
    """PNG outputs of a code cell, still base64."""
    images = [output.get("data", {}).get("image/png") for output in cell.get("outputs", [])]
    return [image for image in images if image]


def errors(notebook):
    """(cell id, error) of every error among the outputs."""
    return [
        (cell.id, f"{output.ename}: {output.evalue}")
        for cell in code_cells(notebook)
        for output in cell.outputs
        if output.output_type == "error"
    ]


def machine_paths(text, also=()):
    """Absolute paths of a particular machine in `text`; `also` names more folders to look for."""
    found = [match.group() for match in _MACHINE_PATH.finditer(text)]
    return found + [str(folder) for folder in also if len(str(folder)) > 1 and str(folder) in text]


def hosts(text):
    """Addresses and names of machines in `text`: IPv4 addresses, and the name of this one if it looks like a name."""
    found = [match for match in _ADDRESS.findall(text) if not match.startswith(("127.", "0.0."))]
    name = platform.node()
    return found + ([name] if re.search(r"[\d-]", name) and len(name) > 5 and name in text else [])


def leaks(notebook, also=()):
    """(cell id, path or host) of everything among the outputs that names a machine."""
    return [
        (cell.id, found)
        for cell in code_cells(notebook)
        for text in output_texts(cell)
        for found in machine_paths(text, also) + hosts(text)
    ]
