"""Measure what the fast path is worth on this machine: images per second of training, and ratios within one run.

    python tools/benchmark.py                      all variants
    python tools/benchmark.py in-model host        some of them

Every variant trains the small CNN of notebook 1 that learns from augmented images, arm (b): the notebook's own cells,
batch size and augmentation, but random images. One process runs after the other, several times, and the ratio is taken
within each round, so that a machine that slows down slows both. What differs is only what the table says.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from notebooks import ROOT, cell_by_id, read

VARIANTS = {
    "in-model": ("augmentation as layers inside the model", {}),
    "host": ("ImageDataGenerator on the host", {"pipeline": "host"}),
    "tf-data": ("tf.data with a parallel map on the host", {"pipeline": "tf-data"}),
    "jit": ("in-model, XLA on", {"jit": True}),
    "no-jit": ("in-model, XLA off", {"jit": False}),
    "float32": ("in-model, float32", {"precision": "float32"}),
    "bfloat16": ("in-model, mixed bfloat16", {"precision": "mixed_bfloat16"}),
}
RATIOS = [("in-model", "host"), ("in-model", "tf-data"), ("jit", "no-jit"), ("bfloat16", "float32")]
CELLS = """quiet-start imports presets find-device choose-precision check-preset setup-device alternating-flip
random-shift augmentation small-block small-cnn small-stage""".split()
SHIFT, BATCH = 4, 128


def notebook_namespace():
    """Names that notebook 1 defines up to the small CNN, by running these of its cells."""
    namespace = {"PRESET": "auto", "__name__": "benchmark"}
    notebook = read(ROOT / "1_CNN_Model.ipynb")
    for cell_id in CELLS:
        exec(compile(cell_by_id(notebook, cell_id).source, f"<{cell_id}>", "exec"), namespace)
    return namespace


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


def measure(variant, seconds):
    """Images per second of one variant in this process, compilation left out."""
    import numpy as np

    options = VARIANTS[variant][1]
    namespace = notebook_namespace()
    keras = namespace["keras"]
    keras.utils.set_random_seed(0)
    if "precision" in options:
        keras.mixed_precision.set_global_policy(options["precision"])
    if "jit" in options:
        namespace["JIT"] = options["jit"]
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20_000, 32, 32, 3), dtype="uint8")
    targets = np.eye(10, dtype="float32")[rng.integers(0, 10, len(images))]
    pipeline = options.get("pipeline", "in-model")
    model = namespace["compiled_small_cnn"](augment=pipeline == "in-model")
    feeds = {"host": host_batches, "tf-data": tf_data_batches}
    inputs = (
        {"x": feeds[pipeline](images, targets)}
        if pipeline in feeds
        else {"x": images, "y": targets, "batch_size": BATCH}
    )

    def train(steps):
        start = time.perf_counter()
        if pipeline == "in-model":
            rows = steps * BATCH
            model.fit(images[:rows], targets[:rows], batch_size=BATCH, verbose=0)
        else:
            model.fit(inputs["x"], steps_per_epoch=steps, verbose=0)
        return steps * BATCH / (time.perf_counter() - start)

    train(8)
    rate = train(16)
    return train(min(len(images) // BATCH, max(16, int(seconds * rate / BATCH))))


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
    rates = {name: [] for name in chosen}
    for _ in range(args.rounds):
        for name in chosen:
            rates[name].append(child(name, args.seconds))
    print(f"small CNN, batch {BATCH}, {os.cpu_count()} cores; median of {args.rounds} rounds")
    for name in chosen:
        print(f"{VARIANTS[name][0]:45} {statistics.median(rates[name]):8.0f} images/s")
    for a, b in RATIOS:
        if a in rates and b in rates:
            ratios = [x / y for x, y in zip(rates[a], rates[b])]
            print(
                f"ratio {a} / {b}: {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})"
            )


if __name__ == "__main__":
    main()
