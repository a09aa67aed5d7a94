"""What the data and the initial weights of a run are, and how far that was checked."""

import hashlib
import os
import tarfile
from pathlib import Path

# MD5 sums of the files in the official cifar-10-python.tar.gz.
OFFICIAL_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
# Where the notebooks' reader looks at and below a folder; Keras's download lies within.
DEPTHS = ("", "*/", "*/*/", "*/*/*/")
ARCHIVES = (".", "cifar-10-python.tar.gz", "datasets/cifar-10-python.tar.gz")
# Keras's file without the top for each notebook, and the MD5 sum in keras.applications; MobileNetV2's has none there.
KERAS_WEIGHTS = {
    "2_MobileNetV2": ("mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_{size}_no_top.h5", None),
    "3_DenseNet121": (
        "densenet121_weights_tf_dim_ordering_tf_kernels_notop.h5",
        "30ee3e1110167f948a6b9946edeeb738",
    ),
    "4_EfficientNetB0": ("efficientnetb0_notop.h5", "50bc09e76180e00e4465e1a485ddc09d"),
    "5_EfficientNetV2B0": ("efficientnetv2-b0_notop.h5", "893217f2bb855e2983157299931e43ff"),
}
MOBILENET_SIZES = (96, 128, 160, 192, 224)  # it has a file for each of these; other sizes take that of 224


def keras_home():
    """Folder of Keras's downloads."""
    return Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")


def data_sums(place):
    """{file name: MD5 sum} of the six files of CIFAR-10 in a folder or archive at or below `place`; {} if absent."""
    for found in (path for depth in DEPTHS for path in sorted(place.glob(depth + "data_batch_1"))):
        files = [found.with_name(name) for name in OFFICIAL_MD5]
        if all(file.is_file() for file in files):
            return {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in files}
    for path in (place / name for name in ARCHIVES):
        if path.is_file() and tarfile.is_tarfile(path):
            with tarfile.open(path) as archive:
                members = {Path(member.name).name: member for member in archive if member.isfile()}
                files = {name: archive.extractfile(members[name]) for name in OFFICIAL_MD5 if name in members}
                return {name: hashlib.md5(file.read()).hexdigest() for name, file in files.items()}
    return {}


def identify_data(data_dir=None, note=""):
    """What the data in `data_dir` (or in Keras's folder) are: {"data": text, "data_official": bool}.

    `note` says what data are that are not the official files.
    """
    sums = data_sums(Path(data_dir).expanduser() if data_dir else keras_home())
    if sums == OFFICIAL_MD5:
        return {"data": "CIFAR-10, the official files (MD5 compared)", "data_official": True}
    found = (
        "not the official files of CIFAR-10 (MD5 differs)"
        if sums
        else "files not found again and not checked"
    )
    return {"data": f"{found}. {note}".strip().rstrip("."), "data_official": False}


def identify_weights(notebook, weights, note="", size=224):
    """What a run started from: {"weights": text, "weights_sha256": its sum, "weights_file": name if given by path}.

    `weights` is the notebook's WEIGHTS, "scratch" where it has none; `note` says what a file given by path is.
    Nothing is called Keras's own unless its sum was compared. `size` is the image size, in pixels.
    """
    found = {"weights": "none, trained from scratch", "weights_sha256": None, "weights_file": None}
    if weights in (None, "scratch"):
        return found
    if weights == "imagenet":
        name, known = KERAS_WEIGHTS[notebook]
        path = keras_home() / "models" / name.format(size=size if size in MOBILENET_SIZES else 224)
        if not path.is_file():
            return found | {"weights": "imagenet, a file not found again and not checked"}
        text = "in Keras's folder; its origin was not checked, because Keras holds no sum of it"
        if known:
            same = hashlib.md5(path.read_bytes()).hexdigest() == known
            text = "Keras's ImageNet weights (MD5 compared)" if same else "*not* Keras's file (MD5 differs)"
    else:
        path = Path(weights).expanduser()
        found["weights_file"] = path.name
        text = note.rstrip(".") or "its origin was not checked"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return found | {"weights": f"file {path.name} (SHA-256 {digest[:12]}…): {text}", "weights_sha256": digest}
