"""Stages trained on another machine are taken over: what follows from the machine is left out, the rest is compared."""

import json
import shutil
import zipfile
from functools import partial

import adopt
import pytest
import record
from notebooks import TITLES
from stage_under_test import EPOCHS, Stage, edit_state, interrupted, no_training, tiny_model

NAME = [*TITLES][0]
NOTE = "A GPU, another backend"


def stage_in(cells, run_dir):
    """A stage of the first notebook in the RUN_DIR `run_dir`."""
    return Stage(cells, run_dir / NAME / "smoke-seed0")


def as_elsewhere(state):
    """Change the state of a backup to what another backend would have written on a GPU."""
    settings = json.loads(json.dumps(state["settings"]).replace('"float32"', '"mixed_float16"'))
    settings |= {"backend": "jax on 1 gpu", "initial weights": 7.0, "data 2": 0.25}
    settings["compile_config"]["jit_compile"] = "another"
    state["settings"] = settings


@pytest.fixture
def there(cells, whole, tmp_path):
    """A stage that another machine finished."""
    stage = stage_in(cells, tmp_path / "there")
    shutil.copytree(whole.folder, stage.folder)
    edit_state(stage.backups[-1], as_elsewhere)
    return stage


@pytest.fixture
def here(cells, tmp_path):
    """The same stage on this machine, not trained."""
    return stage_in(cells, tmp_path / "here")


def weights(stage):
    """Bytes of the weights in a stage's newest backup."""
    with zipfile.ZipFile(stage.backups[-1]) as archive:
        return archive.read("model.weights.h5")


def take_over(there, here):
    """Run the command."""
    folders = [str(stage.run.parents[1]) for stage in (there, here)]
    return adopt.main([f"{NAME}.ipynb", folders[0], "--note", NOTE, "--run-dir", folders[1]])


def test_the_notebook_refuses_it_and_loads_what_was_taken_over(there, here, whole, capsys):
    shutil.copytree(there.run, here.run)
    with no_training(), pytest.raises(ValueError, match="number format: mixed_float16 then"):
        here.train()
    shutil.rmtree(here.run)
    assert take_over(there, here) == 0
    assert "smoke-seed0/stage: taken over" in capsys.readouterr().out
    with no_training():
        here.train()
    for key in ("title", "seed", "history", "training_flops", "parameters"):
        assert here.result[key] == whole.result[key]
    assert (here.said, here.files()) == (whole.said, whole.files())
    assert weights(here) == weights(there)
    stages = [{"name": "stage"}]
    seconds = adopt.read_state(there.backups[-1])["seconds"]
    found = {"trained_on": f"{NOTE}, float16", "training_seconds": seconds}
    assert record.adopted(here.run, stages) == found
    assert record.adopted(there.run, stages) == {}


def test_other_changes_are_refused_as_before(there, here, cells):
    take_over(there, here)
    for text, change in {
        "label_smoothing": {"build": partial(tiny_model, cells, smoothing=0.1)},
        "epochs": {"epochs": EPOCHS + 1},
        "seed": {"SEED": 1},
        "data 0": {"x_train": 255 - cells["x_train"]},
    }.items():
        with no_training(), pytest.raises(ValueError, match=f"{text}: "):
            here.train(**change)


def test_what_is_there_stays(there, here, whole):
    shutil.copytree(whole.folder, here.folder)
    kept = here.backups[-1].read_bytes()
    take_over(there, here)
    assert here.backups[-1].read_bytes() == kept


def test_an_unfinished_stage_is_left_out(cells, tmp_path, here, capsys):
    there = interrupted(stage_in(cells, tmp_path / "there"))
    take_over(there, here)
    assert "stage: not finished, left out" in capsys.readouterr().out
    assert here.backups == []


@pytest.mark.parametrize("change", [lambda data: data[:-30], lambda data: b"", lambda data: data[::-1]])
def test_a_damaged_file_is_named(there, here, change):
    path = there.backups[-1]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(SystemExit, match="epoch-0003.keras is"):
        take_over(there, here)
    assert here.backups == []


def test_a_folder_without_stages_is_named(there, here, tmp_path):
    there.run = tmp_path / "nowhere" / NAME / "smoke-seed0"
    with pytest.raises(SystemExit, match="There are no stages of 1_CNN_Model in .*nowhere"):
        take_over(there, here)


def test_a_model_of_which_only_a_part_was_taken_over(there, here):
    take_over(there, here)
    shutil.copytree(there.folder, here.run / "second")
    (second,) = (here.run / "second").glob("epoch-*")
    edit_state(second, lambda state: state.pop("trained_on", None))
    found = record.adopted(here.run, [{"name": "stage"}, {"name": "second"}])
    assert found == {"trained_on": f"{NOTE}, float16 (1 of 2 stages)"}


def test_experiments_of_which_a_part_was_taken_over(there, here):
    take_over(there, here)
    for name in ("second, seed 0", "third, seed 0/a part", "fourth, seed 0"):
        shutil.copytree(there.folder, here.run / name)
    (part,) = (here.run / "third, seed 0/a part").glob("epoch-*")
    edit_state(part, lambda state: state.update(trained_on="another GPU"))
    runs = [{"name": name} for name in ("stage", "second, seed 0", "third, seed 0", "fourth, seed 0")]
    experiments = {"one": {"a": runs[:1], "b": runs[1:2]}, "two": {"a": runs[:1], "c": runs[2:]}}
    found = {"experiments_trained_on": "another GPU (2 of 4 trainings)"}
    assert record.adopted_experiments(here.run, experiments) == found
    assert record.adopted_experiments(there.run, experiments) == {}
