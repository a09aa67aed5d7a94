"""Section 9: the saved model leaves the notebook, for any backend, as a small file, and sees anybody's pictures."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import CLASSES, ROOT, require_backend
from notebooks import cell_by_id, cell_namespace, read
from PIL import Image

NOTEBOOK = Path(os.environ.get("SECTION_9_NOTEBOOK", ROOT / "1_CNN_Model.ipynb"))
FLOATS = ("LiteRT float32", "ONNX float32")
SCALES = {
    "0 to 255": lambda x: x.astype("float32"),
    "0 to 1": lambda x: x / 255,
    "-1 to 1": lambda x: x / 127.5 - 1,
}

LOAD = """
import sys, keras, numpy as np
x = np.load(sys.argv[2])
model = keras.saving.load_model(sys.argv[1])
assert {layer.compute_dtype for layer in model._flatten_layers()} == {"float32"}
assert {layer.__class__.__module__.split(".")[0] for layer in model._flatten_layers()} == {"keras"}
scales = x, x.astype("float32"), x / 255, x / 127.5 - 1
np.save(sys.argv[3], np.stack([model.predict(pictures, verbose=0) for pictures in scales]))
"""


def execute(namespace, *ids):
    """Execute more cells of the notebook in a namespace that `cell_namespace` gave."""
    notebook = read(NOTEBOOK)
    for cell_id in ids:
        exec(compile(cell_by_id(notebook, cell_id).source, f"<{cell_id}>", "exec"), namespace)


def learnable(images, seed):
    """Images, uint8 (n, 32, 32, 3), and labels (n,): a faint pattern for each class below much noise."""
    patterns = np.random.default_rng(0).integers(0, 2, (10, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, images)
    pixels = 40 * patterns[labels] + rng.integers(0, 216, (images, 32, 32, 3))
    return pixels.clip(0, 255).astype("uint8"), labels


def small_network():
    """A CNN with BatchNorm from float pixels 0 to 255 to logits, in the dtype policy of the moment."""
    import keras
    from keras import layers

    inputs = keras.Input((32, 32, 3))
    x = layers.Rescaling(1 / 255)(inputs)
    for filters in (8, 16, 32):
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = layers.MaxPooling2D()(layers.ReLU()(layers.BatchNormalization(momentum=0.8)(x)))
    x = layers.Dense(10, dtype="float32", name="logits")(layers.Flatten()(x))
    return keras.Model(inputs, x, name="network")


def trained_network(policy, train):
    """`small_network` after a minute at most of training in that dtype policy."""
    import keras

    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)
    network = small_network()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
    network.fit(*train, 50, epochs=5, verbose=0)
    return network


def training_model(network):
    """A model as the notebook trains it: uint8 images to logits, by a network."""
    import keras

    inputs = keras.Input((32, 32, 3), dtype="uint8")
    return keras.Model(inputs, network(keras.ops.cast(inputs, "float32")))


def stage_of(folder, network):
    """A finished stage, in a folder, that ended with this network."""
    path = Path(folder) / "stage" / "epoch-0001.keras"
    path.parent.mkdir(parents=True, exist_ok=True)
    training_model(network).save(path)
    return {"file": path}


def namespace_for(folder, network, **values):
    """Namespace of the shared cells with `final`, the deployable model of a trained network."""
    for part, data in (
        ("train", learnable(2000, 1)),
        ("val", learnable(300, 3)),
        ("test", learnable(500, 2)),
    ):
        values |= {f"x_{part}": data[0], f"y_{part}": data[1]}
    values |= {"NOTEBOOK": "small", "PRESET_NAME": "quick", "RUN": Path(folder), "DEVICES": 1}
    cells = "imports say table count-flops predict right trained deployable".split()
    namespace = cell_namespace(NOTEBOOK, *cells, CLASSES=CLASSES, **values)
    keras, stage = namespace["keras"], stage_of(folder, network)
    namespace |= {"backend": keras.backend.backend(), "view": namespace["predict"], "said": []}
    namespace |= {
        "say": namespace["said"].append,
        "stages": [stage],
        "folder": stage["file"].parent / "files",
    }
    namespace["final"] = namespace["deployable"](stage, lambda: training_model(small_network()))
    execute(namespace, "read-picture", "write-files", "measured")
    return namespace


@pytest.fixture(autouse=True)
def float32_after():
    """Leave Keras's dtype policy as it was, and draw without a screen."""
    import keras
    import matplotlib

    matplotlib.use("agg")
    yield
    keras.config.set_dtype_policy("float32")
    matplotlib.pyplot.close("all")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Namespace after section 9 on a CNN that was trained in bfloat16."""
    network = trained_network("mixed_bfloat16", learnable(2000, 1))
    namespace = namespace_for(tmp_path_factory.mktemp("run"), network)
    namespace["before"] = network
    namespace["policy_after"] = namespace["keras"].config.dtype_policy().name
    execute(namespace, "measure-all", "formats-table", "plot-formats", "recommend")
    return namespace


def require_tensorflow(small):
    """Skip where LiteRT files cannot be made."""
    if small["backend"] != "tensorflow":
        pytest.skip("LiteRT files are made on TensorFlow")


def scores_of(namespace, title):
    """Probabilities of the test images from one of the files, with its interpreter."""
    [row] = [row for row in namespace["formats"] if row["format"] == title]
    if "pip install" in row.get("note", ""):
        pytest.skip(row["note"])
    assert "note" not in row
    run = namespace["opened"](namespace["RUN"] / row["file"])
    return np.array([run(image[None])[0] for image in namespace["x_test"]])


def test_deployable_is_float32_and_keeps_the_policy(small):
    layers = small["final"]._flatten_layers()
    assert {layer.compute_dtype for layer in layers} == {"float32"}
    assert small["policy_after"] == "mixed_bfloat16"
    logits = small["before"].predict(small["x_test"].astype("float32"), verbose=0)
    scores = small["predict"](small["final"], small["x_test"])
    assert np.mean(logits.argmax(1) == scores.argmax(1)) > 0.97
    assert np.allclose(scores.sum(axis=1), 1, atol=1e-5)
    assert 60 < small["formats"][0]["test"]


def test_input_statistics_come_along(small, tmp_path):
    keras = small["keras"]

    def network():
        inputs = keras.Input((32, 32, 3))
        x = keras.layers.Normalization(axis=-1)(inputs)
        x = keras.layers.GlobalAveragePooling2D()(x)
        return keras.Model(inputs, keras.layers.Dense(10)(x), name="network")

    trained = network()
    trained.layers[1].adapt(small["x_train"][:100].astype("float32"))
    x = small["x_test"][:50]
    expected = small["ops"].softmax(trained.predict(x.astype("float32"), verbose=0))
    final = small["deployable"](stage_of(tmp_path, trained), lambda: training_model(network()))
    assert np.allclose(small["predict"](final, x), small["ops"].convert_to_numpy(expected), atol=1e-5)


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_gives_the_same_answer(small, scale):
    final, x = small["final"], small["x_test"][:100]
    assert np.allclose(small["predict"](final, x), small["predict"](final, SCALES[scale](x)), atol=1e-5)
    one = small["predict"](final, SCALES[scale](x)[7:8])
    assert np.allclose(one, small["predict"](final, x)[7:8], atol=1e-5)


def wrong_shapes(x):
    """Pictures (n, 32, 32, 3) in shapes that a model must refuse."""
    yield "grey", x[..., :1]
    yield "grey, no channel axis", x[..., 0]
    yield "RGBA", np.concatenate([x, x[..., :1]], axis=-1)
    yield "other size", x[:, :28, :28]
    yield "one picture without a batch", x[0]
    yield "channels first", x.transpose(0, 3, 1, 2)


@pytest.mark.parametrize("number", range(6))
def test_wrong_shapes_are_refused(small, number):
    name, wrong = list(wrong_shapes(small["x_test"][:40]))[number]
    load = small["keras"].saving.load_model
    with pytest.raises(Exception, match=r"32, ?32, ?3[)\]]"):
        load(small["folder"] / "small.keras").predict(wrong, verbose=0)
    used = load(small["folder"] / "small.keras")
    used.predict(small["x_test"][:40], verbose=0)
    with pytest.raises(Exception):  # noqa: B017 TensorFlow's message, once a right shape was seen
        used.predict(wrong, verbose=0)


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_keras_file_in_a_fresh_process(small, backend, tmp_path):
    require_backend(backend)
    np.save(tmp_path / "x.npy", small["x_test"][:100])
    command = [
        sys.executable,
        "-c",
        LOAD,
        small["folder"] / "small.keras",
        tmp_path / "x.npy",
        tmp_path / "y.npy",
    ]
    env = os.environ | {"KERAS_BACKEND": backend, "CUDA_VISIBLE_DEVICES": "-1"}
    subprocess.run([*map(str, command)], check=True, cwd=tmp_path, env=env)
    expected = small["predict"](small["final"], small["x_test"][:100])
    for scores in np.load(tmp_path / "y.npy"):
        assert np.allclose(scores, expected, atol=1e-5)


@pytest.mark.parametrize("title", FLOATS)
def test_float_formats_agree(small, title):
    require_tensorflow(small)
    expected, scores = small["predict"](small["final"], small["x_test"]), scores_of(small, title)
    assert np.array_equal(scores.argmax(axis=1), expected.argmax(axis=1))
    assert np.abs(scores - expected).max() < 1e-4


def test_int8_agrees(small):
    require_tensorflow(small)
    expected = small["predict"](small["final"], small["x_test"]).argmax(axis=1)
    for title in ("LiteRT int8 weights", "LiteRT full int8"):
        assert np.mean(scores_of(small, title).argmax(axis=1) == expected) >= 0.97
    sizes = {row["format"]: row["MB"] for row in small["formats"]}
    assert sizes["LiteRT full int8"] < sizes["LiteRT float32"] / 2


def test_full_int8_has_no_floats(small):
    require_tensorflow(small)
    lite = pytest.importorskip("ai_edge_litert.interpreter")
    interpreter = lite.Interpreter(str(small["folder"] / "small-int8.tflite"))
    run = interpreter.get_signature_runner()
    details = [*run.get_input_details().values(), *run.get_output_details().values()]
    assert [detail["dtype"] for detail in details] == [np.uint8, np.uint8]
    kinds = {tensor["dtype"] for tensor in interpreter.get_tensor_details()}
    assert np.float32 not in kinds


def test_float16_training_becomes_float32_and_converts(small, tmp_path):
    require_tensorflow(small)
    network = trained_network("mixed_float16", learnable(200, 1))
    namespace = namespace_for(tmp_path, network)
    assert {layer.compute_dtype for layer in namespace["final"]._flatten_layers()} == {"float32"}
    execute(namespace, "measure-all")
    for title in FLOATS:
        expected = namespace["predict"](namespace["final"], namespace["x_test"])
        assert np.abs(scores_of(namespace, title) - expected).max() < 1e-4


def test_the_smallest_good_file_is_recommended(small):
    """Validation images choose, test images do not."""
    good = [row for row in small["formats"] if small["formats"][0]["validation"] - row["validation"] <= 0.5]
    assert small["recommended"] == min(good, key=lambda row: row["MB"])["file"]
    assert any(small["recommended"] in text for text in small["said"])
    rows = [
        {"format": f, "file": f, "MB": mb, "validation": v, "test": t}
        for f, mb, v, t in (("whole", 4, 90, 90), ("lucky", 1, 89, 91), ("good", 2, 89.6, 80))
    ]
    namespace = dict(small) | {"formats": rows}
    execute(namespace, "recommend")
    assert namespace["recommended"] == "good"


def test_files_that_are_there_are_left_alone(small):
    before = {path: path.stat().st_mtime_ns for path in small["folder"].iterdir()}
    again = dict(small)
    execute(again, "measure-all")
    assert len(before) >= 4
    assert before == {path: path.stat().st_mtime_ns for path in small["folder"].iterdir()}
    timeless = [[row | {"milliseconds": 0} for row in names["formats"]] for names in (small, again)]
    assert timeless[0] == timeless[1]


def test_missing_packages_become_rows(small, monkeypatch):
    require_tensorflow(small)
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    path = small["folder"] / "small.tflite"
    row = small["measured"]("a", path, small["write_litert"], small["parts"])
    assert row["note"].startswith("pip install ai-edge-litert") and "MB" not in row
    namespace = dict(small) | {"formats": [small["formats"][0], row]}
    execute(namespace, "formats-table", "plot-formats", "recommend")
    assert namespace["recommended"] == small["formats"][0]["file"]
    assert "pip install ai-edge-litert" in namespace["said"][-2]


def test_a_failed_conversion_becomes_a_row(small):
    def fail(path):
        raise RuntimeError("no such operation\nmore")

    row = small["measured"]("a", small["folder"] / "a.tflite", fail, small["parts"])
    assert row["note"] == "no such operation" and "MB" not in row
    assert not (small["folder"] / "a.tflite").exists()


def test_readme_snippet(small, tmp_path):
    require_tensorflow(small)
    pytest.importorskip("ai_edge_litert")
    text = Path(os.environ.get("README", ROOT / "README.md")).read_text()
    codes = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    [code] = [code for code in codes if "Interpreter(" in code] or [None]
    if code is None:
        pytest.skip("README has no snippet yet")
    assert len([line for line in code.split("\n") if line and "import" not in line]) <= 5
    for file in ("small.tflite", "small-int8.tflite", "small-int8-weights.tflite"):
        scores = small["predict"](small["final"], small["x_test"][:1])[0]
        Image.fromarray(small["x_test"][0]).save(tmp_path / "picture.png")
        here = code.replace("picture.jpg", "picture.png")
        start = here.index('Interpreter("') + len('Interpreter("')
        here = here[:start] + str(small["folder"] / file) + here[here.index('"', start) :]
        command = [sys.executable, "-c", here]
        done = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.split() == [CLASSES[scores.argmax()]]
