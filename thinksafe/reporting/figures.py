"""The two plots of the report that need axes, drawn by matplotlib into SVG that belongs to the page around it.

Knows nothing of the report: functions take numbers and return SVG. The one idea: matplotlib draws in marker colours,
which are then replaced by the page's CSS variables, so that one drawing serves light and dark and uses the page's font.
No string of a run ever enters a drawing; names stand in the HTML, where they are escaped.
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

# Colours that nobody would choose, and the CSS variable that each one stands for.
MUTED, LINE, AFTER, HARMFUL, BENIGN = "#000001", "#000002", "#000003", "#000004", "#000005"
CSS_VARIABLES = {MUTED: "muted", LINE: "line", AFTER: "after", HARMFUL: "harmful", BENIGN: "benign"}

STYLE = {
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

# Inches. Small on purpose: at 72 units an inch the labels stay readable where the page is 400 pixels wide.
WIDTH, HEIGHT = 4.9, 2.75


def loss_curve(loss: Sequence[Sequence[float]], learning_rate: Sequence[Sequence[float]]) -> Markup:
    """The loss of every logged step, its running mean, and below it the learning rate.

    Args:
        loss: pairs (step, loss in nats a token); a loss of None leaves a gap.
        learning_rate: pairs (step, learning rate); may be empty.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        if learning_rate:
            axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[3.4, 1])
            steps, rates = columns(learning_rate)
            below.plot(steps, rates, color=MUTED, linewidth=1.2)
            below.set_ylim(0, max(1.15 * max((rate for rate in rates if math.isfinite(rate)), default=0), 1e-12))
            below.yaxis.set_major_locator(MaxNLocator(2))
            below.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            label(below, "learning rate")
        else:
            axes = below = figure.subplots()
        steps, values = columns(loss)
        few = len(values) < 20
        axes.plot(steps, values, color=AFTER, linewidth=1.6 if few else 0.8, alpha=1 if few else 0.35)
        if not few:
            axes.plot(steps, running_mean(values), color=AFTER, linewidth=1.8)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        label(axes, "loss, nats a token")
        below.set_xlabel("step")
        below.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return inline_svg(figure, "Training loss and learning rate by step")


def length_histogram(harmful: Sequence[int], benign: Sequence[int]) -> Markup:
    """How long the generated responses are, as shares of each kind.

    Args:
        harmful, benign: lengths in tokens; one of them may be empty. Where a few are far longer, the axis is
            logarithmic.
    """
    kinds = [(lengths, colour) for lengths, colour in ((harmful, HARMFUL), (benign, BENIGN)) if lengths]
    everything = sorted(length for lengths, _ in kinds for length in lengths)
    shortest, longest, median = max(everything[0], 1), max(everything[-1], 1), everything[len(everything) // 2]
    logarithmic = longest > 20 * max(median, 1)
    bins = min(36, max(8, longest - shortest + 1))
    if logarithmic:
        edges = [shortest * (longest * 1.001 / shortest) ** (i / bins) for i in range(bins + 1)]
    else:
        # Whole tokens, or bars would alternate between n and n + 1 lengths each.
        width = math.ceil((longest - shortest + 1) / bins)
        edges = [shortest - 0.5 + width * i for i in range(math.ceil((longest - shortest + 1) / width) + 1)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        for lengths, colour in kinds:
            weights = [1 / len(lengths)] * len(lengths)
            axes.hist(lengths, edges, weights=weights, histtype="stepfilled", color=colour, alpha=0.22, linewidth=0)
            axes.hist(lengths, edges, weights=weights, histtype="step", color=colour, linewidth=1.5)
        if logarithmic:
            axes.set_xscale("log")
            axes.minorticks_off()
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if axes.get_ylim()[1] > 0.04 else 1))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel("tokens in the response")
        label(axes, "share of responses")
        return inline_svg(figure, "Histogram of response lengths in tokens")


def columns(pairs: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Splits pairs (step, value) into steps and values, with not-a-number for a missing value."""
    return [step for step, _ in pairs], [math.nan if value is None else value for _, value in pairs]


def running_mean(values: Sequence[float]) -> list[float]:
    """Mean of the twentieth of the run around each value, gaps left out: centred, so that it lags behind nothing."""
    reach = max(1, len(values) // 40)
    means = []
    for place in range(len(values)):
        near = [value for value in values[max(0, place - reach) : place + reach + 1] if math.isfinite(value)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means


def label(axes: Axes, text: str) -> None:
    """Names the vertical axis above its top, where it reads without turning the head."""
    axes.set_title(text, loc="left", fontsize=9, color=MUTED, pad=6)


def inline_svg(figure: Figure, description: str) -> Markup:
    """The figure as SVG for the inside of a page: the page's colours and font, no metadata, no outside address."""
    drawn = io.StringIO()
    # The salt makes identifiers of clip paths repeatable, and different from those of the page's other drawing.
    with mpl.rc_context({"svg.hashsalt": description}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<g id=\"[^\"]*\">", "<g>", svg)
    view_box = re.search(r'viewBox="[^"]*"', svg)[0]
    svg = re.sub(r"<svg[^>]*>", f'<svg {view_box} role="img" aria-label="{description}">', svg, count=1)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--sans)", svg)
    for colour, variable in CSS_VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return Markup(svg)
