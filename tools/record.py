"""Run a notebook on the real data and publish what came out: outputs, record, figures, and README's tables.

    python tools/record.py 1_CNN_Model.ipynb --preset gpu
    python tools/record.py 1_CNN_Model.ipynb --preset gpu --seed 1     a further seed: only results/<name>-seed1.json
    python tools/record.py 2_MobileNetV2.ipynb --preset cpu --weights FILE --weights-note "what the file is"
    python tools/record.py 1_CNN_Model.ipynb --preset cpu --no-publish  only say accuracy and peak memory

Nothing committed changes unless the whole notebook ran. After an interruption or an error the part that was executed
stays in RUN_DIR, and the same command goes on where training stopped.
"""

import argparse
import base64
import json
import logging
import sys
from pathlib import Path

import papermill
import refresh
from notebooks import (
    ROOT,
    code_cells,
    code_digest,
    errors,
    leaks,
    machine_paths,
    output_images,
    read,
    tags,
    write,
    write_json,
)


def arguments(argv):
    """Parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebook", help="file or name of the notebook, e.g. 1_CNN_Model.ipynb")
    parser.add_argument("--preset", choices=["smoke", "cpu", "gpu"], default="gpu")
    parser.add_argument(
        "--seed", type=int, default=0, help="0: the published run; another: a further seed of it"
    )
    parser.add_argument("--data-dir", help="folder that holds cifar-10-batches-py; default: download")
    parser.add_argument("--data-note", default="", help="footnote, if the data are not the official files")
    parser.add_argument(
        "--run-dir", default="runs", help="checkpoints and histories (relative: in the repository)"
    )
    parser.add_argument("--weights", help="the notebook's WEIGHTS, e.g. a file, where there is no internet")
    parser.add_argument("--weights-note", help="what that file is, if it is not Keras's own")
    parser.add_argument("--no-publish", action="store_true", help="run it, say what came out, change nothing")
    return parser.parse_args(argv)


def notebook_parameters(args):
    """Parameters to inject into the notebook."""
    parameters = {
        "PRESET": args.preset,
        "SEED": args.seed,
        "RUN_DIR": args.run_dir,
        "DATA_NOTE": args.data_note,
    }
    if args.data_dir:
        parameters["DATA_DIR"] = str(Path(args.data_dir).resolve())
    if args.weights:
        weights = Path(args.weights)
        parameters["WEIGHTS"] = str(weights.resolve()) if weights.exists() else args.weights
    if args.weights_note:
        parameters["WEIGHTS_NOTE"] = args.weights_note
    return parameters


def execute(path, executed, parameters, root):
    """Run the notebook at `path` with its log on the terminal, saving to `executed` after every cell."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    executed.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            str(path),
            str(executed),
            parameters=parameters,
            kernel_name="python3",
            cwd=str(root),
            log_output=True,
        )
    except (papermill.PapermillExecutionError, KeyboardInterrupt) as error:
        print(error, file=sys.stderr)
        raise SystemExit(
            f"{path.name} did not finish. What ran is in {executed}; the committed notebook is unchanged. "
            "The same command goes on where training stopped."
        ) from None


def peak_memory():
    """Peak resident memory, in bytes, of the largest process that this one started; None where it cannot be told."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit


def note_peak_memory(path, fresh):
    """Return the peak memory, in bytes, of a run over all its parts so far, kept in the file `path`.

    None for a run whose beginning was not measured; `fresh` says whether this part is the beginning.
    """
    peak = peak_memory()
    if peak is None or not (fresh or path.exists()):
        return None
    before = 0 if fresh else json.loads(path.read_text(encoding="utf-8"))
    write_json(path, max(peak, before))
    return max(peak, before)


def with_outputs(committed, executed):
    """`committed` with the outputs of `executed`, numbered 1 to n; nothing else of papermill's additions."""
    ran = {cell.id: cell for cell in executed.cells}
    for number, cell in enumerate(code_cells(committed), 1):
        other = ran.get(cell.id)
        if other is None or other.source != cell.source:
            raise SystemExit(f"Cell {cell.id} was edited while the notebook ran: run it again.")
        cell.outputs = other.outputs
        cell.execution_count = number
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number
    return committed


def check(notebook, record, folders):
    """Stop if outputs or record are not fit to be published."""
    if found := errors(notebook):
        raise SystemExit("\n".join(f"Cell {cell_id} ended with {error}" for cell_id, error in found))
    found = leaks(notebook, folders)
    found += [
        ("(the record)", path) for path in machine_paths(json.dumps(record, ensure_ascii=False), folders)
    ]
    if found:
        raise SystemExit(
            "\n".join(f"Output of cell {where} names a path of this machine: {p}" for where, p in found)
        )
    if record["code_sha256"] != code_digest(notebook):
        raise SystemExit("The record is of other code than the notebook's: were its last cells not run?")


def save_figures(notebook, folder):
    """Write the images of the cells tagged `figure` as <cell id>.png, and remove those of earlier runs."""
    for old in folder.glob("*.png"):
        old.unlink()
    for name, png in figures(notebook).items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png)


def figures(notebook):
    """{file name: PNG bytes} of the images of the cells tagged `figure`."""
    found = {}
    for cell in code_cells(notebook):
        if "figure" in tags(cell):
            for number, image in enumerate(output_images(cell), 1):
                found[f"{cell.id}{'' if number == 1 else f'-{number}'}.png"] = base64.b64decode(image)
    return found


def publish(path, notebook, record, root):
    """Write notebook, record and figures, and refresh what is made from them."""
    save_figures(notebook, root / "results" / path.stem)
    write_json(root / "results" / f"{path.stem}.json", record)
    write(notebook, path)
    refresh.refresh(root)


def main(argv=None, root=ROOT):
    """Run the command; returns the exit status."""
    args, root = arguments(argv), Path(root)
    path = root / f"{Path(args.notebook).stem}.ipynb"
    run = f"{args.preset}-seed{args.seed}"
    run_dir = root / args.run_dir
    executed = run_dir / f"{path.stem}-{run}.ipynb"
    fresh = not (run_dir / path.stem / run).exists()
    try:
        execute(path, executed, notebook_parameters(args), root)
    finally:
        peak = note_peak_memory(run_dir / f"{path.stem}-{run}-peak-memory.json", fresh)

    notebook = with_outputs(read(path), read(executed))
    record = json.loads((run_dir / path.stem / run / "record.json").read_text(encoding="utf-8"))
    if peak:
        record["peak_memory_bytes"] = peak
    check(notebook, record, [root, Path.home(), *([Path(args.data_dir).resolve()] if args.data_dir else [])])
    found = f"{path.stem}: test accuracy {refresh.percent(record['final']['test_accuracy'])} %"
    found += f", peak memory {peak / 1e9:.2f} GB" if peak else ""
    if args.no_publish:
        print(f"{found}; nothing is published.")
        return 0
    if args.seed == 0:
        publish(path, notebook, record, root)
    else:
        write_json(root / "results" / f"{path.stem}-seed{args.seed}.json", record)
        refresh.refresh(root)
    refresh.report_left_out(root)
    print(f"{found}; published in results/.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
