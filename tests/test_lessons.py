"""What the notebooks teach and compute without a pretrained backbone is true."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from notebooks import cell_namespace, notebook_paths, read
from scipy import stats

FIRST, SECOND, THIRD, FOURTH, FIFTH = notebook_paths()
PEAK = 0.5
pytestmark = pytest.mark.filterwarnings("ignore:__array__")


@pytest.fixture(scope="session")
def names():
    """Names that all cells may use; a copy for each, since the import cell takes a while."""
    return cell_namespace(FIRST, "imports")


@pytest.fixture
def cells(names):
    """A function that runs cells of a notebook over values, and returns their names."""

    def run(path, *ids, **values):
        return SimpleNamespace(**cell_namespace(path, *ids, **{**names, "say": str, **values}))

    return run


def random_images(count=64):
    """Random images, uint8 (count, 32, 32, 3)."""
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def rate_at(schedule, step):
    """The rate of a schedule, or a constant rate, as a share of the peak."""
    return float(schedule(step) if callable(schedule) else schedule) / PEAK


class TestAugmentation:
    """Shared by all."""

    @pytest.mark.parametrize("kind", ["uint8", "float32"])
    def test_a_shift_moves_whole_images_and_mirrors_the_border(self, cells, kind):
        layer, images = cells(FIRST, "random-shift").RandomShift(4), random_images(300).astype(kind)
        moved, seen = np.array(layer(images, training=True)), set()
        mirrored = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")
        windows = [(row, column) for row in range(9) for column in range(9)]
        for number, image in enumerate(moved):
            fits = [
                (r, c) for r, c in windows if np.array_equal(image, mirrored[number, r : r + 32, c : c + 32])
            ]
            assert len(fits) == 1, "each image is moved by whole pixels, at most 4"
            seen.update(fits)
        assert [{place[axis] for place in seen} for axis in (0, 1)] == [set(range(9))] * 2

    def test_half_of_the_images_are_mirrored(self, cells):
        space = cells(FIRST, "random-shift", "augmentation")
        images = random_images(200)
        moved = np.array(space.augmentation(0)(images.astype("float32"), training=True))
        plain, mirrored = ((moved == each).all((1, 2, 3)) for each in (images, images[:, :, ::-1]))
        assert (plain ^ mirrored).all() and 0.3 < mirrored.mean() < 0.7

    def test_prediction_sees_the_images_as_they_are(self, cells):
        layer, images = cells(FIRST, "random-shift", "augmentation").augmentation(), random_images()
        np.testing.assert_array_equal(layer(images, training=False), images)

    def test_cutout_paints_a_square_that_may_stick_out(self, cells):
        layer, images = cells(FOURTH, "cutout").Cutout(8), random_images(300).astype("float32")
        images[images == 120] = 121
        painted = np.array(layer(images, training=True))
        hidden = (painted == 120).all(-1)
        np.testing.assert_array_equal(painted[~hidden], images[~hidden])
        rows, columns = hidden.any(2), hidden.any(1)
        np.testing.assert_array_equal(hidden, rows[:, :, None] & columns[:, None, :])
        for side in (rows, columns):
            assert set(side.sum(1)) == {4, 5, 6, 7, 8} and (side.sum(1) == 8).mean() > 0.6
            assert (np.abs(np.diff(side, axis=1)).sum(1) <= 2).all(), "in one piece"
            assert side.any(0).all(), "everywhere"
        np.testing.assert_array_equal(layer(images, training=False), images)


class TestModernRecipe:
    """Notebook 1."""

    def test_whitening_decorrelates(self, cells):
        x_train = np.random.default_rng(0).normal(size=(400, 35, 35, 3)).cumsum(1).cumsum(2)
        x_train = np.clip(100 + 5 * x_train[:, 3:, 3:], 0, 255).astype("uint8")
        space = cells(FIRST, "whitening", x_train=x_train)
        images = (x_train / 255 - space.mean) / space.std
        assert np.abs(images.mean((0, 1, 2))).max() < 1e-3 and np.abs(images.std((0, 1, 2)) - 1).max() < 1e-3
        answers = np.array(space.keras.ops.conv(images.astype("float32"), space.filters, padding="valid"))
        np.testing.assert_allclose(answers[..., 12:], -answers[..., :12], atol=1e-3)
        moments = (answers[..., :12].reshape(-1, 12).T @ answers[..., :12].reshape(-1, 12)) / answers[
            ..., 0
        ].size
        strong = np.diag(moments) > 0.9  # the others are weaker than epsilon
        assert strong.sum() > 3 and np.diag(moments).max() < 1.01
        np.testing.assert_allclose(moments - np.diag(np.diag(moments)), 0, atol=0.01)
        few = np.lib.stride_tricks.sliding_window_view(images, (2, 2), axis=(1, 2)).reshape(-1, 12)
        assert np.abs(np.corrcoef(few.T) - np.eye(12)).max() > 0.5, "before, they hung together"

    @pytest.mark.parametrize("shape", [(3, 3, 8, 4), (3, 3, 4, 8), (3, 3, 4, 4)])
    def test_a_convolution_begins_as_the_identity(self, cells, shape):
        values = {"filters": None, "mean": None, "std": None}
        space, images = (
            cells(FIRST, "modern-cnn", **values),
            np.random.default_rng(0).normal(size=(2, 6, 6, shape[2])),
        )
        layer = space.layers.Conv2D(shape[3], 3, padding="same", use_bias=False)
        layer.build(images.shape)
        space.begin_as_identity(layer)
        kept = min(shape[2:])
        np.testing.assert_allclose(np.array(layer(images))[..., :kept], images[..., :kept], atol=1e-5)
        assert np.any(np.array(layer.kernel)[..., kept:]) == (shape[3] > kept)

    def test_orthogonalised_makes_singular_values_alike(self, cells):
        orthogonalised = cells(FIRST, "orthogonalised").orthogonalised
        left, _, right = np.linalg.svd(np.random.default_rng(0).normal(size=(60, 20)), full_matrices=False)
        values = np.linspace(1, 10, 20)
        found = left.T @ np.array(orthogonalised((left * values @ right).astype("float32"))) @ right.T
        singular = values / np.linalg.norm(values)
        for _ in range(3):
            singular = 3.4445 * singular - 4.7750 * singular**3 + 2.0315 * singular**5
        np.testing.assert_allclose(found, np.diag(singular), atol=1e-3)
        assert singular.max() / singular.min() < 2.2, "it was 10"
        more = np.array(orthogonalised((left * values @ right).astype("float32"), steps=6))
        assert np.abs(np.linalg.svd(more, compute_uv=False) - 1).max() < 0.4

    def test_muon_moves_filters_biases_and_the_last_layer(self, cells):
        space, rng = cells(FIRST, "orthogonalised", "muon"), np.random.default_rng(0)
        shapes, rate, decay = [(3, 3, 4, 8), (8,), (8, 10)], 0.7, 0.013
        variables = [space.keras.Variable(rng.normal(size=shape), dtype="float32") for shape in shapes]
        expected, momentum = [np.array(variable) for variable in variables], [0, 0, 0]
        optimizer = space.Muon(rate, momentum=0.85, nesterov=True, weight_decay=decay)
        for _ in range(3):
            gradients = [rng.normal(size=shape).astype("float32") for shape in shapes]
            optimizer.apply([space.ops.convert_to_tensor(gradient) for gradient in gradients], variables)
            momentum[0] = 0.6 * momentum[0] + gradients[0]
            update = (gradients[0] + 0.6 * momentum[0]).reshape(36, 8)
            step = np.array(space.orthogonalised(update)).reshape(shapes[0])
            expected[0] = expected[0] * 8**0.5 / np.linalg.norm(expected[0]) - 0.2 * rate * step
            for i, peak in ((1, 53.0), (2, 0.01)):
                momentum[i] = 0.85 * momentum[i] - peak * rate * gradients[i]
                expected[i] = expected[i] * (1 - decay * rate) + 0.85 * momentum[i]
                expected[i] = expected[i] - peak * rate * gradients[i]
        for variable, wanted in zip(variables, expected):
            np.testing.assert_allclose(np.array(variable), wanted, rtol=1e-3, atol=1e-3)


class TestFlops:
    """Shared by all: operations of a pass, and of a step of training, counted by hand."""

    CONV, DEPTHWISE, DENSE = 2 * 8 * 8 * 3 * 3 * 3 * 4, 2 * 4 * 4 * 3 * 3 * 4, 2 * 4 * 10

    def model(self, keras, *frozen):
        """A network of three counted layers, the first two in a model of their own; some are frozen."""
        layers, images = keras.layers, keras.Input((8, 8, 3))
        x = layers.Conv2D(4, 3, padding="same", name="conv", trainable="conv" not in frozen)(images)
        x = layers.BatchNormalization(trainable="norm" not in frozen)(x)
        options = {"padding": "same", "name": "depthwise", "trainable": "depthwise" not in frozen}
        inner = keras.Model(images, layers.DepthwiseConv2D(3, strides=2, **options)(x))
        x = layers.GlobalAveragePooling2D()(inner(images))
        return keras.Model(images, layers.Dense(10, name="dense", trainable="dense" not in frozen)(x))

    @pytest.mark.parametrize(
        "frozen, passes",
        [
            ([], (2, 3, 3)),
            (["conv"], (1, 3, 3)),
            (["conv", "norm"], (1, 2, 3)),
            (["conv", "norm", "depthwise"], (1, 1, 2)),
            (["depthwise", "dense"], (2, 2, 2)),
            (["conv", "norm", "depthwise", "dense"], (1, 1, 1)),
        ],
    )
    def test_a_step_of_training(self, cells, frozen, passes):
        space = cells(FIRST, "count-flops")
        model, work = self.model(space.keras, *frozen), (self.CONV, self.DEPTHWISE, self.DENSE)
        assert space.count_flops(model, training=True) == np.dot(work, passes)
        assert space.count_flops(model) == sum(work)


class TestSchedules:
    """Warm-ups, decays, and how the parts of a training join."""

    POINTS = {
        "cosine": {0: 0, 6: 0.5, 12: 1, 66: 0.5, 120: 0, 130: 0},
        "one cycle": {0: 0.1, 18: 0.55, 36: 1, 78: 0.5, 120: 0},
        "step decay": {0: 1, 59: 1, 61: 0.1, 89: 0.1, 91: 0.01, 120: 0.01},
        "constant": {0: 1, 60: 1, 120: 1},
    }

    @pytest.mark.parametrize("kind", POINTS)
    def test_schedules_of_notebook_4(self, cells, kind):
        schedule = cells(FOURTH, "schedules").SCHEDULES[kind](PEAK, 120)
        found = {step: rate_at(schedule, step) for step in self.POINTS[kind]}
        assert found == pytest.approx(self.POINTS[kind], abs=1e-6)

    def test_part_of_cosine(self, cells):
        schedule = cells(THIRD, "part-of-cosine").PartOfCosine
        share = {step / 120: rate for step, rate in self.POINTS["cosine"].items()}
        for begin, pace in ((0, 0.001), (0.05, 0.01), (0.55, 0.05)):
            part = schedule(PEAK, begin, pace)
            found = {spent: rate_at(part, (spent - begin) / pace) for spent in share if spent >= begin}
            rise = {spent: min(1, (spent - begin + pace) / 0.1) if begin else 1 for spent in found}
            assert found == pytest.approx({spent: share[spent] * rise[spent] for spent in found}, abs=1e-4)
            assert rate_at(schedule.from_config(part.get_config()), 3) == rate_at(part, 3)


class TestVerdict:
    """Shared by all."""

    @pytest.fixture
    def verdict(self, cells):
        """The function."""
        return cells(FIRST, "verdict").verdict

    @pytest.mark.parametrize(
        "gaps, answer",
        [
            ([3.0, 4, 5], "yes"),
            ([-3.0, -4, -5], "no"),
            ([3.0, -1, 2], "open"),
            ([9.0], "open"),
            ([0.0, 0], "open"),
        ],
    )
    def test_is_yes_no_or_open(self, verdict, gaps, answer):
        found = verdict(np.add(80, gaps), [80] * len(gaps), ("A", "B"))
        assert (found["verdict"], found["pairs"], found["unit"]) == (answer, len(gaps), "points")
        assert found["effect"] == pytest.approx(np.mean(gaps))
        assert ("open" in found["outcome"]) == (answer == "open")
        side = "above" if np.mean(gaps) > 0 else "below"
        assert found["outcome"].startswith(f"A is {side} B by {abs(np.mean(gaps)):.1f}")

    def test_its_interval_is_that_of_the_paired_t_test(self, verdict):
        rng = np.random.default_rng(0)
        for n in (2, 3, 10, 1000):
            first, second = rng.normal(1, 1, n), rng.normal(0, 1, n)
            found, test = verdict(first, second), stats.ttest_rel(first, second)
            low, high = test.confidence_interval(0.95)
            assert [found["effect"] - found["margin"], found["effect"] + found["margin"]] == pytest.approx(
                [low, high]
            )
            assert (found["verdict"] == "open") == (test.pvalue > 0.05)

    def test_one_pair_decides_nothing(self, verdict):
        found = verdict([90], [10])
        assert (found["verdict"], found["margin"]) == ("open", None)
        assert "no interval" in found["outcome"]

    def test_the_number_of_pairs_that_would_decide_does(self, verdict):
        gaps = [1.0, -0.5, 1.5, 0.0]
        found = verdict(gaps, [0] * 4)
        needed = int(re.search(r"about (\d+) pairs|about (\d+) seeds", found["outcome"]).group(2))
        assert 4 < needed < 100
        more = np.mean(gaps) + np.std(gaps, ddof=1) * stats.zscore(np.tile(gaps, needed // 4 + 1), ddof=1)
        assert verdict(more, [0] * len(more))["verdict"] == "yes"

    def test_only_what_is_decidedly_ahead_is_taken(self, cells):
        def runs(*values):
            return [{"history": [{"val_accuracy": 0.99}, {"val_accuracy": value / 100}]} for value in values]

        default = "cosine at 0.0003"
        values = {"ARMS": {default: ("cosine", 3e-4)}, "BUDGET": {"peaks": [3e-4]}}
        values["schedules"] = {default: runs(80, 81)}
        decide = cells(FOURTH, "verdict", "scores", "decide", **values).decide
        arms = {"default": runs(80, 81), "better": runs(82, 83.1), "best": runs(84, 85.1)}
        assert decide(arms, "default") == "best"
        assert decide(arms | {"best": runs(79, 95)}, "default") == "better"
        assert decide({"default": arms["default"], "lucky": runs(79, 95)}, "default") == "default"


class TestReliability:
    """Notebook 4."""

    def test_against_numbers_made_by_hand(self, cells):
        sure = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55, 1.0])
        probabilities = np.tile((1 - sure[:, None]) / 9, (1, 10))
        probabilities[:, 3] = sure
        labels = np.array([3, 3, 3, 1, 3, 1, 3])
        means, groups = cells(FOURTH, "right", "reliability").reliability(probabilities, labels, groups=10)
        # The last group holds 95 and 100 %: 5 images, 96 % sure, 80 % right; the other 55 % sure, 50 % right.
        assert means["sure"] == pytest.approx(100 * sure.mean())
        assert means["right"] == pytest.approx(500 / 7)
        assert means["ECE"] == pytest.approx((5 * 16 + 2 * 5) / 7)
        expected = pd.DataFrame(
            {"sure": [55.0, 96], "right": [50.0, 80], "share": [200 / 7, 500 / 7]}, [5, 9]
        )
        pd.testing.assert_frame_equal(groups, expected, check_names=False, check_index_type=False)

    def test_a_model_that_knows_how_sure_it_may_be_has_no_error(self, cells):
        reliability, rng = cells(FOURTH, "right", "reliability").reliability, np.random.default_rng(0)
        probabilities = rng.dirichlet(np.ones(10) / 3, 50_000)
        labels = (probabilities.cumsum(1) > rng.random((50_000, 1))).argmax(1)
        assert reliability(probabilities, labels)[0]["ECE"] < 1
        assert reliability(probabilities, rng.permutation(labels))[0]["ECE"] > 30


class TestEffort:
    """Notebooks 2 and 4: what the accuracy that others report costs here, the probe included."""

    @pytest.mark.parametrize(
        "curve, share, answer",
        [
            ([0.9, 0.97, 0.98], 0.5, "yes"),
            ([0.9, 0.9, 0.98], 2.0, "no"),
            ([0.9], 0.5, "open"),
            ([0.9], 2.0, "no"),
        ],
    )
    def test_the_first_epoch_above_it_counts(self, cells, curve, share, answer):
        history, aim = [{"val_accuracy": value} for value in curve], 0.15
        flops = share * aim * 1e15  # of the whole training, the probe's tenth included
        probe = {"training_flops": flops / 10, "history": [{"val_accuracy": 0.85}]}
        tuned = {"training_flops": flops * 0.9, "history": history}
        spent = [(0.1 + 0.9 * number / len(curve)) * flops / 1e15 for number in range(1, len(curve) + 1)]
        names = cells(SECOND, "effort", claims=[], x_train=[0], IMAGE_SIZE=96)
        names.judge_effort([probe, tuned], 96.6, aim)
        [claim] = names.claims
        first = next((work for work, value in zip(spent, curve) if value > 0.966), None)
        assert claim["verdict"] == answer
        assert claim["effect"] == (pytest.approx(first) if first else None)


class TestPace:
    """Notebook 5 compares seconds; the arm of both sizes shows whether the machine kept its speed meanwhile."""

    @pytest.mark.parametrize("last, answer", [(15, "no"), (5, "open"), (25, "open")])
    def test_nothing_is_claimed_where_the_machine_changed_its_speed(self, cells, last, answer):
        said, arms = [], {"(a)": [10, 11], "(b)": [20, 21], "(c)": [last, last + 1]}
        runs = {
            title: [{"seconds": value, "training_flops": 1e12} for value in values]
            for title, values in arms.items()
        }
        given = {"arms": runs, "works": [1e12] * 3, "b": runs["(b)"], "table": lambda *parts: None}
        space = cells(FIFTH, "verdict", "tell-seconds", **given, say=said.append)
        assert space.slower["verdict"] == answer, "equal times are claimed, and (b) takes double"
        assert ("changed its speed" in said[-1]) == (answer == "open") and "more time" in said[-1]


class TestComparison:
    """Notebook 5 shows the results of the others where they are, and stands alone where they are not."""

    RECORD = {
        "image_size": 32,
        "final": {"test_accuracy": 90, "margin": 1, "parameters": 2, "training_flops": 3},
    }

    def read(self, cells, folder, text=None):
        """Run its cell where notebook 1 has left a text; return what was found and what is missing."""
        run = folder / FIFTH.stem / "smoke-seed0"
        (folder / FIRST.stem / run.name).mkdir(parents=True)
        if text is not None:
            (folder / FIRST.stem / run.name / "result.json").write_text(text)
        values = {"tuned": {"training_flops": 2e15}, "final": SimpleNamespace(count_params=lambda: 7)}
        values |= {"RUN": run, "NOTEBOOK": FIFTH.stem, "IMAGE_SIZE": 160}
        return cells(FIFTH, "read-results", **values, test_accuracy=95.0, margin=0.5)

    def test_results_of_others_are_read(self, cells, tmp_path):
        space = self.read(cells, tmp_path, json.dumps(self.RECORD))
        assert list(space.networks.index) == [FIRST.stem, FIFTH.stem]
        assert list(space.networks.loc[FIRST.stem]) == [90, 1, 2, 3, 32]
        assert list(space.networks.loc[FIFTH.stem]) == [95, 0.5, 7, 2e15, 160]
        assert space.missing == [SECOND.stem, THIRD.stem, FOURTH.stem]

    @pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"final": {}}', '{"final": 3}'])
    def test_what_is_not_usable_is_missing(self, cells, tmp_path, text):
        space = self.read(cells, tmp_path, text)
        assert list(space.networks.index) == [FIFTH.stem] and FIRST.stem in space.missing


def test_every_notebook_names_the_next():
    paths = notebook_paths(ROOT)
    for path, following in zip(paths, paths[1:]):
        text = "".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
        assert f"`{following.stem}`" in text or f"{following.stem}.ipynb" in text
