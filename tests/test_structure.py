"""Each notebook looks like the others, is finished, and says nothing about the machine it ran on."""

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
from notebooks import PENDING, code_cells, notebook_paths, read, tags
from refresh import load_record

SECTIONS = [
    "1 Setup",
    "2 Data",
    "3 Augmentation",
    "4 Model",
    "5 Training",
    "6 Curves",
    "7 Evaluation",
    "8 What it gets wrong",
    "9 Save and reload",
    "10 Takeaways",
]
PARAMETERS = ["PRESET", "SEED", "DATA_DIR", "DATA_NOTE", "RUN_DIR", "RETRAIN"]
BACKENDS = {"tensorflow", "jax", "torch"}
PROVIDED_BY = {"sklearn": "scikit-learn", "IPython": "jupyterlab"}


def prose(notebook):
    """Text of the Markdown cells without headings, tables, code, comments, formulas, and link targets."""
    text = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for pattern in (
        r"<!-- result -->.*?<!-- /result -->",
        r"<!--.*?-->",
        r"```.*?```",
        r"\$\$.*?\$\$",
        r"\$[^$\n]*\$",
    ):
        text = re.sub(pattern, " ", text, flags=re.DOTALL)
    text = re.sub(r"^(#|\|).*$", " ", text, flags=re.MULTILINE)
    return re.sub(r"\]\([^)]*\)", "]", text)


def top_level_imports(tree):
    """(package, line) of the imports that happen as soon as a cell runs."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0], node.lineno


def all_imports(tree):
    """Packages imported anywhere in a cell."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


def listed_packages():
    """Names in requirements.txt, in lower case."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return {re.split(r"[<>=!~\[; ]", line)[0].lower() for line in lines if line and not line.startswith("#")}


def test_there_is_a_notebook():
    assert notebook_paths()


def test_is_valid(notebook, notebook_path):
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook_path.stat().st_size < 1_000_000


def test_ids_are_unique_and_readable(notebook):
    ids = [cell.id for cell in notebook.cells]
    assert sorted(set(ids)) == sorted(ids)
    assert [cell_id for cell_id in ids if not re.fullmatch(r"[a-z][a-z0-9-]+", cell_id)] == []
    # An editor that invents an id writes eight hexadecimal digits.
    assert [cell_id for cell_id in ids if re.fullmatch(r"[0-9a-f]{8}", cell_id)] == []


def test_sections_in_order(notebook):
    headings = [
        line.removeprefix("## ")
        for cell in notebook.cells
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
        if line.startswith("## ")
    ]
    assert len(headings) == len(SECTIONS), headings
    assert [
        h for h, section in zip(headings, SECTIONS, strict=True) if not re.match(rf"{section}\b", h)
    ] == []


def test_title_cell(notebook):
    first = notebook.cells[0]
    assert (first.id, first.cell_type) == ("title", "markdown")
    assert first.source.startswith("# ")
    assert first.source.count("<!-- result -->") == first.source.count("<!-- /result -->") == 1


def test_parameters_cell(notebook):
    tagged = [cell for cell in code_cells(notebook) if "parameters" in tags(cell)]
    assert [cell.id for cell in tagged] == ["parameters"]
    names = [node.targets[0].id for node in ast.parse(tagged[0].source).body if isinstance(node, ast.Assign)]
    assert set(PARAMETERS) <= set(names)


def test_last_code_cell_writes_the_record(notebook):
    assert code_cells(notebook)[-1].id == "record"


def test_outputs_are_of_one_run_or_none(notebook, notebook_path):
    cells = code_cells(notebook)
    if load_record(notebook_path.stem) is None:
        assert [cell.id for cell in cells if cell.outputs or cell.execution_count is not None] == []
        assert PENDING in notebook.cells[0].source
    else:
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        assert notebooks.errors(notebook) == []


def test_nothing_left_of_papermill(notebook):
    assert "papermill" not in notebook.metadata
    assert [
        cell.id for cell in notebook.cells if "papermill" in cell.metadata or notebooks.is_injected(cell)
    ] == []


def test_no_paths_of_a_machine(notebook):
    assert notebooks.leaks(notebook, [ROOT]) == []
    assert [
        (cell.id, path) for cell in notebook.cells for path in notebooks.machine_paths(cell.source, [ROOT])
    ] == []


def test_code_cells_are_short(notebook):
    lengths = {cell.id: len(cell.source.splitlines()) for cell in code_cells(notebook)}
    assert {cell_id: n for cell_id, n in lengths.items() if n > 30 or n == 0} == {}
    assert median(lengths.values()) <= 8


def test_first_notebook_teaches_in_prose():
    words = re.findall(r"[A-Za-z][\w'’-]*", prose(read(ROOT / "1_CNN_Model.ipynb")))
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
        for package, _ in top_level_imports(ast.parse(cell.source))
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
    allowed = listed_packages()
    used = {package for cell in code_cells(notebook) for package in all_imports(ast.parse(cell.source))}
    unlisted = used - set(sys.stdlib_module_names) - (BACKENDS - {"tensorflow"})
    assert {
        package for package in unlisted if PROVIDED_BY.get(package, package).lower() not in allowed
    } == set()


def test_shared_cells_are_alike():
    loaded = {path: read(path) for path in notebook_paths()}
    different = [f"{path.name}: {cell.id}" for path, cell, *_ in sync_cells.differences(loaded)]
    assert different == [], "python tools/sync_cells.py makes them alike"


def test_measured_numbers_come_from_the_record(notebook):
    """A percentage with decimals in prose is a measurement, and those are printed by code or generated."""
    typed = [
        line for line in prose(notebook).splitlines() if re.search(r"\d\.\d+\s*%", line) and "](" not in line
    ]
    assert typed == []


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]], ids=["check", "format"])
def test_ruff(arguments):
    result = subprocess.run(
        [sys.executable, "-m", "ruff", *arguments, "."], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_ci_runs_the_readme_command():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = [
        block.strip() for block in re.findall(r"```sh\n(.*?)```", readme, re.DOTALL) if "pytest" in block
    ]
    assert len(commands) == 1
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert commands[0] in script
    assert "- run: .ci/run" in (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")


def test_top_level_holds_only_what_a_user_needs():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in listed.stdout.splitlines()}
    user = {"README.md", "LICENSE", "requirements.txt", "results", "tools", "tests"}
    user |= {"draft"}  # the next edition of the notebooks, until it is recorded
    assert {name for name in top - user if not name.startswith(".") and not name.endswith(".ipynb")} == set()


def test_figures_have_a_caption_nearby(notebook):
    """Prose at most two cells away says what to see."""
    kinds = [cell.cell_type for cell in notebook.cells]
    figures = [number for number, cell in enumerate(notebook.cells) if "figure" in tags(cell)]
    assert [notebook.cells[n].id for n in figures if "markdown" not in kinds[max(n - 2, 0) : n + 3]] == []
