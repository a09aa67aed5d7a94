"""Each notebook looks like the others, is short where it does not teach, and says nothing about its machine."""

import ast
import re
import subprocess
import sys
from statistics import median

import nbformat
import notebooks
import pytest
import sync_cells
from conftest import ROOT
from notebooks import PENDING, cell_namespace, code_cells, notebook_paths, parameter_names, read, tags
from records import load_record

SECTIONS = [
    "1 Setup",
    "2 Data",
    "3 Augmentation",
    "4 Model",
    "5 Training",
    "6 Curves",
    "7 Evaluation",
    "8 What it gets wrong",
    "9 Save and use it",
    "10 Takeaways",
]
PARAMETERS = ["PRESET", "SEED", "DATA_DIR", "RUN_DIR", "RETRAIN"]
BACKENDS = {"tensorflow", "jax", "torch"}
PROVIDED_BY = {"sklearn": "scikit-learn", "IPython": "jupyterlab", "PIL": "pillow", "google": "Google Colab"}
OPTIONAL = ["tools/requirements-export.txt"]
# The most lines of code in all, by the notebook's number, and in open cells.
LINES = {"1": 800, "2": 900, "3": 900, "4": 900, "5": 950}
OPEN_LINES = {"1": 560, "2": 660, "3": 660, "4": 660, "5": 660}
RESUME = {"backup", "settings", "restore", "train-stage"}  # the cells of exact resume
TRAINING = {"fit", "train_stage", "run_arms"}
GENERATED = r"<!-- (result|small-print|\w+) -->.*?<!-- /\1 -->"
MOST_WORDS = 35


def length(cell):
    """Lines of a cell."""
    return len(cell.source.splitlines())


def is_folded(cell):
    """Whether a cell is folded away in Colab or JupyterLab."""
    hidden = cell.metadata.get("jupyter", {}).get("source_hidden", False)
    return hidden or cell.metadata.get("cellView") == "form"


def prose(text):
    """Markdown without generated parts, headings, tables, code, comments, formulas, and link targets."""
    for pattern in (GENERATED, r"<!--.*?-->", r"^```.*?^```", r"\$\$.*?\$\$", r"\$[^$\n]*\$", r"`[^`\n]*`"):
        text = re.sub(pattern, " ", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^(#|\|).*$", "", text, flags=re.MULTILINE)
    return re.sub(r"\]\([^)]*\)|https?://\S+", "]", text)


def notebook_prose(notebook):
    """Prose of all Markdown cells."""
    return prose("\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown"))


def sentences(text):
    """Sentences of a prose text; a paragraph or an item of a list ends one, too."""
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.)\s)", text):
        yield from re.split(r"(?<=[.!?])[)*”\"]*\s+", " ".join(paragraph.split()))


def long_sentences(text):
    """The sentences that have too many words."""
    return [
        sentence for sentence in sentences(text) if len(re.findall(r"\w[\w'’.,-]*", sentence)) > MOST_WORDS
    ]


def top_level_imports(tree):
    """Packages whose import happens as soon as a cell runs."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


def all_imports(tree):
    """Packages imported anywhere in a cell."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


def calls(nodes):
    """Names of the functions and methods that are called in these pieces of code."""
    found = {node.func for tree in nodes for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return {getattr(function, "id", getattr(function, "attr", "")) for function in found}


def first_training(cells):
    """Number of code cells before the first that trains, itself or in a function that was defined before."""
    training = set(TRAINING)
    for number, cell in enumerate(cells):
        definitions, rest = [], []
        for node in ast.parse(cell.source).body:
            (definitions if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else rest).append(node)
        training |= {node.name for node in definitions if calls([node]) & training}
        if calls(rest) & training:
            return number
    return len(cells)


def runs_of_code(notebook):
    """[code cells] of every run of code cells without prose between them."""
    runs = [[]]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            runs[-1].append(cell)
        elif runs[-1]:
            runs.append([])
    return runs


def listed_packages():
    """Names in requirements.txt and in the optional one, in lower case."""
    lines = [
        line
        for name in ("requirements.txt", *OPTIONAL)
        for line in (ROOT / name).read_text("utf-8").splitlines()
    ]
    names = {re.split(r"[<>=!~\[; ]", line)[0].lower() for line in lines if line and not line.startswith("#")}
    return names | {name.replace("-", "_") for name in names}


def test_the_first_training_is_found_in_functions_as_well():
    sources = [
        "def train(x):\n    model.fit(x)",
        "def probe():\n    return train(1)",
        "print('fit')",
        "probe()",
    ]
    assert first_training([nbformat.v4.new_code_cell(source) for source in sources]) == 3


def test_sentences_are_told_apart():
    text = (
        "# A heading\n\n"
        + "word " * 35
        + "end. Short.\n\n- "
        + "item " * 35
        + "\n- "
        + "item " * 36
        + "\n\n`"
        + "x " * 40
        + "`"
    )
    assert [len(sentence.split()) for sentence in long_sentences(prose(text))] == [36, 37]


def test_there_is_a_notebook():
    assert notebook_paths()


def test_is_valid(notebook, notebook_path):
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook_path.stat().st_size <= 1_000_000


def test_ids_are_unique_and_readable(notebook):
    ids = [cell.id for cell in notebook.cells]
    assert sorted(set(ids)) == sorted(ids)
    assert [cell_id for cell_id in ids if not re.fullmatch(r"[a-z][a-z0-9-]+", cell_id)] == []
    # An editor that invents an id writes eight hexadecimal digits.
    assert [cell_id for cell_id in ids if re.fullmatch(r"[0-9a-f]{8}", cell_id)] == []


def test_sections_in_order(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert len(headings) == len(SECTIONS), headings
    pairs = zip(headings, SECTIONS, strict=True)
    assert [heading for heading, section in pairs if not re.match(rf"{section}\b", heading)] == []


def test_generated_texts_have_their_places(notebook):
    texts = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    assert (notebook.cells[0].id, notebook.cells[0].cell_type) == ("title", "markdown")
    assert notebook.cells[0].source.startswith("# ")
    for block, cell in (("result", texts[0]), ("small-print", texts[-1])):
        assert cell.source.count(f"<!-- {block} -->") == cell.source.count(f"<!-- /{block} -->") == 1


def test_parameters_cell(notebook, notebook_path):
    assert [cell.id for cell in code_cells(notebook) if "parameters" in tags(cell)] == ["parameters"]
    wanted = PARAMETERS + ["WEIGHTS"] * (notebook_path.stem[0] != "1")
    assert set(parameter_names(notebook)) == set(wanted)


def test_last_code_cell_writes_the_result(notebook):
    last = code_cells(notebook)[-1]
    assert "result.json" in last.source and length(last) <= 15


def test_lines_of_code(notebook, notebook_path):
    cells, number = code_cells(notebook), notebook_path.stem[0]
    folded = sum(length(cell) for cell in cells if is_folded(cell))
    total = sum(length(cell) for cell in cells)
    assert len(cells) <= 95
    assert total <= LINES[number]
    assert total - folded <= OPEN_LINES[number]
    assert folded <= 300
    assert RESUME <= {cell.id for cell in cells}
    assert sum(length(cell) for cell in cells if cell.id in RESUME) <= 140


def test_cells_are_short(notebook):
    cells = code_cells(notebook)
    most = {cell.id: length(cell) for cell in cells if length(cell) > (60 if is_folded(cell) else 30)}
    assert most == {}
    assert [cell.id for cell in cells if length(cell) == 0] == []
    assert median(length(cell) for cell in cells if not is_folded(cell)) <= 8


def test_pictures_and_training_come_early(notebook):
    cells = code_cells(notebook)
    pictures = [number for number, cell in enumerate(cells) if "figure" in tags(cell)]
    assert pictures[0] <= 8
    assert first_training(cells) <= 28


def test_prose_interrupts_the_code(notebook):
    """80 lines at most without prose, and where it is more than a folded cell may have, it is mostly folded."""
    long = {}
    for run in runs_of_code(notebook):
        total = sum(map(length, run))
        unfolded = sum(length(cell) for cell in run if not is_folded(cell))
        if total > 80 or (total > 60 and unfolded > 30):
            long[run[0].id] = (total, unfolded)
    assert long == {}


def test_folded_cells_say_what_they_give(notebook):
    folded = [cell for cell in code_cells(notebook) if is_folded(cell)]
    assert [cell.id for cell in folded if not cell.source.startswith("# @title ")] == []
    half = [
        cell.id
        for cell in folded
        if cell.metadata.get("cellView") != "form"
        or not cell.metadata.get("jupyter", {}).get("source_hidden")
    ]
    assert half == []


def test_outputs_are_of_one_run_or_none(notebook, notebook_path):
    cells = code_cells(notebook)
    if load_record(notebook_path.stem) is None:
        assert [cell.id for cell in cells if cell.outputs or cell.execution_count is not None] == []
        assert PENDING in notebook.cells[0].source
    else:
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        assert notebooks.errors(notebook) == []
        assert [cell.id for cell in cells if cell.outputs != notebooks.lasting_outputs(cell)] == []


def test_nothing_left_of_papermill(notebook):
    assert "papermill" not in notebook.metadata
    left = [cell.id for cell in notebook.cells if "papermill" in cell.metadata or notebooks.is_injected(cell)]
    assert left == []


def test_no_paths_or_hosts_of_a_machine(notebook):
    assert notebooks.leaks(notebook, [ROOT]) == []
    named = [
        (cell.id, found)
        for cell in notebook.cells
        for found in notebooks.machine_paths(cell.source, [ROOT]) + notebooks.hosts(cell.source)
    ]
    assert [(cell_id, found) for cell_id, found in named if found != "/proc/cpuinfo"] == []


def test_sentences_are_short(notebook):
    assert long_sentences(notebook_prose(notebook)) == []


@pytest.mark.parametrize("name", ["README.md", "tools/README.md"])
def test_sentences_of_the_texts_are_short(name):
    assert long_sentences(prose((ROOT / name).read_text(encoding="utf-8"))) == []


def test_first_notebook_teaches_in_prose():
    words = re.findall(r"[A-Za-z][\w'’-]*", notebook_prose(read(ROOT / "1_CNN_Model.ipynb")))
    assert len(words) >= 1200


def test_definitions_have_docstrings(notebook):
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    missing = [
        f"{cell.id}: {node.name}"
        for cell in code_cells(notebook)
        for node in ast.parse(cell.source).body
        if isinstance(node, definitions) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert missing == []


def test_backends_are_imported_only_where_they_are_used(notebook):
    eager = [
        f"{cell.id}: {package}"
        for cell in code_cells(notebook)
        for package in top_level_imports(ast.parse(cell.source))
        if package in BACKENDS
    ]
    assert eager == []
    guards = [
        (cell.id, node)
        for cell in code_cells(notebook)
        for node in ast.parse(cell.source).body
        if isinstance(node, ast.If) and BACKENDS & set(all_imports(node))
    ]
    assert [cell_id for cell_id, node in guards if "backend" not in ast.unparse(node.test)] == []


def test_imports_are_in_the_requirements(notebook):
    used = {package for cell in code_cells(notebook) for package in all_imports(ast.parse(cell.source))}
    unlisted = used - set(sys.stdlib_module_names) - (BACKENDS - {"tensorflow"})
    allowed = listed_packages() | {"google colab"}
    assert {name for name in unlisted if PROVIDED_BY.get(name, name).lower() not in allowed} == set()


def test_shared_cells_are_alike():
    loaded = {path: read(path) for path in notebook_paths()}
    different = [f"{path.name}: {cell.id}" for path, cell, *_ in sync_cells.differences(loaded)]
    assert different == [], "python tools/sync_cells.py makes them alike"


def test_measured_numbers_come_from_the_record(notebook):
    """A percentage with decimals is a measurement: printed by code, generated, or from a source that is linked."""
    typed = [text for text in sentences(notebook_prose(notebook)) if re.search(r"\d\.\d+\s*%", text)]
    assert [text for text in typed if "]" not in text] == []


def test_figures_have_a_caption_nearby(notebook):
    """Prose at most two cells away says what to see."""
    kinds = [cell.cell_type for cell in notebook.cells]
    figures = [number for number, cell in enumerate(notebook.cells) if "figure" in tags(cell)]
    assert [notebook.cells[n].id for n in figures if "markdown" not in kinds[max(n - 2, 0) : n + 3]] == []


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]], ids=["check", "format"])
def test_ruff(arguments):
    command = [sys.executable, "-m", "ruff", *arguments, "."]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_two_devices_can_share_every_batch(notebook_path):
    """Else the set-up cell leaves the second one idle."""
    presets = cell_namespace(notebook_path, "presets")["PRESETS"].values()
    assert [size for preset in presets for key, size in preset.items() if "batch" in key and size % 2] == []


def test_ci_runs_the_readme_command():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", readme, re.DOTALL)
    commands = [block.strip() for block in blocks if "pytest" in block]
    assert len(commands) == 1
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert commands[0] in script
    assert "- run: .ci/run" in (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")


def test_links_to_sections_lead_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\((\w+)\.ipynb#([^)]+)\)", text)
    assert links
    anchors = [section.replace(" ", "-") for section in SECTIONS]
    assert [link for link in links if link[0] not in notebooks.TITLES or link[1] not in anchors] == []


def test_top_level_holds_only_what_a_user_needs():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in listed.stdout.splitlines()}
    user = {"README.md", "LICENSE", "requirements.txt", "results", "tools", "tests", *OPTIONAL}
    assert {name for name in top - user if not name.startswith(".") and not name.endswith(".ipynb")} == set()


def test_maintained_files_are_short():
    files = [*(ROOT / "tools").glob("*.py"), *(ROOT / "tests").glob("*.py")]
    assert {file.name for file in files if len(file.read_text("utf-8").splitlines()) > 400} == set()
