"""Run a notebook on the real data and publish what came out: outputs, record, figures, model file, README's tables.

    python tools/record.py 1_CNN_Model.ipynb                          preset full, seed 0: the published run
    python tools/record.py 1_CNN_Model.ipynb --seed 1                 a further seed: only results/<name>-seed1.json,
                                                                      without the cells tagged `experiment`
    python tools/record.py 2_MobileNetV2.ipynb --preset quick --weights FILE --weights-note "what the file is"
    python tools/record.py 1_CNN_Model.ipynb --preset smoke --no-publish   only say accuracy and peak memory

The notebook leaves what a reader saw in result.json; this adds what only a maintainer needs. Nothing committed
changes unless the whole notebook ran. What ran before an interruption or an error stays in the run folder, and
the same command goes on where training stopped.
"""

import argparse
import base64
import io
import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

import nbformat
import refresh
from adopt import read_state
from notebooks import (
    ROOT,
    cell_by_id,
    code_cells,
    code_digest,
    errors,
    hosts,
    is_injected,
    lasting_outputs,
    leaks,
    machine_paths,
    output_images,
    parameter_names,
    read,
    tags,
    write,
    write_json,
)
from origins import identify_data, identify_weights
from PIL import Image
from run import run, value

RESULT_KEYS = set(
    "notebook preset seed backend device precision image_size stages experiments claims final formats "
    "recommended".split()
)
FINAL_KEYS = set(
    "title validation_accuracy test_accuracy margin views parameters training_flops seconds".split()
)
MOST_BYTES = 1_000_000
EXPERIMENT = "experiment"  # the tag of cells whose results only the published run needs


def arguments(argv):
    """Parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebook", help="file or name of the notebook, e.g. 1_CNN_Model.ipynb")
    parser.add_argument("--preset", choices=["smoke", "quick", "full"], default="full")
    parser.add_argument(
        "--seed", type=int, default=0, help="0: the published run; another: a further seed of it"
    )
    parser.add_argument("--data-dir", help="the notebook's DATA_DIR; default: Keras downloads")
    parser.add_argument("--data-note", default="", help="what the data are, if not the official files")
    parser.add_argument("--weights", help="the notebook's WEIGHTS: imagenet, none or a file")
    parser.add_argument("--weights-note", default="", help="what a file of weights is")
    parser.add_argument(
        "--run-dir", default="runs", help="the notebook's RUN_DIR (relative: in the repository)"
    )
    parser.add_argument("--no-publish", action="store_true", help="run it, say what came out, change nothing")
    return parser.parse_args(argv)


def notebook_parameters(args):
    """Parameters to inject into the notebook; a path that exists is made absolute."""
    parameters = {"PRESET": args.preset, "SEED": args.seed, "RUN_DIR": args.run_dir}
    for name, text in (("DATA_DIR", args.data_dir), ("WEIGHTS", args.weights)):
        if text is not None:
            path = Path(text).expanduser()
            parameters[name] = str(path.resolve()) if path.exists() else value(text)
    return parameters


def initial_weights(notebook, parameters):
    """The WEIGHTS that a run starts from, "scratch" in a notebook without that parameter."""
    if "WEIGHTS" not in parameter_names(notebook):
        return "scratch"
    namespace = {}
    exec(cell_by_id(notebook, "parameters").source, namespace)
    return parameters.get("WEIGHTS", namespace["WEIGHTS"])


def device_name(kind):
    """Name of the device of a kind, "cpu", "gpu" or "tpu", on this machine."""
    if kind == "cpu":
        return f"{os.cpu_count()} CPU cores"
    if kind == "gpu" and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.check_output(query, text=True).splitlines()[0]
    return kind.upper()


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


def taken_over(folder, runs):
    """States of the backups of each of these trainings that tools/adopt.py took over, a list for each training."""
    backups = [sorted((folder / run["name"]).rglob("epoch-*.keras")) for run in runs]
    return [[state for state in map(read_state, paths) if "trained_on" in state] for paths in backups]


def adopted(folder, stages):
    """Where stages of the model were trained that tools/adopt.py took over; if it was all of them, the seconds too."""
    states = [found[-1] for found in taken_over(folder, stages) if found]
    if not states:
        return {}
    place = states[-1]["trained_on"]
    if len(states) < len(stages):
        return {"trained_on": f"{place} ({len(states)} of {len(stages)} stages)"}
    return {"trained_on": place, "training_seconds": sum(state["seconds"] for state in states)}


def adopted_experiments(folder, experiments):
    """Where trainings of the experiments, {name: {arm: runs}}, were trained that tools/adopt.py took over."""
    repeated = [runs for arms in experiments.values() for runs in arms.values()]
    runs = {run["name"]: run for runs in repeated for run in runs}  # two arms may share a training
    found = [states for states in taken_over(folder, runs.values()) if states]
    if not found:
        return {}
    place = found[-1][-1]["trained_on"]
    return {"experiments_trained_on": f"{place} ({len(found)} of {len(runs)} trainings)"}


def make_record(result, notebook, parameters, args, peak, folder):
    """The record of a run in `folder`: what the notebook left, and what it was made with."""
    weights = initial_weights(notebook, parameters)
    record = {
        **result,
        **identify_data(parameters.get("DATA_DIR"), args.data_note),
        **identify_weights(result["notebook"], weights, args.weights_note, result["image_size"]),
        "device_name": device_name(result["device"]),
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("keras", result["backend"], "numpy")},
        "code_sha256": code_digest(notebook),
        **adopted(folder, result["stages"]),
        **adopted_experiments(folder, result["experiments"]),
    }
    return record | ({"peak_memory_bytes": peak} if peak else {})


def compressed(png):
    """The same picture, a PNG in base64, in fewer bytes: packed harder, its alpha channel dropped if all is opaque."""
    picture, smaller = Image.open(io.BytesIO(base64.b64decode(png))), io.BytesIO()
    if picture.mode == "RGBA" and picture.getchannel("A").getextrema() == (255, 255):
        picture = picture.convert("RGB")
    picture.save(smaller, "png", optimize=True)
    return base64.b64encode(smaller.getvalue()).decode()


def with_outputs(committed, executed, skip=None):
    """`committed` with the outputs of `executed`, numbered 1 to n; nothing else of papermill's additions.

    Pictures are packed. Cells tagged `skip` were not executed.
    """
    ran = [cell for cell in code_cells(executed) if not is_injected(cell)]
    cells = code_cells(committed)
    if [(cell.id, cell.source) for cell in ran] != [(cell.id, cell.source) for cell in cells]:
        raise SystemExit("The notebook was edited while it ran: run it again.")
    counts = [cell.execution_count for cell in code_cells(executed) if skip not in tags(cell)]
    if counts != list(range(1, len(counts) + 1)):
        raise SystemExit("The cells were not executed once each, in order: run it again.")
    for number, (cell, other) in enumerate(zip(cells, ran, strict=True), 1):
        cell.outputs, cell.execution_count = lasting_outputs(other), number
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number
            if png := output.get("data", {}).get("image/png"):
                output.data["image/png"] = compressed(png)
    return committed


def check_result(result, args, name, folder):
    """Stop if what the notebook left in `folder` is not of this run, or lacks something."""
    missing = (RESULT_KEYS - result.keys()) | (FINAL_KEYS - result.get("final", {}).keys())
    if missing:
        raise SystemExit(f"result.json lacks {', '.join(sorted(missing))}.")
    if (result["notebook"], result["preset"], result["seed"]) != (name, args.preset, args.seed):
        raise SystemExit("result.json is of another notebook, preset or seed.")
    if result["recommended"] and not (folder / result["recommended"]).is_file():
        raise SystemExit(f"The recommended model file {result['recommended']} is not in {folder}.")


def check(notebook, record, folders):
    """Stop if outputs or record are not fit to be published; `folders` must not be named in them."""
    if found := errors(notebook):
        raise SystemExit("\n".join(f"Cell {cell_id} ended with {error}" for cell_id, error in found))
    text = json.dumps(record, ensure_ascii=False)
    found = leaks(notebook, folders) + [
        ("(the record)", p) for p in machine_paths(text, folders) + hosts(text)
    ]
    if found:
        raise SystemExit(
            "\n".join(f"Output of cell {where} names this machine: {what}" for where, what in found)
        )
    size = len(nbformat.writes(notebook).encode())
    if size > MOST_BYTES:
        raise SystemExit(f"The notebook with its outputs has {size:,} bytes; {MOST_BYTES:,} is the most.")


def figures(notebook):
    """{file name: PNG bytes} of the images of the cells tagged `figure`."""
    found = {}
    for cell in code_cells(notebook):
        if "figure" in tags(cell):
            for number, image in enumerate(output_images(cell), 1):
                found[f"{cell.id}{'' if number == 1 else f'-{number}'}.png"] = base64.b64decode(image)
    return found


def publish(path, notebook, record, model_file, root):
    """Write notebook, record, figures and model file (or None), and refresh what is made from them."""
    folder = root / "results" / path.stem
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, png in figures(notebook).items():
        (folder / name).write_bytes(png)
    if model_file:
        shutil.copyfile(model_file, folder / model_file.name)
    write_json(root / "results" / f"{path.stem}.json", record)
    write(notebook, path)
    refresh.refresh(root)


def main(argv=None, root=ROOT):
    """Run the command; returns the exit status."""
    args, root = arguments(argv), Path(root)
    path = root / f"{Path(args.notebook).stem}.ipynb"
    name = f"{args.preset}-seed{args.seed}"
    run_dir = root / Path(args.run_dir).expanduser()
    folder = run_dir / path.stem / name
    executed, parameters = run_dir / f"{path.stem}-{name}.ipynb", notebook_parameters(args)
    fresh = not folder.exists()
    skip = EXPERIMENT if args.seed else None
    left_out = {"experiments": {}} if skip else {}  # what those cells would define for the last cell
    status = run(path, executed, parameters | left_out, root, skip=skip)
    peak = note_peak_memory(run_dir / f"{path.stem}-{name}-peak-memory.json", fresh)
    if status:
        return status

    notebook = with_outputs(read(path), read(executed), skip)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    check_result(result, args, path.stem, folder)
    record = make_record(result, notebook, parameters, args, peak, folder)
    named = [
        parameters[key] for key in ("DATA_DIR", "WEIGHTS") if Path(str(parameters.get(key))).is_absolute()
    ]
    check(notebook, record, [root, Path.home(), *named])
    found = f"{path.stem}: test accuracy {record['final']['test_accuracy']:.2f} %"
    found += f", peak memory {peak / 1e9:.2f} GB" if peak else ""
    if args.no_publish:
        print(f"\n{found}; nothing is published.")
        return 0
    if args.seed == 0:
        small = result["recommended"] if args.preset == "full" else None
        publish(path, notebook, record, small and folder / small, root)
    else:
        write_json(root / "results" / f"{path.stem}-seed{args.seed}.json", record)
        refresh.refresh(root)
    refresh.report_left_out(root)
    print(f"\n{found}; published in results/.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
