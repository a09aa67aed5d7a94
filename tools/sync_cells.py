"""Carry shared cells from the first notebook that has them to all others.

    python tools/sync_cells.py            make every copy equal to the original
    python tools/sync_cells.py --check    only list the copies that differ; exit status 1 if there are any

A cell is shared if it is tagged `shared` in some notebook. Its original is in the lowest-numbered notebook that has
its id. Outputs stay as they are: a notebook whose code changed has to be recorded again (tools/record.py).
"""

import argparse
import copy
import sys

from notebooks import ROOT, notebook_paths, read, tags, write


def shared_ids(notebooks):
    """Ids of the cells tagged `shared` in any of the notebooks."""
    return {cell.id for notebook in notebooks.values() for cell in notebook.cells if "shared" in tags(cell)}


def originals(notebooks):
    """{cell id: (path, cell)} of the first cell of every shared id; `notebooks` is {path: notebook} in order."""
    found = {}
    ids = shared_ids(notebooks)
    for path, notebook in notebooks.items():
        for cell in notebook.cells:
            if cell.id in ids:
                found.setdefault(cell.id, (path, cell))
    return found


def differences(notebooks):
    """List of (path, cell, source path, source cell) of the cells that are not what their original is."""
    first = originals(notebooks)
    return [
        (path, cell, *first[cell.id])
        for path, notebook in notebooks.items()
        for cell in notebook.cells
        if cell.id in first and not alike(cell, first[cell.id][1])
    ]


def look(cell):
    """What else than its text is the same in all copies: tags (`shared` among them), and how it is folded."""
    metadata = {key: cell.metadata[key] for key in ("cellView", "jupyter") if key in cell.metadata}
    return metadata | {"tags": tags(cell) + ["shared"] * ("shared" not in tags(cell))}


def alike(cell, original):
    """Whether a shared cell is what its original is, and says that it is shared."""
    same = (cell.cell_type, cell.source, look(cell)) == (original.cell_type, original.source, look(original))
    return same and "shared" in tags(cell)


def carry(cell, original):
    """Make `cell` a copy of `original`, leaving its outputs alone."""
    if cell.cell_type != original.cell_type:
        raise SystemExit(
            f"{cell.id}: is {cell.cell_type} here and {original.cell_type} in the original; change one id"
        )
    cell.source = original.source
    for key in ("cellView", "jupyter"):
        cell.metadata.pop(key, None)
    cell.metadata.update(copy.deepcopy(look(original)))


def main(argv=None, root=ROOT):
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if a copy differs")
    check = parser.parse_args(argv).check
    notebooks = {path: read(path) for path in notebook_paths(root)}
    different = differences(notebooks)
    for path, cell, source_path, original in different:
        print(f"{path.name}: {cell.id} {'differs from' if check else 'taken from'} {source_path.name}")
        if not check:
            carry(cell, original)
    if check:
        return 1 if different else 0
    for path in {path: None for path, *_ in different}:
        write(notebooks[path], path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
