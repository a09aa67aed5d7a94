"""The evaluation on the test images names all ten classes, whichever of them occur."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import CLASSES
from notebooks import cell_by_id, cell_namespace, notebook_paths, read

NOTEBOOK = notebook_paths()[0]  # the others share the cells


def made_up(missing):
    """(labels, guesses) without a class; the next is always right, the second and third are mixed up most."""
    present = [(missing + step) % 10 for step in range(1, 10)]
    best, one, other, *rest = present
    labels, guesses = present * 10, present * 10
    labels += [one] * 4 + [other] * 3 + rest
    guesses += [other] * 4 + [one] * 3 + [one] * len(rest)
    return np.array(labels), np.array(guesses), CLASSES[best], [CLASSES[one], CLASSES[other]]


def evaluate(labels, guesses, monkeypatch, edits=()):
    """Run the two cells on labels and guesses; return their names, and the texts they said as `said`."""
    monkeypatch.setattr(plt, "show", lambda: None)
    plt.close("all")
    said = []
    names = cell_namespace(NOTEBOOK, "imports")
    names.update(CLASSES=CLASSES, y_test=labels, guesses=guesses, said=said, say=said.append)
    for cell_id in ("confusion", "tell-confusion"):
        source = cell_by_id(read(NOTEBOOK), cell_id).source
        for old, new in edits if cell_id == "confusion" else ():
            if old not in source:
                raise LookupError(f"the cell has no {old}")
            source = source.replace(old, new)
        exec(compile(source, f"<{cell_id}>", "exec"), names)
    return names


def check_all_classes(missing, monkeypatch, edits=()):
    """Both axes of the figure name ten classes, the counts stand at their places, the text names the right ones."""
    labels, guesses, best, mixed = made_up(missing)
    names = evaluate(labels, guesses, monkeypatch, edits)
    heatmap = plt.gcf().axes[0]
    assert [tick.get_text() for tick in heatmap.get_xticklabels()] == CLASSES
    assert [tick.get_text() for tick in heatmap.get_yticklabels()] == CLASSES
    expected = np.zeros((10, 10), int)
    np.add.at(expected, (labels, guesses), 1)
    assert np.array_equal(names["counts"], expected)
    assert [text.get_text() for text in heatmap.texts] == [str(count) for count in expected.ravel()]
    text = " ".join(names["said"])
    assert f"Recognised best: **{best}** (100.0%)" in text
    assert f"Mixed up most: {' and '.join(sorted(mixed, key=CLASSES.index))}, 7 of 13 mistakes." in text


@pytest.mark.parametrize("missing", range(10), ids=CLASSES)
def test_a_class_in_neither_labels_nor_guesses_is_named(missing, monkeypatch):
    check_all_classes(missing, monkeypatch)


def test_a_class_without_pictures_is_not_called_the_worst(monkeypatch):
    """Nothing is known of it; the worst is the one with most mistakes among those that occur."""
    labels, guesses, _, mixed = made_up(missing=6)
    (text,) = [text for text in evaluate(labels, guesses, monkeypatch)["said"] if "worst" in text]
    assert f"worst: **{mixed[0]}** (71.4%)" in text


@pytest.mark.parametrize("missing", [0, 6, 9])
def test_fault_put_back_is_found(missing, monkeypatch):
    """Without the list of labels, the counts hold nine classes only."""
    with pytest.raises((AssertionError, ValueError)):
        check_all_classes(missing, monkeypatch, [(", labels=range(10)", "")])
