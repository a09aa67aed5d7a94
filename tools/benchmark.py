"""Measure what the fast path is worth on this machine: images per second of training, and ratios within one run.

    python tools/benchmark.py                      all variants
    python tools/benchmark.py in-model host        some of them

- The first seven variants train the small CNN of notebook 1 that learns from augmented images, arm (b): the notebook's
  own cells, batch size, augmentation and Adam, but random images.
- `cached` and `forward` train notebook 2's linear probe for as many epochs as its preset says: on features that were
  computed once, which is part of the time, and through the frozen backbone in every epoch.
- `keras` and `torch` train the modern CNN of notebook 1, without augmentation, in 32 bits: the notebook's model, and
  the same layers and optimizer in plain PyTorch, if that is installed.

One process runs after the other, several times, and the ratio is taken within each round, so that a machine that slows
down slows both. What differs is only what the table says.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.util import find_spec

import numpy as np
from notebooks import ROOT, cell_namespace

VARIANTS = {
    "in-model": ("small CNN, augmentation as layers inside the model", {}),
    "host": ("small CNN, ImageDataGenerator on the host", {"pipeline": "host"}),
    "tf-data": ("small CNN, tf.data with a parallel map on the host", {"pipeline": "tf-data"}),
    "jit": ("small CNN, in-model, XLA on", {"jit": True}),
    "no-jit": ("small CNN, in-model, XLA off", {"jit": False}),
    "float32": ("small CNN, in-model, float32", {"precision": "float32"}),
    "bfloat16": ("small CNN, in-model, mixed bfloat16", {"precision": "mixed_bfloat16"}),
    "cached": ("linear probe, MobileNetV2, cached features", {"probe": "cached"}),
    "forward": ("linear probe, MobileNetV2, a forward pass an epoch", {"probe": "forward"}),
    "keras": ("modern CNN, the notebook's, float32", {"modern": "keras"}),
    "torch": ("modern CNN in plain PyTorch, float32", {"modern": "torch"}),
}
RATIOS = [
    ("in-model", "host"),
    ("in-model", "tf-data"),
    ("jit", "no-jit"),
    ("bfloat16", "float32"),
    ("cached", "forward"),
    ("keras", "torch"),
]
SMALL_CELLS = "random-shift augmentation small-cnn compiled plain-training"
PROBE_CELLS = "backbone-choice backbone transfer-network compiled-probe"
MODERN_CELLS = "random-shift augmentation compiled whitening modern-cnn orthogonalised muon train-modern"
SHIFT, BATCH, MODERN_BATCH = 4, 125, 500
PROBE_SIZE, PROBE_IMAGES = 64, 1024


def notebook_namespace(name, cells, precision=None, jit=None, **values):
    """Names that these cells of a notebook define, run over `values`, in that number format, with or without XLA."""
    path = ROOT / f"{name}.ipynb"
    with tempfile.TemporaryDirectory() as folder:
        parameters = {"PRESET": "auto", "SEED": 0, "DATA_DIR": None, "RUN_DIR": folder, "RETRAIN": False}
        names = cell_namespace(path, "imports", "presets", "setup", **parameters, **values)
    if precision:
        names["keras"].config.set_dtype_policy(precision)
    if jit is not None:
        names["JIT"] = jit
    return cell_namespace(path, *cells.split(), **names)


def random_data(count):
    """Images, uint8 (count, 32, 32, 3), and labels, int64 (count,), that mean nothing."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, 32, 32, 3), dtype="uint8"), rng.integers(0, 10, count)


def rate_of(train, batch, seconds, most):
    """Images per second of `train(steps)`, called for about `seconds` but at most `most` steps, warmed up before."""

    def timed(steps):
        start = time.perf_counter()
        train(steps)
        return steps * batch / (time.perf_counter() - start)

    timed(min(8, most))
    rate = timed(min(16, most))
    return timed(min(most, max(16, int(seconds * rate / batch))))


def host_batches(images, targets):
    """Batches from Keras's ImageDataGenerator: the classic pipeline, in NumPy and SciPy."""
    from tensorflow.keras.preprocessing.image import ImageDataGenerator

    generator = ImageDataGenerator(
        horizontal_flip=True, width_shift_range=SHIFT, height_shift_range=SHIFT, fill_mode="reflect"
    )
    return generator.flow(images, targets, batch_size=BATCH)


def tf_data_batches(images, targets):
    """Batches from tf.data: mirrored, padded and cropped image by image in a parallel map."""
    import tensorflow as tf

    def augment(image, target):
        image = tf.image.random_flip_left_right(image)
        image = tf.pad(image, [[SHIFT, SHIFT], [SHIFT, SHIFT], [0, 0]], mode="REFLECT")
        return tf.image.random_crop(image, (32, 32, 3)), target

    data = tf.data.Dataset.from_tensor_slices((images, targets)).shuffle(10_000).repeat()
    return data.map(augment, num_parallel_calls=tf.data.AUTOTUNE).batch(BATCH).prefetch(tf.data.AUTOTUNE)


def measure_small(seconds, pipeline="in-model", **options):
    """Images per second of training the small CNN with augmentation in the model, on the host or in tf.data."""
    images, labels = random_data(20_000)
    targets = np.eye(10, dtype="float32")[labels]
    namespace = notebook_namespace("1_CNN_Model", SMALL_CELLS, x_train=images, **options)
    augment = namespace["augmentation"] if pipeline == "in-model" else None
    model = namespace["plain_training"](namespace["small_cnn"], 1, BATCH, augment)
    feed = {"host": host_batches, "tf-data": tf_data_batches}.get(pipeline)
    batches = feed(images, targets) if feed else None

    def train(steps):
        if batches is None:
            rows = steps * BATCH
            model.fit(images[:rows], targets[:rows], batch_size=BATCH, verbose=0)
        else:
            model.fit(batches, steps_per_epoch=steps, verbose=0)

    return rate_of(train, BATCH, seconds, len(images) // BATCH)


def measure_probe(seconds, probe):
    """Images per second of training a linear probe, all its epochs, on cached features or through the backbone."""
    namespace = notebook_namespace("2_MobileNetV2", PROBE_CELLS)
    epochs = namespace["PRESETS"]["quick"]["probe_epochs"]
    images, labels = random_data(PROBE_IMAGES)
    targets = np.eye(10, dtype="float32")[labels]
    keras = namespace["keras"]
    model = namespace["transfer_network"](PROBE_SIZE)
    for layer in model.layers[:-1]:
        layer.trainable = False
    extractor = keras.Model(model.inputs, model.get_layer("pooling").output)
    head = namespace["compiled_probe"](extractor.output.shape[1], epochs * len(images) // BATCH)
    model.compile("adam", head.loss, metrics=["accuracy"], jit_compile=namespace["JIT"])

    def train(epochs):
        if probe == "cached":
            features = extractor.predict(images, batch_size=BATCH, verbose=0)
            head.fit(features, targets, batch_size=BATCH, epochs=epochs, verbose=0)
        else:
            model.fit(images, targets, batch_size=BATCH, epochs=epochs, verbose=0)

    train(1)
    start = time.perf_counter()
    train(epochs)
    return epochs * len(images) / (time.perf_counter() - start)


def measure_modern(seconds, modern):
    """Images per second of training the modern CNN, the notebook's model or the same in plain PyTorch."""
    images, labels = random_data(8 * MODERN_BATCH)
    untrained = dict.fromkeys(("train_stage", "trained"), lambda *arguments: None)
    values = {"x_train": images, **untrained}
    namespace = notebook_namespace("1_CNN_Model", MODERN_CELLS, "float32", **values)
    recipe = namespace["modern_training"](32, 1, (1.0, 0.0))
    model = namespace["compiled"](recipe.get_layer("network"), recipe.optimizer, None, smoothing=0.2)
    if modern == "torch":
        import plain_pytorch

        network = plain_pytorch.modern_cnn(namespace["mean"], namespace["std"])
        plain_pytorch.copy_weights(model, network)
        check_same(model, network, images[:100])
        train = partial(plain_pytorch.train, network, images, labels, MODERN_BATCH)
    else:
        targets = np.eye(10, dtype="float32")[labels]

        def train(steps):
            rows = steps * MODERN_BATCH
            model.fit(images[:rows], targets[:rows], batch_size=MODERN_BATCH, verbose=0)

    return rate_of(train, MODERN_BATCH, seconds, len(images) // MODERN_BATCH)


def check_same(model, network, images):
    """Stop unless the Keras model and the PyTorch network give the same logits for uint8 images (n, 32, 32, 3)."""
    import torch

    expected = model.predict(images, verbose=0)
    with torch.no_grad():
        found = network.eval()(torch.from_numpy(images).permute(0, 3, 1, 2).float()).numpy()
    if np.abs(found - expected).max() > 1e-3 * np.abs(expected).max():
        raise SystemExit("The network in tools/plain_pytorch.py is not the notebook's: their logits differ.")


def measure(variant, seconds):
    """Images per second of one variant in this process, compilation left out."""
    options = VARIANTS[variant][1]
    random.seed(0)
    kinds = {"probe": measure_probe, "modern": measure_modern}
    kind = next((kinds[key] for key in options if key in kinds), measure_small)
    return kind(seconds, **options)


def child(variant, seconds):
    """Measure a variant in a process of its own."""
    command = [sys.executable, __file__, "--child", variant, "--seconds", str(seconds)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    )
    if done.returncode:
        raise SystemExit(f"{variant} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv=None):
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "variants", nargs="*", metavar="VARIANT", help=f"any of: {', '.join(VARIANTS)}; default: all"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="how often every variant is measured (default 3)"
    )
    parser.add_argument(
        "--seconds", type=float, default=8, help="about how long a measurement lasts (default 8)"
    )
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        print(json.dumps(measure(args.child, args.seconds)))
        return
    if unknown := set(args.variants) - set(VARIANTS):
        parser.error(f"unknown variant {', '.join(sorted(unknown))}; choose from {', '.join(VARIANTS)}")
    chosen = [name for name in VARIANTS if name in (args.variants or VARIANTS)]
    if "torch" in chosen and find_spec("torch") is None:
        chosen.remove("torch")
        print("torch is left out: PyTorch is not installed (pip install torch)")
    rates = {name: [] for name in chosen}
    for _ in range(args.rounds):
        for name in chosen:
            rates[name].append(child(name, args.seconds))
    print(f"{os.cpu_count()} cores; median of {args.rounds} rounds")
    for name in chosen:
        print(f"{VARIANTS[name][0]:52} {statistics.median(rates[name]):8.0f} images/s")
    for a, b in RATIOS:
        if a in rates and b in rates:
            ratios = [x / y for x, y in zip(rates[a], rates[b])]
            print(
                f"ratio {a} / {b}: {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})"
            )


if __name__ == "__main__":
    main()
