"""The generated parts of README and of the notebooks, as Markdown made from records."""

import statistics
from pathlib import Path

from notebooks import PENDING, TITLES
from records import accuracies, accuracy_text, duration, interval, percent, pflop, recorded_runs, software

GUESSING = 0.1  # accuracy of guessing one class of ten
MOST_SEEDS = 50  # more pairs than this are answers to the same images, not seeds


def table(header, rows):
    """A Markdown table; `|` inside a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    escaped = [[str(value).replace("|", "\\|").replace("\n", " ") for value in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def link(name, text=None):
    """Link to a notebook."""
    return f"[{text or TITLES[name]}]({name}.ipynb)"


def notes_of(record):
    """Footnotes that go with every number of a record: data, initial weights, software, and a small preset."""
    small = f"Preset `{record['preset']}`, a smaller run than `full`."
    notes = [f"Data: {record['data']}.", f"Initial weights: {record['weights']}.", f"{software(record)}."]
    return notes + ([] if record["preset"] == "full" else [small])


def numbered_notes(runs):
    """All different footnotes of the records, in the order in which the table needs them."""
    return list(dict.fromkeys(note for records in runs.values() for note in notes_of(records[0])))


def marks(record, notes):
    """Marks of a record's footnotes."""
    numbers = sorted(notes.index(note) + 1 for note in notes_of(record))
    return f"<sup>{', '.join(map(str, numbers))}</sup>"


def device(record):
    """Device and number format of a run."""
    return f"{record['device_name']}, {record['precision'].removeprefix('mixed_')}"


def trained_on(record):
    """Where the best model of a run was trained."""
    return record.get("trained_on", device(record))


def training_seconds(record):
    """Seconds that the best model of a run was trained."""
    return record.get("training_seconds", record["final"]["seconds"])


def result_row(name, runs, notes, root):
    """Row of the results table."""
    if not (Path(root) / f"{name}.ipynb").exists():
        return [name, "in preparation", *[""] * 4]
    label = link(name, f"{name[0]} {TITLES[name]}")
    if name not in runs:
        return [label, "recorded run pending", *[""] * 4]
    record, final = runs[name][0], runs[name][0]["final"]
    number, _, rest = accuracy_text(accuracies(runs[name])).partition(" ")
    return [
        label,
        f"**{number}** {rest} {marks(record, notes)}",
        len(runs[name]),
        f"{final['parameters'] / 1e6:.1f} M",
        pflop(final["training_flops"]),
        f"{duration(training_seconds(record))}, {trained_on(record)}",
    ]


def results(root):
    """Table of all notebooks with the final model of each, and the footnotes."""
    runs = recorded_runs(root)
    notes = numbered_notes(runs)
    header = ["Notebook", "Test accuracy, %", "Seeds", "Parameters", "PFLOP", "Training"]
    text = table(header, [result_row(name, runs, notes, root) for name in TITLES])
    return "\n\n".join([text, *(f"<sup>{number} {note}</sup>" for number, note in enumerate(notes, 1))])


def figure(root):
    """README's first figure and what it shows."""
    runs = recorded_runs(root)
    if not runs:
        return PENDING
    alt = "Test accuracy of the notebooks against the operations of their training"
    text = "Right answers on the 10,000 test images, with their 95 % interval, against the operations of training."
    last = len(numbered_notes(runs))
    return f"![{alt}](results/overview.png)\n\n<sup>{text} Data, weights and software: notes 1 to {last} below.</sup>"


def metrics(root):
    """Which notebook is best at what."""
    runs = recorded_runs(root)
    if not runs:
        return PENDING
    notes = numbered_notes(runs)
    mean = {name: statistics.mean(accuracies(records)) for name, records in runs.items()}
    final = {name: records[0]["final"] for name, records in runs.items()}
    gain = {name: 100 * (mean[name] - GUESSING) / (final[name]["training_flops"] / 1e15) for name in runs}
    places = {name: records[0].get("trained_on", records[0]["device_name"]) for name, records in runs.items()}
    place = statistics.mode(places.values())  # times of different machines say nothing about the networks
    seconds = {name: training_seconds(runs[name][0]) for name in runs if places[name] == place}
    middle = statistics.median(seconds.values())
    quick = [name for name in seconds if seconds[name] <= middle]

    def line(title, name, text):
        number, _, spread = accuracy_text(accuracies(runs[name]), 1).partition(" ")
        return f"- **{title}:** {link(name)}, {number} % {spread}{marks(runs[name][0], notes)}{text}"

    efficient, fastest = max(gain, key=gain.get), min(seconds, key=seconds.get)
    cost = pflop(final[efficient]["training_flops"])
    timed = max(quick, key=mean.get)
    return "\n".join(
        [
            line("Best test accuracy", max(mean, key=mean.get), "."),
            line(
                "Most accuracy per FLOP",
                efficient,
                f" after {cost} PFLOP: {gain[efficient]:,.0f} points above guessing per PFLOP of training here.",
            ),
            line(
                "Fastest training",
                fastest,
                f" in {duration(seconds[fastest])}, of the {len(seconds)} trained on {place}.",
            ),
            line(
                "Best accuracy for its time",
                timed,
                f" in {duration(seconds[timed])}, of those that took at most the median there, {duration(middle)}.",
            ),
        ]
    )


def amount(claim):
    """How large the effect of a claim is, with the 95 % interval and the number of seeds, or of images compared.

    An effect is a difference and has its sign; work in PFLOP is an amount and has none.
    """
    effect, margin, unit, pairs = claim["effect"], claim["margin"], claim["unit"], claim["pairs"]
    kind = "image" if pairs > MOST_SEEDS else "seed"
    seeds = f"{pairs:,} {kind}{'s' * (pairs != 1)}"
    if effect is None:
        return seeds
    digits = 1 if max(abs(effect), margin or 0) >= 1 else 2
    interval_text = f" ± {margin:.{digits}f}" if margin is not None else ""
    sign = "" if unit == "PFLOP" else "+"
    return f"{effect:{sign}.{digits}f}{interval_text} {unit}, {seeds}"


def insights(root):
    """What the notebooks claim: verdict, size of the effect, and on what it was tried; one line each."""
    rows = [
        [link(name, name[0]), claim["claim"], f"**{claim['verdict']}**", amount(claim), claim["experiment"]]
        for name, records in recorded_runs(root).items()
        for claim in records[0]["claims"]
    ]
    return table(["No.", "Claim", "Verdict", "How much", "On what"], rows) if rows else PENDING


def files(root):
    """The small model files that lie in results/, with the accuracy that each of them was measured to have."""
    rows = []
    for name, records in recorded_runs(root).items():
        file = records[0]["recommended"] or ""
        path = Path("results", name, Path(file).name)
        if file and (Path(root) / path).exists():
            size = (Path(root) / path).stat().st_size / 1e6
            test = next(form["test"] for form in records[0]["formats"] if form.get("file") == file)
            shown = f"[{path.name}]({path.as_posix()})"
            rows.append([shown, TITLES[name], f"{size:.1f} MB", f"{test:.2f} %"])
    header = ["File", "Network", "Size", "Test accuracy of the file, one view"]
    return table(header, rows) if rows else PENDING


def reproduce(root):
    """The command for each line of the results table."""
    lines = []
    for name, records in recorded_runs(root).items():
        for record in records:
            line = f".venv/bin/python tools/record.py {name}.ipynb --preset {record['preset']}"
            line += f" --seed {record['seed']}" if record["seed"] else ""
            lines.append(line + (f" --weights {record['weights_file']}" if record["weights_file"] else ""))
    return "\n".join(["```sh", *lines, "```"]) if lines else PENDING


def result_sentence(runs):
    """What came out of a notebook, in a sentence for its title cell."""
    final, shares = runs[0]["final"], accuracies(runs)
    found = f"The best model here, {final['title']}, is right on **{percent(statistics.mean(shares), 1)} %**"
    if len(shares) == 1:
        low, high = interval(shares[0])
        spread = f"95 % interval {percent(low, 1)} to {percent(high, 1)}"
    else:
        spread = f"mean of {len(shares)} seeds, standard deviation {percent(statistics.stdev(shares))} points"
    work = f"{pflop(final['training_flops'])} PFLOP (10¹⁵ operations) of training"
    before = "" if runs[0]["weights"].startswith("none") else ", the pretraining not counted"
    return f"{found} of the test images ({spread}), after {work}{before}."


def small_print(runs):
    """Software, data and initial weights of a notebook's recorded run."""
    record = runs[0]
    peak = record.get("peak_memory_bytes")
    memory = f", at most {peak / 1e9:.1f} GB of memory" if peak else ""
    run = f"Recorded on {record['date']}: preset `{record['preset']}`, seed {record['seed']}, on {device(record)}"
    took = duration(training_seconds(record))
    if "trained_on" in record:
        run += f"{memory}. The best model was trained on {trained_on(record)}, in {took}."
    else:
        run += f", {took} for the best model{memory}."
    if "experiments_trained_on" in record:
        run += f" The experiments were trained on {record['experiments_trained_on']}."
    return f"<small>{run} Counted with {record['final']['views']}. {' '.join(notes_of(record)[:3])}</small>"
