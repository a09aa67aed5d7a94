"""Write the numbers of results/*.json into README.md, its first figure, and the title cell of each notebook.

    python tools/refresh.py            write what is stale
    python tools/refresh.py --check    print the difference instead; exit status 1 if something is stale

Generated text stands between `<!-- name -->` and `<!-- /name -->`. results/<notebook>.json is the recorded run,
results/<notebook>-seed<k>.json are runs of the same code with other seeds: then accuracies are mean and deviation.
"""

import argparse
import difflib
import json
import re
import statistics
import sys
from pathlib import Path

import overview
from notebooks import PENDING, ROOT, TITLES, cell_by_id, notebook_paths, read, write, write_text

SAME_RUN = ("preset", "code_sha256", "data_official", "weights")


def load_record(name, root=ROOT):
    """The recorded run of a notebook, or None."""
    path = Path(root) / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def seed_records(name, record, root=ROOT):
    """({file name: record} of further seeds that can be averaged with `record`, [file names that can not])."""
    usable, left_out = {}, []
    for path in sorted((Path(root) / "results").glob(f"{name}-seed*.json")):
        other = json.loads(path.read_text(encoding="utf-8"))
        alike = record is not None and all(other[key] == record[key] for key in SAME_RUN)
        if alike and other["seed"] != record["seed"]:
            usable[path.name] = other
        else:
            left_out.append(path.name)
    return usable, left_out


def percent(fraction):
    """0.94213 -> '94.21'."""
    return f"{100 * fraction:.2f}"


def mean_percent(fractions):
    """Mean in percent, with the sample standard deviation if there is more than one value."""
    if len(fractions) == 1:
        return percent(fractions[0])
    return f"{percent(statistics.mean(fractions))} ± {percent(statistics.stdev(fractions))}"


def pflop(flops):
    """Floating-point operations -> PFLOP with two significant digits or three decimals."""
    value = flops / 1e15
    return f"{value:.3f}" if value >= 0.001 else f"{value:.2g}"


def duration(seconds):
    """Seconds -> '45 s', '12 min' or '1 h 5 min'."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def backend(record):
    """Name and version of Keras and its backend in one phrase."""
    versions = record["versions"]
    return f"Keras {versions['keras']}, {versions['backend']} {versions['backend_version']}"


def table(header, rows):
    """A Markdown table; `|` inside a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    escaped = [[str(value).replace("|", "\\|").replace("\n", " ") for value in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def result_row(name, root, notes):
    """Row of the results table; a footnote on unofficial data is added to the list `notes`."""
    if not (Path(root) / f"{name}.ipynb").exists():
        return [name, "in preparation", *[""] * 7]
    link, record = f"[{name}]({name}.ipynb)", load_record(name, root)
    if record is None:
        return [link, "recorded run pending", *[""] * 7]
    final = record["final"]
    runs = recorded_runs(root)[name]
    accuracies = [run["final"]["test_accuracy"] for run in runs]
    peaks = [run["peak_memory_bytes"] for run in runs if "peak_memory_bytes" in run]
    return [
        link,
        f"**{mean_percent(accuracies)}**{footnote(record, notes)}",
        len(accuracies),
        f"{final['parameters']:,}",
        pflop(final["training_flops"]),
        f"{duration(final['seconds'])} on {record['device']}, {record['precision']}",
        f"{max(peaks) / 1e9:.1f}" if peaks else "",
        record["weights"],
        backend(record),
    ]


def footnote(record, notes):
    """Mark of the footnote on the record's data, empty if they are the official files."""
    if record["data_official"]:
        return ""
    if record["data"] not in notes:
        notes.append(record["data"])
    return f" <sup>{notes.index(record['data']) + 1}</sup>"


def results_block(root):
    """Table of all notebooks with the final model of each, and the footnotes on their data."""
    header = ["Notebook", "Test accuracy, %", "Seeds", "Parameters", "Training, PFLOP", "Training time"]
    header += ["Peak memory, GB"]
    notes = []
    rows = [result_row(name, root, notes) for name in TITLES]
    text = table([*header, "Weights to start from", "Software"], rows)
    return "\n\n".join([text, *(f"<sup>{i}</sup> {note}" for i, note in enumerate(notes, 1))])


def recorded_runs(root):
    """{notebook: its records, the published one first, then other seeds of it} of all notebooks that have one."""
    published = {name: load_record(name, root) for name in TITLES}
    return {
        name: [record, *seed_records(name, record, root)[0].values()]
        for name, record in published.items()
        if record is not None
    }


def reproduce_block(root):
    """The command for each line of the results table."""
    lines = []
    for name, records in recorded_runs(root).items():
        for record in records:
            line = f".venv/bin/python tools/record.py {name}.ipynb --preset {record['preset']}"
            line += f" --seed {record['seed']}" if record["seed"] else ""
            file = re.match(r"file (\S+)", record["weights"])
            lines.append(line + (f" --weights {file[1]}" if file else ""))
    return "\n".join(["```sh", *lines, "```"]) if lines else PENDING


def claims_block(root):
    """Table of what the notebooks claim, how they tried it, and what came out."""
    rows = []
    for name in TITLES:
        record = load_record(name, root)
        for claim in record["claims"] if record else []:
            rows.append([f"[{name}]({name}.ipynb)", claim["claim"], claim["experiment"], claim["outcome"]])
    return table(["Notebook", "Claim", "Experiment", "Outcome"], rows) if rows else PENDING


def stages_block(root, name="1_CNN_Model"):
    """Table of the stages of one notebook."""
    record = load_record(name, root)
    if record is None:
        return PENDING
    header = [
        "Stage",
        "Epochs",
        "Best epoch",
        "Parameters",
        "Training, PFLOP",
        "Training time",
        "Training accuracy, %",
    ]
    rows = [stage_row(stage) for stage in record["stages"]]
    return table([*header, "Validation accuracy, %", "Gap, points", "Test accuracy, %"], rows)


def stage_row(stage):
    """Row of the stages table."""
    return [
        stage["title"],
        stage["epochs"],
        stage["best_epoch"],
        f"{stage['parameters']:,}",
        pflop(stage["training_flops"]),
        duration(stage["seconds"]),
        percent(stage["train_accuracy"]),
        percent(stage["validation_accuracy"]),
        percent(stage["gap"]),
        percent(stage["test_accuracy"]),
    ]


def result_block(name, root):
    """What the title cell of a notebook says about its recorded run."""
    record = load_record(name, root)
    if record is None:
        return PENDING
    final = record["final"]
    title = next(
        (stage["title"] for stage in record["stages"] if stage["name"] == final["stage"]), final["stage"]
    )
    lines = [
        f"**Recorded run** (preset `{record['preset']}`, seed {record['seed']}, {record['date']}): "
        f"test accuracy **{percent(final['test_accuracy'])} %**, "
        f"validation accuracy {percent(final['validation_accuracy'])} %.\n",
        f"- Model: {title}; {final['parameters']:,} parameters; weights to start from: {record['weights']}.",
        f"- Cost: {pflop(final['training_flops'])} PFLOP of training, {duration(final['seconds'])} on "
        f"{record['device']}, {record['precision']}; all stages together {duration(record['seconds'])}.",
        f"- Software: {backend(record)}, Python {record['versions']['python']}.",
        f"- Data: {record['data']}",
    ]
    return "\n".join(lines)


def replace_block(text, name, body, optional=False):
    """`text` with `body` between the marks of block `name`."""
    pattern = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
    if not pattern.search(text):
        if optional:
            return text
        raise SystemExit(f"The block <!-- {name} --> ... <!-- /{name} --> is missing.")
    return pattern.sub(lambda _: f"<!-- {name} -->\n\n{body}\n\n<!-- /{name} -->", text, count=1)


def fresh_readme(root):
    """README with its blocks made anew."""
    text = (Path(root) / "README.md").read_text(encoding="utf-8")
    text = replace_block(text, "results", results_block(root))
    text = replace_block(text, "claims", claims_block(root))
    text = replace_block(text, "reproduce", reproduce_block(root), optional=True)
    return replace_block(text, "stages", stages_block(root), optional=True)


def fresh_title(path, root):
    """(notebook, its title cell, what the title cell should say)."""
    notebook = read(path)
    cell = cell_by_id(notebook, "title")
    if cell is None:
        raise SystemExit(f"{path.name} has no cell of id `title`.")
    return notebook, cell, replace_block(cell.source, "result", result_block(path.stem, root))


def print_difference(name, old, new):
    """Print what would change."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), name, f"{name} (fresh)", lineterm="")
    print("\n".join(lines))


def refresh(root=ROOT, check=False):
    """Make everything fresh (or, with `check`, only print what is not); returns the names of what was stale."""
    stale = []
    readme = Path(root) / "README.md"
    old, new = readme.read_text(encoding="utf-8"), fresh_readme(root)
    if old != new:
        stale.append(readme.name)
        print_difference(readme.name, old, new) if check else write_text(readme, new)
    shown = overview.points(recorded_runs(root))
    if shown and overview.drawn(root) != shown:
        stale.append(overview.FILE.as_posix())
        print(f"{overview.FILE.as_posix()} shows other results") if check else overview.draw(shown, root)
    for path in notebook_paths(root):
        notebook, cell, source = fresh_title(path, root)
        if cell.source != source:
            stale.append(path.name)
            if check:
                print_difference(path.name, cell.source, source)
            else:
                cell.source = source
                write(notebook, path)
    return stale


def report_left_out(root=ROOT):
    """Print which results of further seeds were not averaged, and return their names."""
    names = [name for title in TITLES for name in seed_records(title, load_record(title, root), root)[1]]
    for name in names:
        print(
            f"results/{name} is left out: it is not another seed of the recorded code, preset, data and weights."
        )
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
