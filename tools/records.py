"""Reading results/*.json, and writing their numbers as people read them.

results/<notebook>.json is the recorded run, results/<notebook>-seed<k>.json are runs of the same code with other
seeds: then accuracies are mean and standard deviation.
"""

import json
import statistics
from pathlib import Path

from notebooks import ROOT, TITLES

SAME_RUN = ("preset", "code_sha256", "data", "weights")
TEST_IMAGES = 10_000


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


def recorded_runs(root=ROOT):
    """{notebook: its records, the published one first, then other seeds of it} of all notebooks that have one."""
    published = {name: load_record(name, root) for name in TITLES}
    return {
        name: [record, *seed_records(name, record, root)[0].values()]
        for name, record in published.items()
        if record is not None
    }


def accuracies(runs):
    """Test accuracies, 0 to 1, of the records of one notebook; records hold them in per cent."""
    return [run["final"]["test_accuracy"] / 100 for run in runs]


def interval(share, count=TEST_IMAGES, z=1.96):
    """95 % interval (low, high) of a share, 0 to 1, found on `count` images (E. B. Wilson, 1927)."""
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    return middle - half, middle + half


def percent(fraction, digits=2):
    """0.94213 -> '94.21'."""
    return f"{100 * fraction:.{digits}f}"


def accuracy_text(fractions, digits=2):
    """'94.21 (93.74–94.65)' with the 95 % interval of one run; '94.21 ± 0.10' with the deviation of several seeds."""
    if len(fractions) == 1:
        low, high = interval(fractions[0])
        return f"{percent(fractions[0], digits)} ({percent(low, digits)}–{percent(high, digits)})"
    return f"{percent(statistics.mean(fractions), digits)} ± {percent(statistics.stdev(fractions), digits)}"


def pflop(flops):
    """Floating-point operations -> PFLOP with three decimals, or two significant digits if that is more."""
    value = flops / 1e15
    return f"{value:.3f}" if value >= 0.001 else f"{value:.2g}"


def duration(seconds):
    """Seconds -> '45 s', '12 min' or '2 h 5 min'."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def software(record):
    """Versions of Keras, its backend, NumPy and Python in one phrase."""
    versions = record["versions"]
    backend = record["backend"]
    names = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
    text = f"Keras {versions['keras']} on {names.get(backend, backend)} {versions[backend]}"
    return f"{text}, NumPy {versions['numpy']}, Python {versions['python']}"
