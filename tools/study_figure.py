"""The figure of a study: Topic-Cloze of all runs, means over seeds and each seed."""
from matplotlib.figure import Figure

from benchmarks import report


def draw(rows, path):
    """Draw the rows of study.json: a bar at each run's mean, and a point for each seed, in three settings."""
    settings = report.SETTINGS[1:]  # without T, which all runs solve
    figure = Figure(figsize=(13, 1.6 + 0.38 * len(rows)), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    lowest = min(score for row in rows for setting in settings for score in row["settings"][setting]["scores"])
    for axis, setting in zip(axes, settings):
        for y, row in enumerate(rows):
            cell = row["settings"][setting]
            axis.barh(y, cell["mean"] - 50, left=50, color=report.COLOURS[setting], alpha=0.35 if y else 0.7)
            axis.plot(cell["scores"], [y] * len(cell["scores"]), "o", color="black", markersize=3.5)
        axis.axvline(50, color="0.4", linewidth=1)
        axis.set(title=setting, xlabel="% right (chance: 50)", xlim=(min(45, lowest - 2), 100))
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(rows)), [row["what"] for row in rows])
    axes[0].invert_yaxis()
    figure.suptitle("Topic-Cloze: mean over seeds (bars), each seed (points)")
    figure.savefig(path, dpi=110)
