"""Check that a training does not depend on the Keras backend, or on how many devices share it.

    python tools/agreement.py --devices 1 2                           on virtual CPU devices of this machine
    python tools/agreement.py --python .venv/bin/python jax=.venv-jax/bin/python torch=.venv-torch/bin/python

Every training is a process of its own. It runs the cells of notebook 1 up to its experiment, with smaller sizes, and
trains two of its arms: (a), which draws no random numbers after its initial weights, and (d), which has
augmentation, Dropout and BatchNorm. The first of the variants is the reference. It trains with several seeds, and
the spread of its final losses is the noise: a variant agrees if the mean of its final losses lies within three
standard errors of that of the reference, in training and in validation.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import mean, stdev

from interruptions import environment, made_data, run_cells
from notebooks import ROOT, read

STAGES = ("plain", "both")
LOSSES = ("loss", "val_loss")
SMALL = {"images": 4000, "epochs": 4, "batch": 100, "validation": 500}
# In nats; smaller differences of a final loss are noise even where all seeds of the reference agree.
FLOOR = 0.02


def virtual_devices(count):
    """Let the active backend see `count` devices on this CPU. Only before it first looks for devices."""
    if os.environ["KERAS_BACKEND"] == "tensorflow":
        import tensorflow as tf

        devices = [tf.config.LogicalDeviceConfiguration() for _ in range(count)]
        tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], devices)
    else:
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"


def train(task):
    """Train the stages with one seed in this process, and return what came out as a dict, by stage."""
    virtual_devices(task["devices"])
    with tempfile.TemporaryDirectory() as run_dir:
        parameters = {"PRESET": "smoke", "DATA_DIR": task["data"], "RUN_DIR": run_dir, "SEED": task["seed"]}
        notebook, small = read(ROOT / "1_CNN_Model.ipynb"), task["small"]
        cells = run_cells(notebook, parameters, last="plain-training", small=small)
        found = {"devices": cells["DEVICES"], "backend": cells["backend"]}
        regularised = partial(cells["small_cnn"], regularise=True)
        arms = {"plain": (cells["small_cnn"], small["epochs"], small["batch"])}
        arms["both"] = (regularised, small["epochs"], small["batch"], cells["augmentation"])
        for name in STAGES:
            build = partial(cells["plain_training"], *arms[name])
            stage = cells["train_stage"](name, name, build, small["epochs"], small["batch"])
            [*_, model] = cells["COMPILED"].values()
            steps = int(cells["ops"].convert_to_numpy(model.optimizer.iterations))
            found[name] = {"steps": steps, **{key: [row[key] for row in stage["history"]] for key in LOSSES}}
    return found


def child(python, backend, devices, seed, data, small=SMALL):
    """Train in a process of its own, with that interpreter, backend and number of virtual devices."""
    task = json.dumps({"devices": devices, "seed": seed, "data": str(data), "small": small})
    command = [str(python), __file__, "--task", task]
    done = subprocess.run(command, env=environment(backend), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{backend} on {devices} device(s) failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def final_losses(runs, stage, loss):
    """Last value of a loss in each of several runs."""
    return [run[stage][loss][-1] for run in runs]


def disagreements(reference, runs):
    """In what the runs of a variant differ from those of the reference by more than noise, as sentences."""
    found = []
    for stage in STAGES:
        steps = {run[stage]["steps"] for run in [*reference, *runs]}
        if len(steps) > 1:
            found.append(f"{stage}: {' and '.join(map(str, sorted(steps)))} steps")
        for loss in LOSSES:
            one, other = final_losses(reference, stage, loss), final_losses(runs, stage, loss)
            spread = stdev(one) if len(one) > 1 else 0.0
            noise = max(FLOOR, 3 * spread * (1 / len(one) + 1 / len(other)) ** 0.5)
            if abs(mean(one) - mean(other)) > noise:
                found.append(f"{stage}: {loss} {mean(other):.3f} instead of {mean(one):.3f} ± {noise:.3f}")
    return found


def describe(label, runs):
    """Print the mean final losses of a variant, in nats."""
    numbers = "; ".join(
        f"{stage} {runs[0][stage]['steps']} steps, "
        + ", ".join(f"{loss} {mean(final_losses(runs, stage, loss)):.3f}" for loss in LOSSES)
        for stage in STAGES
    )
    print(f"{label}: {numbers} (mean of {len(runs)})", flush=True)


def compare(variants, data, seeds, small=SMALL):
    """Train every variant, a dict {label: (python, backend, devices)}; print the findings, return whether all agree."""
    reference, agree = None, True
    for label, (python, backend, devices) in variants.items():
        runs = [child(python, backend, devices, seed, data, small) for seed in range(seeds)]
        describe(label, runs)
        if any(run["devices"] != devices for run in runs):
            raise RuntimeError(f"{label} was trained on {runs[0]['devices']} device(s)")
        reference = reference or runs
        for text in disagreements(reference, runs):
            agree = False
            print(f"  differs: {text}")
    print("all agree" if agree else "NOT all agree")
    return agree


def main():
    """Read the command line and compare, or train once."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, nargs="+", default=[1], help="numbers of virtual CPU devices")
    parser.add_argument(
        "--python",
        nargs="+",
        default=[sys.executable],
        metavar="[BACKEND=]INTERPRETER",
        help="environments to train in; without a backend: KERAS_BACKEND, or else tensorflow",
    )
    parser.add_argument("--seeds", type=int, default=3, help="at least 2 (default 3)")
    parser.add_argument(
        "--data", type=Path, help="folder that holds cifar-10-batches-py; otherwise made-up data"
    )
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        print(json.dumps(train(options.task)))
        return
    if options.seeds < 2:
        parser.error("--seeds must be at least 2: the spread between seeds is the measure of noise")
    variants = {}
    for name in options.python:
        backend, _, python = name.rpartition("=")
        backend = backend or os.environ.get("KERAS_BACKEND", "tensorflow")
        for count in options.devices:
            variants[f"{backend} on {count} device(s)"] = (python, backend, count)
    with tempfile.TemporaryDirectory() as folder:
        data = options.data.resolve() if options.data else made_data(Path(folder))
        sys.exit(not compare(variants, data, options.seeds))


if __name__ == "__main__":
    main()
