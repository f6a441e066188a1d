"""The two plots of the report that need axes, drawn by matplotlib as inline SVG.

This file knows nothing of the report: its functions take numbers and return SVG. Matplotlib draws in marker colors,
which are then replaced by the page's CSS variables. So one drawing works in light and dark mode, with the page's font.
A plot contains no string of the run: names are part of the HTML, where they are escaped.
"""

import io
import math
import re
from collections.abc import Sequence

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

# Marker colors, which occur nowhere else, and the CSS variable that replaces each of them.
MUTED, LINE, AFTER, HARMFUL, BENIGN = "#000001", "#000002", "#000003", "#000004", "#000005"
CSS_VARIABLES = {MUTED: "muted", LINE: "line", AFTER: "after", HARMFUL: "harmful", BENIGN: "benign"}

# Settings of matplotlib for both plots.
PLOT_STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": MUTED,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
}

# Inches. The plots are small, so that their labels are readable (72 units an inch) on a page 400 pixels wide.
WIDTH, HEIGHT = 4.9, 2.75


def loss_curve(loss: Sequence[Sequence[float]], learning_rate: Sequence[Sequence[float]]) -> Markup:
    """Return a plot of the loss by step and below it the learning rate, as inline SVG.

    From 20 steps on, the running mean of the loss is drawn too.

    Args:
        loss: pairs (step, loss in nats per token); a loss of None leaves a gap.
        learning_rate: pairs (step, learning rate); if empty, only the loss is drawn.
    """
    with mpl.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        if learning_rate:
            axes, lower_axes = figure.subplots(2, 1, sharex=True, height_ratios=[3.4, 1])
            steps, rates = split_pairs(learning_rate)
            lower_axes.plot(steps, rates, color=MUTED, linewidth=1.2)
            lower_axes.set_ylim(0, max(1.15 * max((rate for rate in rates if math.isfinite(rate)), default=0), 1e-12))
            lower_axes.yaxis.set_major_locator(MaxNLocator(2))
            lower_axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            set_vertical_label(lower_axes, "learning rate")
        else:
            axes = lower_axes = figure.subplots()
        steps, values = split_pairs(loss)
        is_short = len(values) < 20
        axes.plot(steps, values, color=AFTER, linewidth=1.6 if is_short else 0.8, alpha=1 if is_short else 0.35)
        if not is_short:
            axes.plot(steps, running_mean(values), color=AFTER, linewidth=1.8)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        set_vertical_label(axes, "loss, nats per token")
        lower_axes.set_xlabel("step")
        lower_axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return inline_svg(figure, "Training loss and learning rate by step")


def length_histogram(harmful: Sequence[int], benign: Sequence[int]) -> Markup:
    """Return a histogram of response lengths as inline SVG: for each label the share of its responses in each bin.

    The axis of lengths is logarithmic if the longest response has more than 20 times the median length.

    Args:
        harmful, benign: lengths in tokens; one of the two may be empty, and is then not drawn.
    """
    kinds = [(lengths, color) for lengths, color in ((harmful, HARMFUL), (benign, BENIGN)) if lengths]
    all_lengths = sorted(length for lengths, _ in kinds for length in lengths)
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
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        for lengths, color in kinds:
            weights = [1 / len(lengths)] * len(lengths)
            axes.hist(lengths, edges, weights=weights, histtype="stepfilled", color=color, alpha=0.22, linewidth=0)
            axes.hist(lengths, edges, weights=weights, histtype="step", color=color, linewidth=1.5)
        if is_logarithmic:
            axes.set_xscale("log")
            axes.minorticks_off()
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if axes.get_ylim()[1] > 0.04 else 1))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel("tokens in the response")
        set_vertical_label(axes, "share of responses")
        return inline_svg(figure, "Histogram of response lengths in tokens")


def split_pairs(pairs: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Return the steps and the values of pairs (step, value) as two lists; NaN replaces a value of None."""
    return [step for step, _ in pairs], [math.nan if value is None else value for _, value in pairs]


def running_mean(values: Sequence[float]) -> list[float]:
    """Return the centered running mean of each value, over a window of a twentieth of all values and at least three.

    Values that are not finite do not count; a mean is NaN if its window has no finite value.
    """
    half_window = max(1, len(values) // 40)
    means = []
    for index in range(len(values)):
        window = [
            value for value in values[max(0, index - half_window) : index + half_window + 1] if math.isfinite(value)
        ]
        means.append(sum(window) / len(window) if window else math.nan)
    return means


def set_vertical_label(axes: Axes, text: str) -> None:
    """Label the vertical axis with horizontal text above it, instead of rotated text beside it."""
    axes.set_title(text, loc="left", fontsize=9, color=MUTED, pad=6)


def inline_svg(figure: Figure, description: str) -> Markup:
    """Return the figure as inline SVG with the page's colors and font, without metadata and external references.

    Args:
        description: description for screen readers, different for each plot of a page: ids depend on it.
    """
    buffer = io.StringIO()
    # The salt makes the ids of clip paths reproducible, and different in the two plots of a page.
    with mpl.rc_context({"svg.hashsalt": description}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<g id=\"[^\"]*\">", "<g>", svg)
    view_box = re.search(r'viewBox="[^"]*"', svg)[0]
    svg = re.sub(r"<svg[^>]*>", f'<svg {view_box} role="img" aria-label="{description}">', svg, count=1)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--sans)", svg)
    for color, variable in CSS_VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    return Markup(svg)
