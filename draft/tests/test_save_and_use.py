"""Section 9: the saved model leaves the notebook, for any backend, as a small file, and sees anybody's pictures."""

import io
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
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


def namespace_for(folder, network, **values):
    """Namespace of the shared cells with `final`, the deployable model of a trained network."""
    (x, y), (x_test, y_test) = learnable(2000, 1), learnable(500, 2)
    values = {"x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test, "CLASSES": CLASSES} | values
    values |= {"NOTEBOOK": "small", "PRESET_NAME": "smoke", "RUN": Path(folder), "DEVICES": 1}
    namespace = cell_namespace(
        NOTEBOOK, "imports", "say", "table", "predict", "right", "deployable", **values
    )
    keras = namespace["keras"]
    namespace |= {"backend": keras.backend.backend(), "view": namespace["predict"], "said": []}
    namespace["say"] = namespace["said"].append
    namespace["final"] = namespace["deployable"](network, small_network)
    execute(namespace, "read-picture", "interpreters", "measured", "convert-all")
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
    namespace = namespace_for(tmp_path_factory.mktemp("run"), network, trained=network)
    namespace["policy_after"] = namespace["keras"].config.dtype_policy().name
    execute(namespace, "measure-all", "formats-table", "plot-formats", "recommend", "speed")
    return namespace


def require_tensorflow(small):
    """Skip where LiteRT files cannot be made."""
    if small["backend"] != "tensorflow":
        pytest.skip("LiteRT files are made on TensorFlow")


def scores_of(namespace, title):
    """Probabilities of the test images from one of the files, with its interpreter."""
    [row] = [row for row in namespace["formats"] if row["format"] == title]
    if row["note"].startswith("pip install"):
        pytest.skip(row["note"])
    assert row["note"] == ""
    run = namespace["opened"](namespace["RUN"] / row["file"])
    return np.array([run(image[None])[0] for image in namespace["x_test"]])


def test_deployable_is_float32_and_keeps_the_policy(small):
    layers = small["final"]._flatten_layers()
    assert {layer.compute_dtype for layer in layers} == {"float32"}
    assert small["policy_after"] == "mixed_bfloat16"
    logits = small["trained"].predict(small["x_test"].astype("float32"), verbose=0)
    scores = small["predict"](small["final"], small["x_test"])
    assert np.mean(logits.argmax(1) == scores.argmax(1)) > 0.97
    assert np.allclose(scores.sum(axis=1), 1, atol=1e-5)
    assert 60 < small["exact"]


def test_input_statistics_come_along(small):
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
    final = small["deployable"](trained, network)
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
        load(small["RUN"] / "small.keras").predict(wrong, verbose=0)
    used = load(small["RUN"] / "small.keras")
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
        small["RUN"] / "small.keras",
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
    sizes = {row["format"]: row["bytes"] for row in small["formats"]}
    assert sizes["LiteRT full int8"] < sizes["LiteRT float32"] / 2


def test_full_int8_has_no_floats(small):
    require_tensorflow(small)
    lite = pytest.importorskip("ai_edge_litert.interpreter")
    interpreter = lite.Interpreter(str(small["RUN"] / "small-int8.tflite"))
    run = interpreter.get_signature_runner()
    details = run.get_input_details()["pixels"], run.get_output_details()["probabilities"]
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
    good = [row for row in small["formats"] if row["bytes"] and small["exact"] - row["accuracy"] <= 0.5]
    assert small["recommended"] == min(good, key=lambda row: row["bytes"])["file"]
    assert any(small["recommended"] in text for text in small["said"])


def test_a_second_run_takes_over_what_was_measured(small):
    run = small["RUN"]
    formats = [row | {"note": ""} for row in small["formats"]]
    (run / "result.json").write_text(json.dumps({"formats": formats}))
    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    again = dict(small)
    execute(again, "measure-all", "formats-table", "recommend", "speed")
    assert again["formats"] == formats
    assert before == {path: path.stat().st_mtime_ns for path in run.iterdir()}
    (run / "result.json").unlink()


def test_missing_packages_become_rows(small, tmp_path, monkeypatch):
    require_tensorflow(small)
    for name in ("tf2onnx.convert", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    namespace = dict(small) | {"RUN": tmp_path}
    row = small["measured"](
        "a", tmp_path / "small.onnx", small["write_onnx"], small["x_test"], small["y_test"]
    )
    assert row["note"] == "pip install tf2onnx" and row["accuracy"] is None
    (tmp_path / "small.onnx").write_bytes(b"")
    row = small["measured"](
        "a", tmp_path / "small.onnx", small["write_onnx"], small["x_test"], small["y_test"]
    )
    assert row["note"] == "pip install onnxruntime"
    namespace["formats"] = [small["formats"][0], row]
    execute(namespace, "formats-table", "plot-formats", "recommend", "speed")
    assert namespace["recommended"] == "small.keras"


def test_a_failed_conversion_becomes_a_row(small, tmp_path):
    def fail(path):
        raise RuntimeError("no such operation\nmore")

    row = small["measured"]("a", tmp_path / "a.tflite", fail, small["x_test"], small["y_test"])
    assert row["note"] == "no such operation" and row["bytes"] is None
    assert not list(tmp_path.iterdir())


def picture_files(folder):
    """Write pictures of many kinds, red in the middle; return their paths."""
    red, wide = Image.new("RGB", (64, 48), (200, 30, 30)), Image.new("RGB", (4000, 3000), (200, 30, 30))
    clear = Image.new("RGBA", (50, 50), (0, 0, 0, 0))
    grey16 = Image.fromarray(np.full((40, 40), 40_000, "uint16"))
    frames = [Image.new("RGB", (40, 40), color) for color in ((200, 30, 30), (0, 0, 255))]
    exif = Image.Exif()
    exif[0x0112] = 6
    wide.save(folder / "photo.jpg", exif=exif)
    clear.save(folder / "transparent.png")
    red.convert("L").save(folder / "grey.jpg")
    red.resize((16, 16)).save(folder / "icon.png")
    red.convert("P").save(folder / "palette.png")
    red.convert("CMYK").save(folder / "cmyk.jpg")
    grey16.save(folder / "grey16.png")
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    return sorted(folder.iterdir())


def test_own_pictures_of_every_kind(small, tmp_path):
    found = {path.name: small["read_picture"](str(path)) for path in picture_files(tmp_path)}
    assert {picture.mode for picture in found.values()} == {"RGB"}
    assert found["photo.jpg"].size == (3000, 4000)
    middle = {
        name: picture.getpixel((picture.width // 2, picture.height // 2)) for name, picture in found.items()
    }
    assert middle["transparent.png"] == (255, 255, 255)
    assert abs(middle["grey16.png"][0] - 40_000 / 257) < 3
    for name in ("photo.jpg", "icon.png", "palette.png", "cmyk.jpg", "animated.gif"):
        assert np.abs(np.subtract(middle[name], (200, 30, 30))).max() < 30, name


@pytest.mark.parametrize("name", ["photo.jpg", "transparent.png", "icon.png", ""])
def test_own_picture_cell(small, tmp_path, name):
    picture_files(tmp_path)
    namespace = dict(small) | {"said": []}
    namespace["say"] = namespace["said"].append
    source = cell_by_id(read(NOTEBOOK), "own-pictures").source
    place = str(tmp_path / name) if name else ""
    exec(source.replace('PICTURE = ""', f"PICTURE = {place!r}"), namespace)
    assert len(namespace["said"]) == (1 if name else 3)
    assert all(text.startswith("The model says **") for text in namespace["said"])
    assert namespace["pixels"].size == (32, 32)
    assert namespace["plt"].get_fignums()


class Answers(BaseHTTPRequestHandler):
    """A web server that has one picture and nothing else."""

    def do_GET(self):
        """Answer with a PNG picture, or 404."""
        found = self.path == "/picture.png"
        self.send_response(200 if found else 404)
        self.end_headers()
        if found:
            data = io.BytesIO()
            Image.new("RGB", (40, 40), "red").save(data, "PNG")
            self.wfile.write(data.getvalue())

    def log_message(self, *arguments):
        """Print nothing."""


def test_own_picture_from_the_web(small):
    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    assert small["read_picture"](f"{address}/picture.png").size == (40, 40)
    for place in (f"{address}/nothing.png", "http://127.0.0.1:9/picture.png"):
        with pytest.raises(ValueError, match=f"'{place}' could not be read as a picture.*PICTURE must be"):
            small["read_picture"](place)
    server.shutdown()
    server.server_close()


def test_what_is_no_picture_is_named(small, tmp_path):
    (tmp_path / "text.png").write_text("This is a text.")
    for name in ("text.png", "missing.png", "."):
        with pytest.raises(ValueError, match="could not be read as a picture.*path or the web address"):
            small["read_picture"](str(tmp_path / name))


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
        here = here[:start] + str(small["RUN"] / file) + here[here.index('"', start) :]
        command = [sys.executable, "-c", here]
        done = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.split() == [CLASSES[scores.argmax()]]
