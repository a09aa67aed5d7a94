"""Run a notebook from top to bottom and show what it says: headings, text, and training as it moves.

    python tools/run.py 1_CNN_Model.ipynb
    python tools/run.py 2_MobileNetV2.ipynb -p PRESET quick -p DATA_DIR ~/cifar10

After every cell the notebook is saved with its outputs as runs/<name>.ipynb. Ctrl-C stops it (exit status 130);
the same command goes on where training stopped. An error ends it with status 1. Relative paths start where you are.
"""

import argparse
import asyncio
import contextlib
import re
import signal
import subprocess
import sys
from pathlib import Path

from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from notebooks import code_cells, parameter_names, read, write
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from screen import Screen, shown_text

# What TensorFlow's libraries note on stderr before anything else, such as "I0000 00:00:1795651310.3 123 port.cc:153] …"
START_UP_NOTES = re.compile(
    r"^(?:[IW]\d{4} \d\d:\d\d:\S+ |WARNING: All log messages before absl).*\n?", re.MULTILINE
)
WORDS = {"true": True, "false": False, "none": None, "null": None}


class Interrupted(Exception):
    """Ctrl-C was pressed between two cells."""


class Client(NotebookClient):
    """Executes a notebook, shows it on a `Screen`, and saves it at `path` after every cell."""

    def __init__(self, notebook, path, screen, **options):
        super().__init__(notebook, kernel_name="python3", startup_timeout=120, iopub_timeout=60, **options)
        self.coalesce_streams, self.extra_arguments = True, ["--Application.log_level=ERROR"]
        self.path, self.screen, self.cell, self.interrupted = path, screen, None, False

    async def async_start_new_kernel(self, **options):
        """Start the kernel, with Ctrl-C passed on to it; Windows has no such signal handlers."""
        with contextlib.suppress(NotImplementedError):
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, self.interrupt)
        await super().async_start_new_kernel(**options)

    def interrupt(self):
        """Interrupt the kernel; the second time, end it."""
        first, self.interrupted = not self.interrupted, True
        asyncio.ensure_future(self.km.interrupt_kernel() if first else self.km.shutdown_kernel(now=True))

    async def async_execute_cell(self, cell, cell_index, *args, **options):
        """Show the headings of a Markdown cell; execute a code cell and save what there is."""
        if self.interrupted:
            raise Interrupted
        if cell.cell_type != "code":
            self.screen.headings(cell.source)
            return cell
        self.cell = cell
        try:
            return await super().async_execute_cell(cell, cell_index, *args, **options)
        finally:
            self.screen.settle()
            write(self.nb, self.path)

    def process_message(self, message, cell, cell_index):
        """Show a message of the kernel, then let it become an output of the cell."""
        content, kind = message["content"], message["msg_type"]
        if kind == "stream":
            self.screen.write(START_UP_NOTES.sub("", content["text"]))
        elif kind in ("display_data", "execute_result", "update_display_data"):
            text = shown_text(content["data"])
            name = (content.get("transient") or {}).get("display_id")
            if text and name:
                self.screen.move(name, text)
            elif text:
                self.screen.say(text)
        return super().process_message(message, cell, cell_index)


def run(path, output, parameters=None, folder=".", screen=None, skip=None):
    """Run the notebook at `path` with `parameters` in the working folder `folder`; return the exit status.

    Cells tagged `skip` are left out. It is saved as `output` after every cell: also one that raised an error
    (status 1) or was interrupted (130).
    """
    notebook = load_notebook_node(str(path))
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    if parameters:
        notebook = parameterize_notebook(notebook, parameters, kernel_name="python3", language="python")
    options = {"skip_cells_with_tag": skip} if skip else {}
    client = Client(notebook, Path(output), screen or Screen(sys.stdout), **options)
    client.resources = {"metadata": {"path": str(Path(folder).resolve())}}
    problem, status = None, 0
    try:
        client.execute(stderr=subprocess.DEVNULL)  # what cells write there comes as messages as well
    except CellExecutionError as error:
        problem, status = f"{error.ename}: {error.evalue}", 1
    except (KeyboardInterrupt, Interrupted):
        client.interrupted = True
    except RuntimeError as error:  # the kernel did not start, or died: out of memory, for example
        problem, status = str(error), 1
    if client.interrupted:
        problem, status = "Interrupted.", 130
    if problem:
        where = f" in cell {client.cell.id}" if client.cell and status == 1 else ""
        remedy = "The same command goes on where training stopped."
        print(f"\n{problem}\n\nStopped{where}. What ran is in {output}. {remedy}", file=sys.stderr)
    return status


def value(text):
    """What a word of the command line means: true, false, none and numbers have their types, the rest is text."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def main(argv=None):
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebook", help="the notebook's file")
    parser.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter"
    )
    args = parser.parse_args(argv)
    path = Path(args.notebook)
    if not path.is_file():
        parser.error(f"there is no notebook {path}")
    names, parameters = parameter_names(read(path)), {name: value(text) for name, text in args.p}
    if unknown := [name for name in parameters if name not in names]:
        parser.error(f"{path.name} has no parameter {unknown[0]}; it has {', '.join(names)}")
    output = Path("runs", path.name)
    status = run(path, output, parameters)
    if status == 0:
        print(f"\nDone. The notebook with its outputs is {output}.")
    return status


if __name__ == "__main__":
    sys.exit(main())
