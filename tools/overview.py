"""Draw README's first figure from results/*.json: test accuracy against the operations of training, all notebooks."""

import json
from pathlib import Path

from notebooks import TITLES
from records import accuracies, interval

FILE = Path("results", "overview.png")
MARKERS = "osD^v"


def points(runs):
    """What the figure shows of {notebook: its records, one for each seed}: a list of dicts, one for each notebook."""
    return [
        {
            "notebook": name,
            "title": TITLES[name],
            "preset": records[0]["preset"],
            "pflop": records[0]["final"]["training_flops"] / 1e15,
            "accuracies": accuracies(records),
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

    sns.set_theme(style="whitegrid", palette="colorblind", font_scale=0.95)
    figure, axis = plt.subplots(figsize=(5.4, 3.6))
    for number, point in enumerate(shown):
        mean = sum(point["accuracies"]) / len(point["accuracies"])
        low, high = interval(mean)
        marker, color = MARKERS[number % len(MARKERS)], f"C{number}"
        bar = [[100 * (mean - low)], [100 * (high - mean)]]
        label = f"{point['title']}: {100 * mean:.1f} %"
        label += "" if point["preset"] == "full" else f" ({point['preset']})"
        axis.errorbar(point["pflop"], 100 * mean, bar, fmt=marker, color=color, capsize=4, label=label)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    axis.set_xlabel("training of the final model (PFLOP)")
    axis.set_ylabel("test accuracy (%)")
    axis.margins(x=0.15, y=0.1)
    axis.legend(bbox_to_anchor=(1, 1), loc="upper left", frameon=False)
    path = Path(root) / FILE
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100, bbox_inches="tight", metadata={"Description": json.dumps(shown)})
    plt.close(figure)
