"""Fine-tuning with the notebooks' own functions: what stays, how phases join, and which edits are noticed.

A tiny backbone with the same weights every time stands for the pretrained ones.
"""

import json
import shutil
import zipfile
from functools import cache, partial
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from keras import layers
from notebooks import cell_namespace
from stage_under_test import no_training
from test_transfer import BATCH, FIFTH, FOURTH, PATHS, SECOND, SIZE, THIRD, backbone_in, lesson, norms_in

BLOCKS = ["conv1", "conv2", "pool2", "conv3", "pool3", "conv4", "pool4", "conv5"]
OWN = {
    SECOND: ["fine-tuning"],
    THIRD: "show-parts thaw part-of-cosine tuning-model train-phases joined phases-of".split(),
    FOURTH: ["schedules", "fine-tuning"],
    FIFTH: "price part-of-cosine tuning-model train-sizes joined".split(),
}
pytestmark = pytest.mark.filterwarnings("ignore:__array__")
each = pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])


def tiny_backbone(include_top, weights, input_shape):
    """A backbone with the same weights every time; its layers are called like the parts of DenseNet."""
    inputs = x = keras.Input(input_shape)
    for number, part in enumerate(BLOCKS):
        if part.startswith("conv"):
            start = keras.initializers.HeNormal(seed=number)
            x = layers.Conv2D(6, 3, padding="same", kernel_initializer=start, name=f"{part}_conv")(x)
            x = layers.ReLU(name=f"{part}_relu")(layers.BatchNormalization(name=f"{part}_bn")(x))
        else:
            x = layers.AveragePooling2D(2, name=f"{part}_pool")(x)
    return keras.Model(inputs, layers.BatchNormalization(name="bn")(x))


def opened(imported, path, run, edits=(), size=SIZE):
    """Train, or load, a probe and a fine-tuning from it, in notebooks 3 and 5 of two parts; return all of it."""
    values = {"WEIGHTS": "imagenet", "BACKBONE": tiny_backbone}
    names = SimpleNamespace(**lesson(imported, path, run, OWN[path], edits, **values))
    images = names.x_train, names.y_train
    probe, steps = names.train_probe("probe", "a probe", size, *images), 2 * len(images[0]) // BATCH
    if path == THIRD:
        data, choice = (*images, names.x_val, names.y_val), [names.PARTS[7:], names.PARTS[5:]]
        phases = names.phases_of(choice, [SIZE] * 2)
        parts = names.train_phases("tuned", "fine-tuned", phases, probe, data)["parts"]
        build = partial(names.tuning_model, probe, names.PARTS[5:], SIZE, 0.5, 0.5)
    elif path == FIFTH:
        plan = [(32, 1), (SIZE, 1)]
        parts = names.train_sizes("tuned", "fine-tuned", plan, probe, *images)["parts"][1:]
        build = partial(names.tuning_model, SIZE, probe)
    else:
        if path == SECOND:
            build = partial(names.fine_tuning, SIZE, probe, None, names.TUNE_RATE, steps)
        else:
            rate = names.SCHEDULES["cosine"](names.BUDGET["peaks"][0], steps)
            build = partial(names.fine_tuning, SIZE, probe, rate)
        parts = [names.train_stage("tuned", "fine-tuned", build, 2, BATCH)]
    return SimpleNamespace(names=names, run=run, probe=probe, parts=parts, build=build)


@pytest.fixture(scope="module")
def imported():
    """Names that the import cell gives."""
    return cell_namespace(SECOND, "imports")


@pytest.fixture(scope="module")
def finished(imported, tmp_path_factory):
    """A function that trains in a notebook, once, and returns all of it."""
    return cache(lambda path: opened(imported, path, tmp_path_factory.mktemp("tiny")))


def settings_of(stage):
    """The settings noted in the file of a stage."""
    with zipfile.ZipFile(stage["file"]) as archive:
        return json.loads(archive.read("state.json"))["settings"]


@each
def test_frozen_layers_stay(path, finished):
    """BatchNorm stays in all notebooks, and what is not thawed in notebook 3; the rest moves."""
    done = finished(path)
    network = done.names.trained(done.parts[-1], done.build).get_layer("network")
    old, new = backbone_in(done.probe["network"]), backbone_in(network)
    moved = {
        one.name
        for one, other in zip(old.layers, new.layers)
        if not same(one.get_weights(), other.get_weights())
    }
    free = {"conv4_conv", "conv5_conv"} if path == THIRD else {f"conv{n}_conv" for n in range(1, 6)}
    assert moved == free and len(norms_in(network)) == 6
    heads = [head.get_layer("logits").get_weights() for head in (done.probe["network"], network)]
    assert not same(*heads)


def same(one, other):
    """Whether two lists of weights are equal."""
    return all(map(np.array_equal, one, other))


@each
def test_the_rate_rises_to_its_peak_and_falls_to_zero_over_all_parts(path, finished):
    parts = [settings_of(part)["learning rates"][:20] for part in finished(path).parts]
    assert len(parts) == (2 if path in (THIRD, FIFTH) else 1)
    assert parts[0][0] == 0 and parts[-1][-1] == pytest.approx(0, abs=1e-9)
    for before, after in zip(parts, parts[1:]):
        assert after[0] == pytest.approx(before[-1], rel=1e-4) and 0 < after[0] < max(before)
    peak = {SECOND: 5e-4, THIRD: 3e-4, FOURTH: 3e-4, FIFTH: 1e-4}[path]
    assert max(max(rates) for rates in parts) == pytest.approx(peak, rel=0.35)


@pytest.mark.parametrize("path", [THIRD, FIFTH], ids=["3", "5"])
def test_each_part_begins_with_the_weights_of_the_one_before(path, finished):
    done = finished(path)
    model = done.names.trained(done.parts[0], done.build)
    weights = np.concatenate([np.ravel(weight) for weight in model.weights])
    begins = [settings_of(part)["initial weights"] for part in done.parts]
    assert begins[1] == pytest.approx(float(weights @ np.cos(np.arange(len(weights)))), rel=1e-6)
    assert begins[0] != pytest.approx(begins[1], rel=1e-5)


@each
def test_costs_and_curves_of_the_parts_add_up(path, finished):
    done = finished(path)
    epochs = [row["epoch"] for part in done.parts for row in part["history"]]
    assert epochs == ([1, 1] if path in (THIRD, FIFTH) else [1, 2])
    if path in (THIRD, FIFTH):
        joined = done.names.joined("all", "all", [done.probe, *done.parts] if path == FIFTH else done.parts)
        counted = [*done.parts, *([done.probe] if path == FIFTH else [])]
        assert [row["epoch"] for row in joined["history"]] == [1, 2]
        for key in ("training_flops", "seconds"):
            assert joined[key] == pytest.approx(sum(part[key] for part in counted))
        assert joined["file"] == done.parts[-1]["file"]


@each
def test_opened_again_nothing_is_trained(path, finished, imported):
    done = finished(path)
    with no_training():
        again = opened(imported, path, done.run)
    assert [part["history"] for part in again.parts] == [part["history"] for part in done.parts]
    np.testing.assert_array_equal(again.probe["hits"], done.probe["hits"])


SCALINGS = {
    SECOND: ("1 / 127.5,", "1 / 127,"),
    THIRD: ("0.485", "0.475"),
    FOURTH: ("layers.Identity(", "layers.Rescaling(1.01, "),
    FIFTH: ("Rescaling(1.0,", "Rescaling(1.01,"),
}
UPSCALING = ('interpolation="bilinear", name', 'interpolation="nearest", name')
RISES = {
    SECOND: ("steps // 10", "steps // 2"),
    THIRD: ("spent / 0.1", "spent / 0.3"),
    FOURTH: ("rising=0.1", "rising=0.5"),
    FIFTH: ("spent / 0.1", "spent / 0.3"),
}
PEAKS = {
    SECOND: ("TUNE_RATE, SCRATCH_RATE = 5e-4", "TUNE_RATE, SCRATCH_RATE = 6e-4"),
    THIRD: ("PEAK_RATE = 3e-4", "PEAK_RATE = 4e-4"),
    FOURTH: ("peaks=(3e-4,)", "peaks=(4e-4,)"),
    FIFTH: ("MOMENTUM = 1e-4", "MOMENTUM = 2e-4"),
}


def assert_refused(imported, path, run, stage, reason, edits=(), **options):
    """Opening with edited cells is refused for a reason, at a stage, without a training."""
    with no_training(), pytest.raises(ValueError, match=f"(?s){stage}.* holds another training.*{reason}"):
        opened(imported, path, run, edits, **options)


@each
@pytest.mark.parametrize("change", ["size", "scaling", "upscaling"])
def test_a_probe_of_other_pictures_is_refused(path, change, finished, imported):
    edits = {"scaling": [SCALINGS[path]], "upscaling": [UPSCALING]}.get(change, [])
    options = {"size": 96} if change == "size" else {}
    assert_refused(imported, path, finished(path).run, "probe", "data 0", edits, **options)


@each
@pytest.mark.parametrize("change", ["peak", "rise"])
def test_an_edited_schedule_is_refused(path, change, finished, imported):
    edit = {"peak": PEAKS, "rise": RISES}[change][path]
    assert_refused(imported, path, finished(path).run, "tuned", "learning rates", [edit])


@each
def test_an_edited_network_is_refused_even_by_itself(path, finished, imported, tmp_path):
    """What was edited is named, though the probe was deleted and trained again."""
    shutil.copytree(finished(path).run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "probe")
    with pytest.raises(ValueError, match="(?s)tuned.* holds another training") as caught:
        opened(imported, path, tmp_path / "run", [UPSCALING, SCALINGS[path]])
    assert "interpolation: bilinear then, nearest now" in str(caught.value)
    assert any(word in str(caught.value) for word in ("scale: ", "offset: ", "class_name: Identity"))
