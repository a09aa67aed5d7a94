"""Take over finished stages of training from the run folder of another machine.

    python tools/adopt.py 4_EfficientNetB0.ipynb FOLDER --note "NVIDIA H100 80GB HBM3 with JAX 0.11.2"

FOLDER is a RUN_DIR, or the part of one that was brought over. A notebook refuses a stage that was trained on another
backend or device, or in another number format, since it cannot know whether that is meant. This copies such stages
into the run folder and leaves out of their settings what follows from the machine. What is left, the seed, the images,
the network, the recipe and the rates, is still compared by the notebook. Each copy says where it was trained, and
tools/record.py publishes that. Stages that are not finished, or that the run folder holds already, are left alone.
"""

import argparse
import json
import os
import sys
import zipfile
from pathlib import Path

from notebooks import ROOT

# Keys of what follows from the machine
MACHINE = {"backend", "number format", "initial weights", "dtype", "jit_compile"}
STATE = "state.json"


def comparable(settings):
    """Settings of a stage without what follows from the machine; means of features do, sums over images do not."""
    if isinstance(settings, list):
        return [comparable(value) for value in settings]
    if not isinstance(settings, dict):
        return settings
    features = {key for key in settings if key.startswith("data ") and isinstance(settings[key], float)}
    return {key: comparable(settings[key]) for key in settings if key not in MACHINE | features}


def read_state(path):
    """State of a backup; raises SystemExit that names the file if it is damaged or is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is None:
                return json.loads(archive.read(STATE))
    except Exception as error:
        raise SystemExit(f"{path} is no backup of a stage ({error}). Bring it over again.") from None
    raise SystemExit(f"{path} is damaged. Bring it over again.")


def adopt(source, target, state, note):
    """Copy the backup at `source`, with its `state`, to `target`, all or nothing; say in it where it was trained."""
    settings = state["settings"]
    place = {"trained_on": f"{note}, {settings['number format'].removeprefix('mixed_')}"}
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name("part-adopted.keras")
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(part, "w") as new:
        for name in old.namelist():
            if name != STATE:
                new.writestr(name, old.read(name))
        new.writestr(STATE, json.dumps(state | {"settings": comparable(settings)} | place))
    os.replace(part, target)


def main(argv=None, root=ROOT):
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebook", help="file or name of the notebook, e.g. 4_EfficientNetB0.ipynb")
    parser.add_argument("folder", type=Path, help="the RUN_DIR of the other machine")
    parser.add_argument("--note", required=True, help="device and software of the other machine")
    parser.add_argument(
        "--run-dir", default="runs", help="the RUN_DIR of this one (relative: in the repository)"
    )
    args = parser.parse_args(argv)
    name, run_dir = Path(args.notebook).stem, Path(root) / Path(args.run_dir).expanduser()
    found = sorted(args.folder.glob(f"{name}/*/**/epoch-*.keras"))
    if not found:
        raise SystemExit(
            f"There are no stages of {name} in {args.folder}. Name the folder that holds {name}."
        )
    for source in found:
        target, state = run_dir / source.relative_to(args.folder), read_state(source)
        stage = source.parent.relative_to(args.folder / name)
        if len(state["history"]) < state["settings"]["epochs"]:
            print(f"{stage}: not finished, left out")
        elif [*target.parent.glob("epoch-*.keras")]:
            print(f"{stage}: there already")
        else:
            adopt(source, target, state, args.note)
            print(f"{stage}: taken over")
    return 0


if __name__ == "__main__":
    sys.exit(main())
