"""What the notebooks with a pretrained backbone rest on: scaling, weights files, BatchNorm, probes, what is thawed."""

import sys
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from notebooks import cell_by_id, cell_namespace, notebook_paths, read

PATHS = notebook_paths()[1:]
SECOND, THIRD, FOURTH, FIFTH = PATHS
SHARED = """presets random-shift augmentation backbone-choice backbone transfer-network count-flops batches backup
settings restore show-curve train-stage trained predict right compiled-probe train-probe compiled""".split()
SIZE, BATCH = 64, 16
pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in ("__array__", "Skipping nested")]
# GFLOP of a prediction at 224 pixels, twice the multiply-adds that the papers give.
PUBLISHED = {SECOND: 0.60, THIRD: 5.7, FOURTH: 0.78, FIFTH: 1.44}


@pytest.fixture(scope="module")
def imported():
    """Names that the import cell gives."""
    return cell_namespace(SECOND, "imports")


def data(count, seed):
    """Images, uint8 (count, 32, 32, 3), that show their class, and labels."""
    rng = np.random.default_rng(seed)
    patterns = np.random.default_rng(9).integers(0, 156, (10, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)
    labels = rng.integers(0, 10, count)
    return (patterns[labels] + rng.integers(0, 100, (count, 32, 32, 3))).astype("uint8"), labels


def lesson(imported, path, run, ids=(), edits=(), **values):
    """Run a notebook's cells in one namespace, with (old, new) edits of their source; return the namespace."""
    names = {**imported, "say": str, "display": str, "SEED": 0, "WEIGHTS": None, "RUN": run, "JIT": False}
    names |= {"DEVICE": "cpu", "DEVICES": 1, "PRECISION": "float32", "COMPILED": {}}
    names["backend"] = names["keras"].backend.backend()
    for kind, count in (("train", 32), ("val", 100)):
        names[f"x_{kind}"], names[f"y_{kind}"] = data(count, count)
    names |= {"x_arm": names["x_train"], "y_arm": names["y_train"]} | values
    left, notebook = dict(edits), read(path)
    for cell_id in [*SHARED, *ids]:
        source = cell_by_id(notebook, cell_id).source
        for old, new in edits:
            if old in source:
                source = source.replace(old, new)
                left.pop(old, None)
        exec(compile(source, f"<{cell_id}>", "exec"), names)
        names |= values
        names["BUDGET"] = names["PRESETS"]["smoke"] | {"batch": BATCH, "probe_batch": BATCH}
        if cell_id == "transfer-network":
            names["blueprint"] = cache(names["transfer_network"])
    assert not left, f"not in the cells: {left}"
    return names


@pytest.fixture(scope="module", params=PATHS, ids=[path.stem for path in PATHS])
def real(request, imported, tmp_path_factory):
    """A notebook's names, and its network with random weights and fixed BatchNorm."""
    names = lesson(imported, request.param, tmp_path_factory.mktemp("real"))
    names["network"] = names["transfer_network"](SIZE)
    return SimpleNamespace(path=request.param, module=sys.modules[names["BACKBONE"].__module__], **names)


@pytest.fixture(scope="module")
def mobile(imported, tmp_path_factory):
    """Notebook 2's names, for tests of cells that all share."""
    return SimpleNamespace(**lesson(imported, SECOND, tmp_path_factory.mktemp("mobile")))


def backbone_in(network):
    """The backbone inside a network."""
    return next(layer for layer in network.layers if hasattr(layer, "layers"))


def norms_in(model):
    """BatchNorm layers of a model, those of models inside it included."""
    return [layer for layer in model._flatten_layers() if type(layer).__name__ == "BatchNormalization"]


class TestNetwork:
    """Networks on real backbones."""

    def test_input_scaling_is_that_of_the_pretraining(self, real):
        pixels = real.x_val[:4].astype("float32")
        wanted = real.module.preprocess_input(pixels.copy())
        np.testing.assert_allclose(np.array(real.input_scaling()(pixels)), wanted, atol=1e-5)

    def test_pictures_are_upscaled_and_scaled_once(self, real):
        pixels = real.x_val[:4].astype("float32")
        larger = np.array(real.ops.image.resize(pixels, (SIZE, SIZE), interpolation="bilinear"))
        base = backbone_in(real.network)
        wanted = np.array(base(real.module.preprocess_input(larger.copy()), training=False)).mean((1, 2))
        pooled = real.keras.Model(real.network.inputs, real.network.get_layer("pooling").output)
        found = np.array(pooled(pixels, training=False))
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())

    def test_operations_are_those_of_the_papers(self, real):
        at_224 = real.count_flops(real.network) * (224 / SIZE) ** 2 / 1e9
        assert at_224 == pytest.approx(PUBLISHED[real.path], rel=0.05)

    @pytest.mark.parametrize("momentum", [None, 0.97])
    def test_batchnorm_is_fixed_or_follows(self, real, momentum):
        network = real.network if momentum is None else real.transfer_network(SIZE, None, momentum)
        norms = norms_in(network)
        assert len(norms) > 20
        of_norms = {id(weight) for norm in norms for weight in norm.weights}
        learning = {id(weight) for weight in network.trainable_weights}
        assert len(learning & of_norms) == (0 if momentum is None else 2 * len(norms))
        kernels = {
            id(v) for layer in network._flatten_layers() for v in layer._trainable_variables
        } - of_norms
        assert kernels <= learning and len(kernels) > 40
        assert momentum is None or {norm.momentum for norm in norms} == {momentum}

    def test_weights_come_back_from_a_file_whole(self, real, tmp_path):
        base, rng = backbone_in(real.network), np.random.default_rng(0)
        for variable in base.weights:
            if variable.dtype == "float32":
                variable.assign(variable + np.abs(rng.normal(0, 0.1, variable.shape)))
        base.save_weights(tmp_path / "good.weights.h5")
        again = real.backbone(SIZE, str(tmp_path / "good.weights.h5"))
        assert [v.shape for v in again.weights] == [v.shape for v in base.weights]
        assert all(map(np.array_equal, again.get_weights(), base.get_weights()))


class TestWeightsFile:
    """Shared by all: what is wrong with the weights is said by name."""

    def assert_named(self, mobile, weights):
        """Loading the weights fails with one error that names them and the network, and says what to do."""
        with pytest.raises(ValueError) as caught:
            mobile.backbone(32, weights)
        message = str(caught.value)
        assert repr(weights) in message and "MobileNetV2" in message and "Set WEIGHTS to" in message
        assert caught.value.__cause__ is None and caught.value.__suppress_context__

    def test_missing(self, mobile, tmp_path):
        self.assert_named(mobile, str(tmp_path / "nowhere.weights.h5"))

    def test_damaged(self, mobile, tmp_path):
        path = tmp_path / "some.weights.h5"
        mobile.backbone(32, None).save_weights(path)
        whole = path.read_bytes()
        for content in (b"", whole[: len(whole) // 2], b"<html>404 Not Found</html>"):
            path.write_bytes(content)
            self.assert_named(mobile, str(path))

    def test_of_another_network(self, mobile, tmp_path):
        layers = [mobile.keras.Input((32, 32, 3)), mobile.layers.Conv2D(4, 3)]
        mobile.keras.Sequential(layers).save_weights(tmp_path / "other.weights.h5")
        self.assert_named(mobile, str(tmp_path / "other.weights.h5"))

    def test_not_downloaded(self, mobile, monkeypatch):
        def offline(*args, **options):
            raise Exception("URL fetch failure")

        monkeypatch.setattr("keras.src.utils.file_utils.get_file", offline)
        self.assert_named(mobile, "imagenet")

    def test_the_home_folder_is_found(self, mobile, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        base = mobile.backbone(32, None)
        base.save_weights(tmp_path / "good.weights.h5")
        again = mobile.backbone(32, "~/good.weights.h5")
        assert all(map(np.array_equal, again.get_weights(), base.get_weights()))


def test_the_input_of_efficientnet_is_checked(imported, tmp_path, monkeypatch):
    """Keras's file holds variances that are deviations; only by its name does it come with the cure."""
    names = SimpleNamespace(**lesson(imported, FOURTH, tmp_path, ["check-input"]))
    base, images = names.backbone(32, None), np.random.default_rng(0).normal(115, 58, (100, 32, 32, 3))
    images = images.clip(0, 255).astype("uint8")
    norm = next(layer for layer in base.layers if isinstance(layer, names.layers.Normalization))
    path, deviations = tmp_path / "some.weights.h5", np.array([0.229, 0.224, 0.225])
    for variance, right in ((deviations, False), (deviations**2, True)):
        mean, values, *count = norm.get_weights()
        values = [np.reshape([0.485, 0.456, 0.406], mean.shape), np.reshape(variance, values.shape), *count]
        norm.set_weights(values)
        base.save_weights(path)
        loaded = names.backbone(32, str(path))
        if right:
            wanted = (images / 255 / deviations).std()
            assert names.check_input(loaded, images, str(path)) == pytest.approx(wanted, rel=0.05)
        else:
            with pytest.raises(ValueError, match="lacks the rescaling") as caught:
                names.check_input(loaded, images, str(path))
            assert repr(str(path)) in str(caught.value) and "0.4" in str(caught.value)
            monkeypatch.setattr("keras.src.utils.file_utils.get_file", lambda *args, **options: str(path))
            assert 0.75 < names.check_input(names.backbone(32, "imagenet"), images, "imagenet") < 1.5
            monkeypatch.undo()


def test_statistics_are_measured_again(imported, tmp_path):
    """Each batch counts the same, what was there before not at all; nothing else moves."""
    names = SimpleNamespace(**lesson(imported, SECOND, tmp_path, ["measure-again"]))
    layers, images = names.layers, names.keras.Input((32, 32, 3))
    norm = layers.BatchNormalization(trainable=False, name="norm")
    inner = names.keras.Model(images, norm(images))
    later = layers.BatchNormalization(momentum=0.5)
    network = names.keras.Model(images, layers.Dense(3)(later(2 * inner(images))))
    norm.trainable = True
    norm.set_weights([np.ones(3), np.zeros(3), np.full(3, 77.0), np.full(3, 5.0)])
    pictures, _ = data(400, 0)
    before = network.trainable_variables[-2].numpy()
    names.measure_again(network, pictures)
    parts = pictures.reshape(4, -1, 3).astype("float64")
    np.testing.assert_allclose(norm.moving_mean, parts.mean((0, 1)), rtol=1e-3)
    np.testing.assert_allclose(norm.moving_variance, parts.var(1).mean(0), rtol=1e-2)
    np.testing.assert_allclose(later.moving_mean, 0, atol=0.01)
    np.testing.assert_allclose(later.moving_variance, 4, rtol=0.01)
    np.testing.assert_array_equal(network.trainable_variables[-2], before)


def test_a_probe_does_what_a_logistic_regression_does(imported, tmp_path):
    """On made data: alike in accuracy and, mostly, in what it answers; costs and hits are its own."""
    from sklearn.linear_model import LogisticRegression

    names = lesson(imported, SECOND, tmp_path)
    names["BUDGET"] |= {"probe_epochs": 60, "probe_batch": 50}
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(48, 10))

    def made(count):
        coarse = rng.integers(0, 256, (count, 4, 4, 3))
        noisy = (coarse.reshape(count, 48) - 128) / 74 @ directions + rng.normal(0, 2, (count, 10))
        return coarse.repeat(8, 1).repeat(8, 2).astype("uint8"), noisy.argmax(1)

    def pooled_network(size, weights):
        layers, images = names["layers"], names["keras"].Input((32, 32, 3))
        x = layers.AveragePooling2D(8)(layers.Rescaling(1 / 25, -128 / 25)(images))
        x = layers.Flatten(name="pooling")(x)
        return names["keras"].Model(images, layers.Dense(10, name="logits")(x))

    (x, y), (names["x_val"], names["y_val"]) = made(1500), made(1000)
    names["transfer_network"] = pooled_network
    stage = names["train_probe"]("probe", "a probe", 32, x, y)
    known, new = ((part[:, ::8, ::8].reshape(-1, 48) - 128.0) / 25 for part in (x, names["x_val"]))
    rival = LogisticRegression(max_iter=1000).fit(known, y)
    answers = names["predict"](stage["network"], names["x_val"]).argmax(1)
    assert stage["hits"].mean() == pytest.approx(100 * rival.score(new, names["y_val"]), abs=5)
    assert stage["hits"].mean() > 50 and (answers == rival.predict(new)).mean() > 0.8
    np.testing.assert_array_equal(stage["hits"], 100.0 * (answers == names["y_val"]))
    assert stage["history"][-1]["val_accuracy"] == pytest.approx(stage["hits"].mean() / 100)
    once, step = 2 * 48 * 10, 2 * 2 * 48 * 10
    assert stage["training_flops"] == once * 1500 + step * 1500 * 60


@pytest.fixture(scope="module")
def dense(imported, tmp_path_factory):
    """Notebook 3's names, as with pretrained weights, and its real backbone."""
    ids = ["show-parts", "thaw", "phases-of"]
    return SimpleNamespace(**lesson(imported, THIRD, tmp_path_factory.mktemp("thaw"), ids, MOMENTUM=None))


class TestThawing:
    """Notebook 3, on the real backbone and with its real parts."""

    def test_each_choice_thaws_its_parts_but_no_batchnorm(self, dense):
        counts = {}
        for title, choice in dense.CHOICES.items():
            assert all(set(a) < set(b) for a, b in zip(choice, choice[1:])), "more and more"
            for parts in choice:
                network = dense.thaw(dense.blueprint, parts)
                weights = {id(weight) for weight in network.get_layer("logits").weights}
                for layer in dense.base.layers:
                    if layer.name.split("_")[0] in parts and layer not in norms_in(network):
                        weights |= {id(weight) for weight in layer.weights}
                assert {id(weight) for weight in network.trainable_weights} == weights
            counts[title[1]] = len(weights)
        assert counts["a"] == 2 < counts["b"] < counts["c"] == counts["d"]
        assert {layer.name.split("_")[0] for layer in dense.base.layers if layer.weights} <= {*dense.PARTS}

    def test_epochs_are_divided_among_phases(self, dense):
        c, d = dense.CHOICES["(c) block by block"], dense.CHOICES["(d) everything"]
        assert dense.phases_of(c, [96] * 8) == [(c[0], 96, 3), (c[1], 96, 3), (c[2], 96, 2)]
        assert dense.phases_of(d, [64, 64, 96]) == [(d[0], 64, 2), (d[0], 96, 1)]
        assert dense.phases_of(c, [32] * 2) == [(c[0], 32, 1), (c[1], 32, 1)]
