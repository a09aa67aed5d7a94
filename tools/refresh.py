"""Write the numbers of results/*.json into README.md, its first figure, and the first and last text of each notebook.

    python tools/refresh.py            write what is stale
    python tools/refresh.py --check    print the difference instead; exit status 1 if something is stale

Generated text stands between `<!-- name -->` and `<!-- /name -->`.
"""

import argparse
import difflib
import re
import sys
from pathlib import Path

import overview
import tables
from notebooks import PENDING, ROOT, TITLES, notebook_paths, read, write, write_text
from records import load_record, recorded_runs, seed_records

DOCUMENTS = {
    "README.md": {
        "figure": tables.figure,
        "results": tables.results,
        "metrics": tables.metrics,
        "insights": tables.insights,
        "files": tables.files,
    },
    "tools/README.md": {"reproduce": tables.reproduce},
}


def replace_block(text, name, body):
    """`text` with `body` between the marks of block `name`."""
    pattern = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"The block <!-- {name} --> ... <!-- /{name} --> is missing.")
    return pattern.sub(lambda _: f"<!-- {name} -->\n\n{body}\n\n<!-- /{name} -->", text, count=1)


def fresh_document(path, blocks, root):
    """Text of a Markdown file with its blocks, {name: function of root}, made anew."""
    text = path.read_text(encoding="utf-8")
    for name, make in blocks.items():
        text = replace_block(text, name, make(root))
    return text


def generated_cells(notebook):
    """[(block, its cell, function that makes it from the records)]: the title, and the last Markdown cell."""
    texts = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    return [("result", texts[0], tables.result_sentence), ("small-print", texts[-1], tables.small_print)]


def print_difference(name, old, new):
    """Print what would change."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), name, f"{name} (fresh)", lineterm="")
    print("\n".join(lines))


def refresh_documents(root, check):
    """Refresh README.md and the like; returns the names of what was stale."""
    stale = []
    for name, blocks in DOCUMENTS.items():
        path = Path(root) / name
        if not path.exists():
            continue
        old, new = path.read_text(encoding="utf-8"), fresh_document(path, blocks, root)
        if old != new:
            stale.append(name)
            print_difference(name, old, new) if check else write_text(path, new)
    return stale


def refresh_figure(root, check):
    """Draw README's first figure if its points are others now; returns the names of what was stale."""
    shown, name = overview.points(recorded_runs(root)), overview.FILE.as_posix()
    if not shown or overview.drawn(root) == shown:
        return []
    print(f"{name} shows other results") if check else overview.draw(shown, root)
    return [name]


def refresh_notebook(path, runs, check):
    """Refresh the generated texts of one notebook; returns whether they were stale."""
    notebook, stale = read(path), False
    for block, cell, make in generated_cells(notebook):
        old, new = cell.source, replace_block(cell.source, block, make(runs) if runs else PENDING)
        stale = stale or old != new
        if old != new and check:
            print_difference(path.name, old, new)
        cell.source = new
    if stale and not check:
        write(notebook, path)
    return stale


def refresh(root=ROOT, check=False):
    """Make everything fresh (or, with `check`, only print what is not); returns the names of what was stale."""
    stale = refresh_documents(root, check) + refresh_figure(root, check)
    runs = recorded_runs(root)
    return stale + [
        path.name for path in notebook_paths(root) if refresh_notebook(path, runs.get(path.stem), check)
    ]


def report_left_out(root=ROOT):
    """Print which results of further seeds were not averaged, and return their names."""
    names = [name for title in TITLES for name in seed_records(title, load_record(title, root), root)[1]]
    for name in names:
        print(f"results/{name} is left out: not another seed of the recorded code, preset, data and weights.")
    return names


def main(argv=None, root=ROOT):
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if something is stale")
    check = parser.parse_args(argv).check
    stale = refresh(root, check)
    left_out = report_left_out(root)
    for name in stale:
        print(f"{name}: {'stale; run python tools/refresh.py' if check else 'refreshed'}")
    return 1 if check and (stale or left_out) else 0


if __name__ == "__main__":
    sys.exit(main())
