"""The two plots of the report that need axes, drawn by matplotlib as inline SVG.

Its functions take numbers and return SVG. Matplotlib draws in marker colors, which are then replaced by the page's CSS
variables. So one drawing works in light and dark mode, with the page's font. A plot contains no string of the run:
names are part of the HTML, where they are escaped.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

COLORS = {name: f"#00000{number}" for number, name in enumerate(("muted", "line", "teal", "rust", "blue"), start=1)}
"""CSS variable -> marker color, which occurs nowhere else."""
PLOT_STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "figure.figsize": (4.9, 2.75),  # inches; small, so that labels are readable on a page 400 pixels wide
    "figure.constrained_layout.use": True,
    "text.color": COLORS["muted"],
    "axes.edgecolor": COLORS["line"],
    "axes.labelcolor": COLORS["muted"],
    "axes.titlelocation": "left",
    "axes.titlecolor": COLORS["muted"],
    "axes.titlesize": 9,
    "axes.titlepad": 6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": COLORS["line"],
    "grid.linewidth": 0.7,
    "xtick.color": COLORS["line"],
    "ytick.color": COLORS["line"],
    "xtick.labelcolor": COLORS["muted"],
    "ytick.labelcolor": COLORS["muted"],
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
}


def loss_curve(loss: Sequence[tuple[int, float]], learning_rate: Sequence[tuple[int, float]]) -> Markup:
    """Return a plot of the loss by step and below it the learning rate, from pairs (step, value), as inline SVG.

    From 20 steps on, the running mean of the loss is drawn too.
    """
    with mpl.rc_context(PLOT_STYLE):
        figure = Figure()
        axes, lower_axes = figure.subplots(2, 1, sharex=True, height_ratios=[3.4, 1])
        steps, rates = zip(*learning_rate, strict=True)
        lower_axes.plot(steps, rates, color=COLORS["muted"], linewidth=1.2)
        lower_axes.set_ylim(0, max(1.15 * max(rates), 1e-12))
        lower_axes.yaxis.set_major_locator(MaxNLocator(2))
        lower_axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        steps, values = zip(*loss, strict=True)
        is_short = len(values) < 20
        axes.plot(
            steps, values, color=COLORS["teal"], linewidth=1.6 if is_short else 0.8, alpha=1 if is_short else 0.35
        )
        if not is_short:
            axes.plot(steps, running_mean(values), color=COLORS["teal"], linewidth=1.8)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        # Horizontal text above an axis is easier to read than rotated text beside it.
        axes.set_title("loss, nats per token")
        lower_axes.set_title("learning rate")
        lower_axes.set_xlabel("step")
        lower_axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return inline_svg(figure, "Training loss and learning rate by step")


def length_histogram(lengths: Mapping[str, Sequence[int]]) -> Markup:
    """Return a histogram of response lengths as inline SVG: for each label the share of its responses in each bin.

    The axis of lengths is logarithmic if the longest response has more than 20 times the median length.

    Args:
        lengths: label (`harmful` or `benign`) -> lengths in tokens, of which one list at least is not empty.
    """
    all_lengths = sorted(length for tokens in lengths.values() for length in tokens)
    shortest, longest, median = max(all_lengths[0], 1), max(all_lengths[-1], 1), all_lengths[len(all_lengths) // 2]
    is_logarithmic = longest > 20 * max(median, 1)
    bins = min(36, max(8, longest - shortest + 1))
    if is_logarithmic:
        edges = [shortest * (longest * 1.001 / shortest) ** (i / bins) for i in range(bins + 1)]
    else:
        # Bins of whole tokens: otherwise they would alternate between n and n + 1 lengths each.
        width = math.ceil((longest - shortest + 1) / bins)
        edges = [shortest - 0.5 + width * i for i in range(math.ceil((longest - shortest + 1) / width) + 1)]
    with mpl.rc_context(PLOT_STYLE):
        figure = Figure()
        axes = figure.subplots()
        for label, color in (("harmful", COLORS["rust"]), ("benign", COLORS["blue"])):
            if tokens := lengths.get(label):
                weights = [1 / len(tokens)] * len(tokens)
                axes.hist(tokens, edges, weights=weights, histtype="stepfilled", color=color, alpha=0.22, linewidth=0)
                axes.hist(tokens, edges, weights=weights, histtype="step", color=color, linewidth=1.5)
        if is_logarithmic:
            axes.set_xscale("log")
            axes.minorticks_off()
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if axes.get_ylim()[1] > 0.04 else 1))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel("tokens in the response")
        axes.set_title("share of responses")
        return inline_svg(figure, "Histogram of response lengths in tokens")


def running_mean(values: Sequence[float]) -> list[float]:
    """Return the centered running mean of each value, over a window of a twentieth of all values and at least three."""
    half_window = max(1, len(values) // 40)
    windows = [values[max(0, index - half_window) : index + half_window + 1] for index in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def inline_svg(figure: Figure, description: str) -> Markup:
    """Return the figure as inline SVG with the page's colors and font, without metadata and external references.

    Args:
        description: text for screen readers, different for each plot of a page: ids depend on it.
    """
    buffer = io.StringIO()
    # The salt makes the ids of clip paths reproducible, and different in the two plots of a page.
    with mpl.rc_context({"svg.hashsalt": description}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    view_box = re.search(r'viewBox="[^"]*"', svg)[0]
    svg = re.sub(
        r".*?<svg[^>]*>", f'<svg {view_box} role="img" aria-label="{description}">', svg, count=1, flags=re.DOTALL
    )
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<g id=\"[^\"]*\">", "<g>", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--sans)", svg)
    for variable, color in COLORS.items():
        svg = svg.replace(color, f"var(--{variable})")
    return Markup(svg)
