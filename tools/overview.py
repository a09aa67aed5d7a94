"""Draw README's first figure from results/*.json: test accuracy against the operations of training, all notebooks."""

import json
from pathlib import Path

# What portfolios of CIFAR-10 notebooks usually state for these networks, in percent of the test images.
USUALLY_REPORTED = {
    "1_CNN_Model": 79,
    "2_MobileNetV2": 91,
    "3_DenseNet121": 94,
    "4_EfficientNetB0": 97,
    "5_EfficientNetV2B0": 97,
}
FILE = Path("results", "overview.png")


def points(runs):
    """What the figure shows of {notebook: its records, one for each seed}: a list of dicts, one for each notebook."""
    return [
        {
            "notebook": name,
            "title": records[0]["title"],
            "pflop": records[0]["final"]["training_flops"] / 1e15,
            "accuracies": [record["final"]["test_accuracy"] for record in records],
            "usually_reported": USUALLY_REPORTED[name],
        }
        for name, records in runs.items()
    ]


def drawn(root):
    """The points that the figure in `root` was drawn from, or None if there is none."""
    from PIL import Image

    path = Path(root) / FILE
    if not path.exists():
        return None
    with Image.open(path) as image:
        return json.loads(image.text.get("Description", "null"))


def draw(shown, root):
    """Draw the points and keep them in the file's description, from which `drawn` reads them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import seaborn as sns
    from matplotlib import ticker

    sns.set_theme(style="whitegrid", palette="colorblind")
    figure, axis = plt.subplots(figsize=(6, 4))
    for number, point in enumerate(shown):
        values = [100 * accuracy for accuracy in point["accuracies"]]
        mean = sum(values) / len(values)
        usual = point["usually_reported"]
        axis.plot([point["pflop"]] * 2, [usual, mean], color="lightgray", zorder=1)
        axis.plot(point["pflop"], usual, "_", color=f"C{number}", markersize=16, markeredgewidth=2)
        label = f"{point['title']}, {mean:.1f} %"
        axis.plot([point["pflop"]] * len(values), values, "osD^v"[number], color=f"C{number}", label=label)
    axis.plot([], [], "_", color="gray", markersize=16, markeredgewidth=2, label="usually reported")
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    axis.set_xlabel("PFLOP of training, all stages of the final model")
    axis.set_ylabel("test accuracy (%)")
    axis.margins(x=0.2, y=0.1)
    axis.legend(bbox_to_anchor=(1, 1), loc="upper left")
    path = Path(root) / FILE
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100, bbox_inches="tight", metadata={"Description": json.dumps(shown)})
    plt.close(figure)
