"""tools/run.py: a notebook runs in a terminal, shows what it says and how far it is, and stops cleanly."""

import ast
import io
import os
import signal
import subprocess
import sys

import pytest
import run
import small_portfolio
from conftest import ROOT
from notebooks import cell_by_id, code_cells, errors, read, tags
from screen import Screen, shown_text
from small_portfolio import NAME

WAIT = """import time
from IPython.display import Markdown, display

display(Markdown("(a): epoch 1: loss 0.9"))
print("waiting", flush=True)
time.sleep(60)"""


class Terminal(io.StringIO):
    """A stream that calls itself a terminal."""

    def isatty(self):
        """Say that this is a terminal."""
        return True


def on_terminal(monkeypatch, columns=80):
    """A `Screen` on a made-up terminal of that width."""
    monkeypatch.setenv("COLUMNS", str(columns))
    return Screen(Terminal())


def start(root, *arguments):
    """Start README's command on the tiny notebook in `root`."""
    command = [sys.executable, ROOT / "tools" / "run.py", f"{NAME}.ipynb", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=root, text=True, start_new_session=True, **pipes)


def test_a_notebook_is_run_and_shown(tmp_path):
    path = small_portfolio.make(tmp_path)
    out, err = (process := start(tmp_path, "-p", "RETRAIN", "false", "-p", "PRESET", "smoke")).communicate()
    assert process.returncode == 0, err
    shown = [
        "Small",
        "5 Training",
        "The first network",
        "a warning",
        "(a): epoch 1: loss 0.9",
        "epoch 2: loss 0.5",
    ]
    shown += ["smoke 0 False: 90.00%", "10 Takeaways", "Done."]
    places = [out.index(text) for text in shown]
    assert places == sorted(places)
    assert "20 %" not in out and "\r" not in out and "no heading" not in out and "figure" not in out.lower()
    saved = read(tmp_path / "runs" / f"{NAME}.ipynb")
    assert "RETRAIN = False" in saved.cells[2].source
    assert [
        o.data["text/markdown"] for o in cell_by_id(saved, "train").outputs if o.output_type == "display_data"
    ] == [
        "(a): epoch 1: loss 0.9  \nepoch 2: loss **0.5**",
        "",
    ]
    assert read(path).cells[1].outputs == []


def test_an_error_is_told_and_what_ran_is_saved(tmp_path, capsys):
    path = small_portfolio.make(tmp_path, "print('before')\nraise ValueError('no such data')")
    output = tmp_path / "runs" / "out.ipynb"
    assert run.run(path, output, {"PRESET": "smoke"}, tmp_path) == 1
    out, err = capsys.readouterr()
    assert "before" in out and "ValueError: no such data" in err and "cell train" in err
    saved = read(output)
    assert errors(saved) == [("train", "ValueError: no such data")]
    assert cell_by_id(saved, "curves").execution_count is None


def test_cells_of_a_tag_are_left_out(tmp_path):
    path, output = small_portfolio.make(tmp_path), tmp_path / "out.ipynb"
    assert run.run(path, output, {"PRESET": "smoke"}, tmp_path, skip="figure") == 0
    saved = read(output)
    assert cell_by_id(saved, "curves").execution_count is None
    assert cell_by_id(saved, "result").execution_count == 4  # after parameters, those injected, and train


@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C is no signal on Windows")
def test_ctrl_c_interrupts_the_kernel_and_saves(tmp_path):
    small_portfolio.make(tmp_path, WAIT)
    process = start(tmp_path)
    for line in process.stdout:
        if "waiting" in line:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Interrupted" in err and "same command goes on" in err
    saved = read(tmp_path / "runs" / f"{NAME}.ipynb")
    assert [error.partition(":")[0] for _, error in errors(saved)] == ["KeyboardInterrupt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nothing.ipynb"], "no notebook"), ([f"{NAME}.ipynb", "-p", "SEEDS", "1"], "no parameter SEEDS")],
)
def test_a_wrong_command_is_refused_before_anything_runs(tmp_path, monkeypatch, capsys, arguments, message):
    small_portfolio.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("false", False),
        ("True", True),
        ("none", None),
        ("7", 7),
        ("1e-3", 0.001),
        ("~/x", "~/x"),
        ("no", "no"),
    ],
)
def test_values_have_their_types(text, meant):
    assert run.value(text) == meant and type(run.value(text)) is type(meant)


def test_start_up_notes_of_libraries_are_not_shown():
    note = "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\n"
    note += "I0000 00:00:1795651310.326512   12836 port.cc:153] oneDNN custom operations are on.\n"
    kept = "In 1999 00:00 it warned.\nE0000 00:00:17.1 1 x.cc:1] an error\n"
    assert run.START_UP_NOTES.sub("", note + kept) == kept


def test_a_live_text_is_one_line_that_is_written_over(monkeypatch):
    screen = on_terminal(monkeypatch, columns=24)
    screen.move("a", "(a):")
    screen.move("a", "(a): epoch 1: loss 0.9\nepoch 2: 40 %, a line that is too long")
    screen.settle()
    text = screen.stream.getvalue()
    assert text == (
        "(a):\r    \r(a): epoch 2: 40 %, a l\r                       \r"
        "(a): epoch 1: loss 0.9\nepoch 2: 40 %, a line that is too long\n"
    )


def test_texts_in_between_stand_in_order_and_nothing_is_said_twice(monkeypatch):
    for screen in (on_terminal(monkeypatch), Screen(io.StringIO())):
        screen.move("a", "(a): epoch 1")
        screen.write("a print, ")
        screen.write("in two pieces")
        screen.move("a", "(a): epoch 1\nepoch 2")
        screen.move("b", "(b): epoch 1")
        screen.say("the end")
        lines = [line.rsplit("\r", 1)[-1] for line in screen.stream.getvalue().strip().split("\n")]
        assert lines == ["(a): epoch 1", "a print, in two pieces", "epoch 2", "(b): epoch 1", "the end"]


def test_a_bar_that_writes_over_itself_leaves_its_end(monkeypatch):
    screen = Screen(io.StringIO())
    screen.write("1/9 \x1b[32m━\x1b[0m\r2/9")
    screen.write("\r9/9 \x1b[32m━\x1b[0m loss 0.1\nnext")
    screen.settle()
    assert screen.stream.getvalue() == "9/9 ━ loss 0.1\nnext\n"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"image/png": "x", "text/plain": "<Figure size 640x480>"}, ""),
        ({"text/html": "<b>x</b>", "text/plain": "<IPython.core.display.HTML object>"}, ""),
        ({"text/plain": "0.5"}, "0.5"),
        ({"text/markdown": "**(a)** is `best`", "text/plain": "<Markdown object>"}, "(a) is best"),
        ({"text/markdown": "| a | long |\n|---|---|\n| 1,000 | x |"}, "a      long\n-----  ----\n1,000  x"),
    ],
)
def test_what_is_shown_of_an_output(data, text):
    assert shown_text(data) == text


def names(cell, kind):
    """Names in a cell that are read, `kind` ast.Load, or assigned, ast.Store."""
    nodes = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Name)]
    return {node.id for node in nodes if isinstance(node.ctx, kind)}


def test_a_further_seed_needs_no_experiment(notebook):
    """tools/record.py leaves out the cells tagged `experiment`: no other one may use what only they define."""
    defined, left_out, wanting = {"experiments"}, set(), {}
    for cell in code_cells(notebook):
        if "experiment" in tags(cell):
            left_out |= names(cell, ast.Store)
        else:
            defined |= names(cell, ast.Store)
            own = {node.arg for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.arg)}
            wanting[cell.id] = names(cell, ast.Load) & left_out - defined - own
    assert {cell_id: found for cell_id, found in wanting.items() if found} == {}
