"""What the notebooks with a pretrained backbone rest on: scaling, features, BatchNorm, what trains, weights files."""

import os
import sys

import numpy as np
import pytest
from conftest import find_weights_file
from notebooks import cell_by_id, code_cells, notebook_paths, read, tags

PATHS = [path for path in notebook_paths() if cell_by_id(read(path), "backbone")]
OWN = {
    "parameters",
    "presets",
    "time-budget",
    "backbone-choice",
    "input-scaling",
}  # the lesson's, but needed by all
SIZE = 32


@pytest.fixture(scope="module", params=PATHS, ids=[path.stem for path in PATHS])
def lesson(request, small_cifar, tmp_path_factory):
    """What a notebook defines up to its linear probe, from its own cells, with random weights."""
    import keras

    notebook, namespace = read(request.param), {"__name__": "cells", "display": print}
    parameters = f'PRESET = "smoke"\nDATA_DIR = {str(small_cifar)!r}\nWEIGHTS = None'
    back = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("lesson"))
    try:
        for cell in code_cells(notebook):
            if cell.id in OWN or ("shared" in tags(cell) and "figure" not in tags(cell)):
                exec(compile(cell.source, f"<{cell.id}>", "exec"), namespace)
            if cell.id == "parameters":
                exec(parameters, namespace)
            if cell.id == "run-folder":
                keras.mixed_precision.set_global_policy("float32")
                namespace["PRECISION"] = "float32"
            if cell.id == "train-probe":
                break
        yield namespace
    finally:
        os.chdir(back)
    keras.mixed_precision.set_global_policy("float32")


@pytest.fixture
def shared_lesson(lesson):
    """The same, for tests of shared cells alone: these are the same to the byte, so one notebook stands for all."""
    if lesson["NOTEBOOK"] != PATHS[0].stem and not os.environ.get("ALL_RUNS"):
        pytest.skip(f"tests cells shared with {PATHS[0].stem}; ALL_RUNS=1 runs it here, too")
    return lesson


@pytest.fixture(scope="module")
def saved(lesson, tmp_path_factory):
    """A backbone whose every variable, statistics too, was moved by chance, and the file of its weights."""
    base, rng = lesson["backbone"](SIZE, None), np.random.default_rng(0)
    for variable in base.variables:
        if variable.dtype == "float32":
            value = np.array(variable)
            variable.assign(
                value * 1.1 if value.ndim > 1 else value + np.abs(rng.normal(0, 0.1, value.shape))
            )
    path = tmp_path_factory.mktemp("weights") / "good.weights.h5"
    base.save_weights(path)
    return base, path


def images(lesson, count=16):
    """A few validation images, uint8 (count, 32, 32, 3)."""
    return lesson["x_val"][:count]


def distance(found, expected):
    """Largest difference, as a share of the largest expected value."""
    return np.abs(found - expected).max() / np.abs(expected).max()


def extractor(lesson, model=None):
    """The part of a whole model, by default a new one, from uint8 images to pooled features, as the probe uses it."""
    model = model or lesson["transfer_model"](SIZE, None)
    return lesson["keras"].Model(model.input, model.get_layer("pooling").output)


def batchnorms(lesson, model):
    """All BatchNorm layers of a model, those inside its backbone too."""
    kind = lesson["layers"].BatchNormalization
    return [layer for layer in model._flatten_layers() if isinstance(layer, kind)]


def test_input_scaling_is_that_of_the_pretraining(lesson):
    preprocess = sys.modules[lesson["BACKBONE"].__module__].preprocess_input
    pixels = images(lesson).astype("float32")
    scaled = np.array(lesson["input_scaling"]()(pixels))
    np.testing.assert_allclose(scaled, preprocess(pixels.copy()), atol=1e-5)


def test_a_model_scales_exactly_once(lesson):
    model = lesson["transfer_model"](SIZE, None)
    preprocess = sys.modules[lesson["BACKBONE"].__module__].preprocess_input
    base = lesson["backbone"](SIZE, None)
    maps = base.predict(preprocess(images(lesson).astype("float32")), verbose=0)
    found = extractor(lesson, model).predict(images(lesson), verbose=0)
    assert distance(found, maps.mean((1, 2))) < 1e-3
    scaled_again = preprocess(images(lesson).astype("float32")) / 127.5 - 1
    assert distance(found, base.predict(scaled_again, verbose=0).mean((1, 2))) > 0.1


def test_cached_features_are_the_models_own(shared_lesson):
    own = extractor(shared_lesson)
    first, seconds = shared_lesson["cached_features"](own, images(shared_lesson), "test")
    assert distance(first, own.predict(images(shared_lesson), verbose=0)) < 1e-4
    again, same_seconds = shared_lesson["cached_features"](None, images(shared_lesson), "test")
    assert np.array_equal(first, again) and seconds == same_seconds


def test_cached_features_belong_to_images_and_weights(shared_lesson, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("computed anew")

    own = extractor(shared_lesson)
    shared_lesson["cached_features"](own, images(shared_lesson), "belongs")
    own.predict = refuse
    shared_lesson["cached_features"](own, images(shared_lesson), "belongs")
    with pytest.raises(AssertionError, match="computed anew"):
        shared_lesson["cached_features"](own, images(shared_lesson)[::-1].copy(), "belongs")
    monkeypatch.setitem(shared_lesson, "START_SHA256", "another file")
    with pytest.raises(AssertionError, match="computed anew"):
        shared_lesson["cached_features"](own, images(shared_lesson), "belongs")


def test_the_probe_trains_the_last_layer_alone(shared_lesson):
    probe = shared_lesson["compiled_probe"](8, 10)
    assert sorted(tuple(weight.shape) for weight in probe.trainable_weights) == [(8, 10), (10,)]
    stage = shared_lesson["train_probe"](
        "only-head", "probe", SIZE, images(shared_lesson, 100), shared_lesson["y_val"][:100]
    )
    untouched = extractor(shared_lesson).predict(images(shared_lesson), verbose=0)
    assert (
        distance(
            extractor(shared_lesson, stage["model"]).predict(images(shared_lesson), verbose=0), untouched
        )
        < 1e-4
    )
    assert stage["trainable"] == sum(
        np.prod(weight.shape) for weight in stage["model"].get_layer("logits").weights
    )
    assert stage["best"]["accuracy"] > 0.1


def train_a_little(lesson, model):
    """Two steps on 16 images; returns the moving statistics before and after."""
    keras = lesson["keras"]
    # Another test may have asked TensorFlow for determinism, which then refuses to shuffle without a seed.
    keras.utils.set_random_seed(0)
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1e-3), loss, jit_compile=False)
    statistics = [
        s for layer in batchnorms(lesson, model) for s in (layer.moving_mean, layer.moving_variance)
    ]
    before = [np.array(s) for s in statistics]
    targets = np.eye(10)[lesson["y_val"][:16]]
    model.fit(images(lesson), targets, batch_size=8, verbose=0)
    return before, [np.array(s) for s in statistics]


def test_a_fixed_batchnorm_keeps_its_statistics(shared_lesson):
    before, after = train_a_little(shared_lesson, shared_lesson["transfer_model"](SIZE, None, momentum=None))
    assert len(before) > 20
    assert all(np.array_equal(a, b) for a, b in zip(before, after))


def test_a_following_batchnorm_moves_all_its_statistics(shared_lesson):
    before, after = train_a_little(shared_lesson, shared_lesson["transfer_model"](SIZE, None, momentum=0.9))
    assert not any(np.array_equal(a, b) for a, b in zip(before, after))


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_what_trains(lesson, momentum):
    model = lesson["transfer_model"](SIZE, None, momentum=momentum)
    trained = {id(weight) for weight in model.trainable_weights}
    norms = batchnorms(lesson, model)
    of_norms = {id(weight) for layer in norms for weight in layer.weights}
    gains = {id(weight) for layer in norms for weight in (layer.gamma, layer.beta)}
    kernels = {id(weight) for layer in model._flatten_layers() for weight in layer._trainable_variables}
    assert trained == (kernels - of_norms) | (gains if momentum else set())
    assert all(layer.momentum == 0.9 for layer in norms) or momentum is None


def test_a_probes_last_layer_is_the_start_of_fine_tuning(shared_lesson):
    probe = shared_lesson["transfer_model"](SIZE, None)
    probe.get_layer("logits").set_weights(
        [np.full_like(w, 0.25) for w in probe.get_layer("logits").get_weights()]
    )
    model = shared_lesson["transfer_model"](SIZE, None, probe)
    assert all((w == 0.25).all() for w in model.get_layer("logits").get_weights())


def test_a_stage_resumes_where_it_stopped(shared_lesson, monkeypatch, capsys):
    """A fine-tuning that was stopped after an epoch goes on with the next one; its curve holds both.

    That it ends bit for bit as if unbroken is shown in test_interruption.py, for the same shared cells.
    """
    data = dict(
        train=(images(shared_lesson, 32), shared_lesson["y_val"][:32]),
        validation=(images(shared_lesson), shared_lesson["y_val"][:16]),
    )

    def build():
        keras = shared_lesson["keras"]
        model = shared_lesson["transfer_model"](SIZE, None)
        loss = keras.losses.CategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.AdamW(1e-4), loss, metrics=["accuracy"], jit_compile=False)
        return model

    def stop(epochs, epoch, logs):
        if epoch == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(shared_lesson, "report_epoch", stop)
        shared_lesson["train_stage"]("stopped", "tune", build, 2, 16, **data)
    history = shared_lesson["RUN"] / "stopped" / "history.csv"
    first = history.read_text().splitlines()
    assert len(first) == 2
    assert "resumes after epoch 1" not in capsys.readouterr().out
    resumed = shared_lesson["train_stage"]("stopped", "tune", build, 2, 16, **data)
    assert "resumes after epoch 1" in capsys.readouterr().out
    assert [row["epoch"] for row in resumed["history"]] == [0, 1]
    assert history.read_text().splitlines()[:2] == first


def test_weights_come_back_from_a_file_whole(lesson, saved):
    """Statistics and input normalisation too, which set_weights would lose for EfficientNet."""
    base, path = saved
    again = lesson["backbone"](SIZE, path)
    pictures = images(lesson).astype("float32")
    found, expected, fresh = (
        model.predict(pictures, verbose=0) for model in (again, base, lesson["backbone"](SIZE, None))
    )
    assert distance(found, expected) < 1e-4
    assert distance(fresh, expected) > 0.1


def one_error_that_names(path, caught):
    """The error says which file, and what to do, and is not a chain of others."""
    assert path.name in str(caught.value)
    assert any(word in str(caught.value) for word in ("Give weights of", "give a path", "Fetch"))
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def damaged(content):
    """The three ways in which a file can be broken."""
    yield "empty", b""
    yield "truncated", content[: len(content) // 2]
    yield "text", b"<html>404 Not Found</html>"


def test_damaged_weights_are_named(shared_lesson, saved, tmp_path):
    for name, content in damaged(saved[1].read_bytes()):
        path = tmp_path / f"{name}.weights.h5"
        path.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            shared_lesson["backbone"](SIZE, path)
        one_error_that_names(path, caught)


def test_weights_of_another_network_are_named(shared_lesson, tmp_path):
    keras, layers = shared_lesson["keras"], shared_lesson["layers"]
    path = tmp_path / "other.weights.h5"
    keras.Sequential(
        [keras.Input((32, 32, 3)), layers.Conv2D(4, 3), layers.BatchNormalization()]
    ).save_weights(path)
    with pytest.raises(ValueError) as caught:
        shared_lesson["backbone"](SIZE, path)
    one_error_that_names(path, caught)


def test_missing_weights_are_named(shared_lesson, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        shared_lesson["find_weights"](str(tmp_path / "nowhere.weights.h5"))
    one_error_that_names(tmp_path / "nowhere.weights.h5", caught)


def test_a_failed_download_names_the_file_and_its_place(shared_lesson, monkeypatch):
    def offline(*args, **kwargs):
        raise Exception("URL fetch failure")

    monkeypatch.setattr(shared_lesson["keras"].utils, "get_file", offline)
    with pytest.raises(OSError) as caught:
        shared_lesson["find_weights"]("imagenet")
    assert shared_lesson["WEIGHTS_URL"].rsplit("/", 1)[1] in str(caught.value)
    assert os.path.join("~", ".keras", "models").replace(os.sep, "/") in str(caught.value)


def test_the_address_of_the_weights_is_keras_own(lesson):
    """The address is put together from what Keras's own source says."""
    module = sys.modules[lesson["BACKBONE"].__module__]
    address = lesson["WEIGHTS_URL"]
    base = next(
        value
        for name, value in vars(module).items()
        if name.startswith("BASE_WEIGHT") and isinstance(value, str)
    )
    assert address.startswith(base)
    assert address.endswith(("no_top.h5", "notop.h5"))


def test_the_file_at_hand_is_loaded_whole(lesson):
    """Statistics other than the initial ones arrive, those of BatchNorm and of the input normalisation."""
    path = find_weights_file(lesson["NOTEBOOK"])
    if path is None:
        pytest.skip("no weights of this backbone are at hand: set WEIGHTS_DIR to a folder that holds them")
    base = lesson["backbone"](SIZE, path)
    fresh = lesson["backbone"](SIZE, None)
    kinds = (lesson["layers"].BatchNormalization, lesson["layers"].Normalization)
    moved = [
        not np.array_equal(one, other)
        for layer, initial in zip(base.layers, fresh.layers)
        if isinstance(layer, kinds)
        for one, other in zip(layer.get_weights(), initial.get_weights())
    ]
    assert moved and np.mean(moved) > 0.5
