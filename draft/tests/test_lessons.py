"""What single notebooks add to the course: their own layers, schedules and plans do what their prose says."""

import json
import re

import numpy as np
import pytest
from conftest import ROOT
from notebooks import cell_by_id, cell_namespace, code_cells, notebook_paths, read


def cells(name, *ids, **values):
    """Namespace of some cells of the notebook `name`, over `values`; skips where there is no such notebook."""
    path = ROOT / f"{name}.ipynb"
    if not path.exists():
        pytest.skip(f"{path.name} is in preparation")
    return cell_namespace(path, *ids, **values)


def random_images(count=64):
    """Random images, uint8 (count, 32, 32, 3)."""
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def as_array(keras, tensor):
    """A tensor of any backend as a NumPy array."""
    return keras.ops.convert_to_numpy(tensor)


class TestAugmentation:
    """Notebook 1, shared by all."""

    def layers(self):
        """The two layers, and Keras."""
        space = cells("1_CNN_Model", "imports", "alternating-flip", "random-shift", "augmentation")
        return space["keras"], space

    def test_two_epochs_in_a_row_show_both_sides_of_every_image(self):
        keras, space = self.layers()
        flip, images = space["AlternatingFlip"](), random_images()
        seen = []
        for epoch in range(4):
            flip(images[:1])
            flip.epoch.assign(epoch)
            seen.append(as_array(keras, flip(images, training=True)))
        mirrored = [(epoch == images[:, :, ::-1]).all((1, 2, 3)) for epoch in seen]
        plain = [(epoch == images).all((1, 2, 3)) for epoch in seen]
        assert all((m ^ p).all() for m, p in zip(mirrored, plain))
        assert (mirrored[0] ^ mirrored[1]).all() and np.array_equal(mirrored[0], mirrored[2])
        assert 0.3 < mirrored[0].mean() < 0.7

    def test_a_shift_moves_whole_images_by_at_most_so_many_pixels(self):
        keras, space = self.layers()
        ramp = np.broadcast_to(np.arange(32, dtype="float32")[:, None, None], (200, 32, 32, 3))
        moved = as_array(keras, space["RandomShift"](4)(ramp, training=True))
        steps = moved[:, 16, 16, 0] - 16
        assert set(steps) == set(range(-4, 5))
        np.testing.assert_array_equal(moved[:, 8:24], ramp[:, 8:24] + steps[:, None, None, None])

    def test_prediction_sees_the_images_as_they_are(self):
        keras, space = self.layers()
        images = random_images()
        np.testing.assert_array_equal(
            as_array(keras, space["augmentation"]()(images, training=False)), images
        )

    def test_every_epoch_has_its_own_number_and_seeds(self):
        keras, space = self.layers()
        more = cells("1_CNN_Model", "imports", "derived-seed", "epoch-seed")
        model = keras.Sequential([keras.Input((32, 32, 3), dtype="uint8"), space["augmentation"]()])
        batches = type("Batches", (), {"seed": 3, "start_epoch": lambda self, epoch: None})()
        callback = more["EpochSeed"](batches)
        callback.set_model(model)
        looks = []
        for epoch in (0, 1, 2, 1):
            callback.on_epoch_begin(epoch)
            looks.append(as_array(keras, model(random_images(), training=True)))
        assert np.array_equal(looks[1], looks[3])
        assert not np.array_equal(looks[0], looks[2])


class TestEffects:
    """Notebook 1: what the small CNN gains by its two remedies."""

    def effects(self, plain_gap):
        """Names of the cell, where the gaps of (a) and (c) are `plain_gap` and 0.05."""
        stage = {"test_accuracy": 0.5, "validation_accuracy": 0.5, "gap": 0.05}
        stages = {name: dict(stage) for name in ("plain", "augmented", "regularised", "both")}
        stages["plain"]["gap"] = plain_gap
        return cells("1_CNN_Model", "points", "effects", stages=stages, ARMS=dict.fromkeys(stages))

    def test_a_gap_is_compared_with_that_of_the_first_arm(self):
        assert self.effects(0.2)["gap_change"]("regularised") == "-75%"
        assert self.effects(0.04)["gap_change"]("regularised") == "+25%"

    @pytest.mark.parametrize("gap", [0.0, -0.01])
    def test_without_a_gap_there_is_nothing_to_close(self, gap):
        assert "none" in self.effects(gap)["gap_change"]("regularised")


class TestVerdict:
    """Notebooks 2 and 3 call a difference one only if it is larger than chance."""

    @pytest.mark.parametrize(
        "one, other, answer",
        [
            (0.70, 0.50, "yes"),
            (0.50, 0.70, "no"),
            (0.700, 0.692, "too close to call"),
            (0.5, 0.5, "too close"),
        ],
    )
    def test_a_difference_must_exceed_two_standard_errors(self, one, other, answer):
        arms = {
            name: {"history": [{"val_accuracy": 0.99}, {"val_accuracy": value}]}
            for name, value in [("one", one), ("other", other)]
        }
        said = cells("2_MobileNetV2", "verdict", arms=arms, y_val=np.zeros(5000))["verdict"]("one", "other")
        assert said.startswith(answer)
        assert f"{one:.1%} against {other:.1%}" in said

    def test_fewer_images_make_a_wider_margin(self):
        arms = {name: {"history": [{"val_accuracy": value}]} for name, value in [("a", 0.75), ("b", 0.70)]}
        answers = [
            cells("2_MobileNetV2", "verdict", arms=arms, y_val=np.zeros(count))["verdict"]("a", "b")
            for count in (5000, 500)
        ]
        assert answers[0].startswith("yes") and answers[1].startswith("too close")
        assert "less than 1.8 points" in answers[0] and "less than 5.6 points" in answers[1]


class TestTreatment:
    """Notebook 2 fine-tunes its final model with the BatchNorm that did best in the experiment."""

    @pytest.mark.parametrize("best, momentum", [("follow", 0.9), ("fixed", None), ("slow", 0.999)])
    def test_the_last_epoch_of_arms_that_began_with_the_probe_decides(self, best, momentum):
        last = {"follow": 0.5, "fixed": 0.5, "slow": 0.5, "random": 0.9} | {best: 0.6}
        first = {"follow": 0.7, "fixed": 0.7, "slow": 0.7, "random": 0.7} | {best: 0.4}
        arms = {
            name: {"title": name, "history": [{"val_accuracy": first[name]}, {"val_accuracy": last[name]}]}
            for name in last
        }
        space = cells("2_MobileNetV2", "choose-batchnorm", arms=arms)
        assert space["best_arm"] == best
        assert space["momentum"] == momentum


class TestEffort:
    """Notebook 2 says what the accuracy that others report costs here."""

    @pytest.mark.parametrize(
        "curve, said",
        [([0.85, 0.92, 0.95], "0.045 PFLOP"), ([0.912, 0.9, 0.9], "0.025"), ([0.9], "not reached")],
    )
    def test_the_first_epoch_that_reaches_it_counts_with_the_probe(self, curve, said):
        tune = {
            "history": [{"val_accuracy": value} for value in curve],
            "training_flops": 0.02e15 * len(curve),
        }
        stages = {"probe": {"training_flops": 0.005e15}, "tune": tune}
        space = cells("2_MobileNetV2", "imports", "effort", stages=stages)
        assert space["REACHED"].startswith(said)
        assert len(space["spent"]) == len(curve)


class TestThawing:
    """Notebook 3."""

    @pytest.fixture(scope="class")
    def space(self):
        """Its function, its choices, and an untrained backbone."""
        space = cells("3_DenseNet121", "imports", "backbone-choice", "unfreeze", "choices")
        base = space["BACKBONE"](include_top=False, weights=None, input_shape=(32, 32, 3))
        return space | {"base": base}

    def test_each_choice_thaws_from_a_layer_on(self, space):
        base = space["base"]
        names = [layer.name for layer in base.layers]
        counts = {}
        for choice, (_, thaw) in space["CHOICES"].items():
            space["unfreeze"](base, thaw[-1])
            first = len(names) if thaw[-1] is None else names.index(thaw[-1])
            assert [layer.trainable for layer in base.layers] == [n >= first for n in range(len(names))]
            counts[choice] = sum(int(np.prod(weight.shape)) for weight in base.trainable_weights)
        assert counts["head"] == 0 < counts["last"] < counts["everything"] == counts["progressive"]

    def test_the_last_block_is_conv5_and_what_follows(self, space):
        space["unfreeze"](space["base"], space["CONV5"])
        thawed = [layer.name for layer in space["base"].layers if layer.trainable]
        assert {name.split("_")[0] for name in thawed} == {"conv5", "bn", "relu"}

    def test_progressive_thaws_more_and_more(self, space):
        names = [layer.name for layer in space["base"].layers]
        firsts = [names.index(name) for name in space["CHOICES"]["progressive"][1]]
        assert firsts == sorted(firsts, reverse=True) and len(set(firsts)) == len(firsts)

    def test_batchnorm_can_be_kept_in_a_thawed_part(self, space):
        base = space["base"]
        space["unfreeze"](base, space["CONV5"], learn_norms=False)
        assert not any(layer.trainable for layer in base.layers if "bn" in layer.name.split("_")[-1])
        assert base.get_layer("conv5_block1_1_conv").trainable
        assert not base.get_layer("conv4_block1_1_conv").trainable

    def test_only_batchnorm_that_was_never_used_collects_statistics(self, space, tmp_path):
        import keras

        base, images = space["base"], random_images(40)
        old = base.get_layer("conv1_bn")
        old.moving_mean.assign(old.moving_mean + 0.5)
        base.save_weights(tmp_path / "partial.weights.h5")
        names = {"BUDGET": {"size": 32}, "RUN": tmp_path, "BACKBONE": space["BACKBONE"]}
        ids = ["imports", "input-scaling", "backbone", "upscaling", "never-used", "set-batchnorm"]
        made = cells("3_DenseNet121", *ids, "collect-statistics", **names)
        file = made["collect_statistics"](tmp_path / "partial.weights.h5", images, batch=20)
        after = made["backbone"](32, file)
        assert not any(made["never_used"](norm) for norm in made["batch_norms"](after))
        for before, now in zip(base.layers, after.layers, strict=True):
            same = [np.array_equal(*pair) for pair in zip(before.get_weights(), now.get_weights())]
            collects = isinstance(now, keras.layers.BatchNormalization) and now.name != old.name
            assert same == ([True, True, False, False] if collects else [True] * len(same)), now.name
        assert made["collect_statistics"](file, images) == file

    def test_an_unknown_layer_is_named(self, space):
        with pytest.raises(ValueError, match="conv9"):
            space["unfreeze"](space["base"], "conv9_block1")

    @pytest.mark.parametrize("epochs, parts", [(3, 3), (6, 3), (1, 3), (4, 1)])
    def test_dividing_a_training_keeps_the_number_of_pictures(self, epochs, parts):
        divide = cells("3_DenseNet121", "imports", "divide-training")["divide_training"]
        images, labels = random_images(30), np.arange(30)
        shares = divide(images, labels, epochs, parts)
        assert len(shares) == parts
        assert sum(len(share) * count for share, _, count in shares) == epochs * len(images)
        assert all(len(share) == len(of_share) for share, of_share, _ in shares)


class TestDials:
    """Notebook 4."""

    def test_cutout_hides_a_square_of_the_given_side(self):
        space = cells("4_EfficientNetB0", "imports", "cutout")
        keras, images = space["keras"], random_images().astype("float32")
        images[images == 120] = 121
        layer = space["Cutout"]()
        assert np.array_equal(as_array(keras, layer(images, training=True)), images)
        layer.pixels.assign(8)
        hidden = as_array(keras, layer(images, training=True)) == 120
        assert (hidden.all(-1) == hidden.any(-1)).all()
        rows, columns = hidden[..., 0].any(2).sum(1), hidden[..., 0].any(1).sum(1)
        np.testing.assert_array_equal(hidden[..., 0].sum((1, 2)), rows * columns)
        assert max(rows) == max(columns) == 8 and min(rows) >= 4
        assert np.array_equal(as_array(keras, layer(images, training=False)), images)

    @pytest.mark.parametrize("strength", [0.0, 0.1])
    def test_the_smoothed_loss_is_that_of_keras(self, strength):
        space = cells("4_EfficientNetB0", "imports", "smoothed-loss")
        keras = space["keras"]
        targets = np.eye(10, dtype="float32")[[1, 4, 7]]
        logits = np.random.default_rng(0).normal(size=(3, 10)).astype("float32")
        dial = type("Dial", (), {"value": keras.Variable(strength)})()
        own = as_array(keras, space["smoothed_loss"](dial)(targets, logits))
        expected = keras.losses.categorical_crossentropy(targets, logits, True, label_smoothing=strength)
        np.testing.assert_allclose(own, as_array(keras, expected), rtol=1e-5)

    def test_schedules_share_their_peak(self):
        space = cells(
            "4_EfficientNetB0",
            "imports",
            "warm-up-cosine",
            "schedules",
            "arm-steps",
            BUDGET={"batch": 64, "arm_epochs": 2},
            x_arm=range(64 * 60),
        )
        assert space["arm_steps"] == 120
        rates = {name: make(0.5, 120) for name, make in space["SCHEDULES"].items()}
        assert all(len(table) == 120 for table in rates.values())
        assert {name: round(float(table.max()), 2) for name, table in rates.items()} == dict.fromkeys(
            rates, 0.5
        )
        ends = {name: table[-1] / 0.5 for name, table in rates.items()}
        assert ends["constant"] == 1 and max(ends["cosine"], ends["one cycle"], ends["step decay"]) < 0.011


class TestBudget:
    """Notebook 5."""

    @pytest.fixture(scope="class")
    def plans(self):
        """Its plans, with prices of a step that stand in the ratio of the areas."""

        def plans(preset):
            space = cells("5_EfficientNetV2B0", "imports", "presets")
            budget = space["PRESETS"][preset]
            small, large = budget["sizes"]
            values = {
                "BUDGET": budget,
                "SMALL": small,
                "LARGE": large,
                "PRICE": {s: s * s for s in (small, large)},
            }
            ids = ["imports", "warm-up-cosine", "presets", "budget-of", "plan", "rate-at", "stage-plan"]
            return cells("5_EfficientNetV2B0", *ids, **values)

        return plans

    @pytest.mark.parametrize("preset", ["cpu", "gpu"])
    @pytest.mark.parametrize("which", ["arm_epochs", "tune_epochs"])
    def test_recipes_cost_the_same(self, plans, preset, which):
        space = plans(preset)
        cost = [space["budget_of"](epochs, 45_000)[1] for epochs in space[which].values()]
        assert max(cost) / min(cost) < (1.1 if which == "arm_epochs" else 1.15)

    def test_the_rate_does_not_jump_where_the_size_changes(self, plans):
        space = plans("cpu")
        plan = space["stage_plan"](space["arm_epochs"]["progressive"], 3_200)
        (_, _, first_steps, (start, each)), (_, _, second_steps, (seam, other)) = plan
        assert start == 0 and seam == pytest.approx(first_steps * each)
        assert seam + second_steps * other == pytest.approx(1)
        assert other / each == pytest.approx(space["PRICE"][space["LARGE"]] / space["PRICE"][space["SMALL"]])
        assert 0 < float(space["rate_at"](seam)) < space["PEAK_RATE"]
        assert float(space["rate_at"](1.0)) == pytest.approx(0, abs=1e-6)

    def test_the_schedule_reads_its_part_from_a_variable(self, plans):
        space = plans("cpu")
        notebook = read(ROOT / "5_EfficientNetV2B0.ipynb")
        exec(cell_by_id(notebook, "part-of-budget").source, space)
        schedule, keras = space["PartOfBudget"](), space["keras"]
        schedule.part = keras.Variable([0.25, 0.01])
        assert float(schedule(10)) == pytest.approx(float(space["rate_at"](0.35)), rel=1e-4)


class TestComparison:
    """Notebook 5 shows the records of the others where they are, and stands alone where they are not."""

    @pytest.fixture
    def read_result(self):
        """Its reader of records."""
        return cells("5_EfficientNetV2B0", "imports", "read-result")["read_result"]

    def test_published_records_are_read(self, read_result):
        for path in notebook_paths():
            record = ROOT / "results" / f"{path.stem}.json"
            if record.exists():
                final = json.loads(record.read_text(encoding="utf-8"))["final"]
                assert read_result(record)["test_accuracy"] == final["test_accuracy"]

    @pytest.mark.parametrize(
        "content", [None, "", "{", "[]", "{}", '{"final": {}}', '{"final": {"seconds": "x"}}']
    )
    def test_a_record_that_is_not_usable_is_said_to_be_so(self, read_result, tmp_path, content):
        path = tmp_path / "1_CNN_Model.json"
        if content is not None:
            path.write_text(content)
        with pytest.raises(ValueError, match="no record" if content is None else "not usable"):
            read_result(path)


def test_every_notebook_names_the_next():
    """Whoever finishes one is told what comes after it."""
    paths = notebook_paths()
    for path, following in zip(paths, paths[1:]):
        text = "".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
        assert re.search(rf"`{following.stem}`", text)
        assert code_cells(read(path))
