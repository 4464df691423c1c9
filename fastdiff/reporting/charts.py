"""The charts, as inline SVG: nothing but numbers, classes and escaped text, so any CSP lets them through.

Colours, widths and fonts are in report.css. Base and tuned differ in shape or dash as well as in colour.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from fastdiff.reporting.schema import Histogram, Point, Run
from fastdiff.reporting.text import fixed, number, visible

# points of the grey cloud; more only blacken it and weigh 12 bytes each
_CLOUD_POINTS = 4000
# the frame of the scatter: ν is 0 for a latent of one model and 1 for a shared one
_NU_LOW, _NU_HIGH = -0.25, 1.25


@dataclass(frozen=True)
class _Frame:
    """A plotting area in pixels and what its edges mean."""

    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]
    left: float = 46
    right: float = 14
    top: float = 12
    bottom: float = 40

    def px(self, x: float) -> float:
        share = (x - self.x[0]) / (self.x[1] - self.x[0])
        return self.left + share * (self.width - self.left - self.right)

    def py(self, y: float) -> float:
        share = (y - self.y[0]) / (self.y[1] - self.y[0])
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)


def histogram(counts: Histogram) -> Markup:
    """Δ_norm of all latents that fire, on a logarithmic count axis."""
    highest = max([*counts.counts, 1])
    decades = max(1, math.ceil(math.log10(highest * 1.05)))
    f = _Frame(420, 310, (0, 1), (-0.15, decades), bottom=58)
    parts = [_y_axis(f, [(d, number(10**d)) for d in range(decades + 1)], "latents")]
    for low, high, n in zip(counts.edges, counts.edges[1:], counts.counts, strict=False):
        if n:
            top = f.py(math.log10(n))
            zone = _zone((low + high) / 2)
            box = f'x="{f.px(low) + 0.5:.1f}" y="{top:.1f}" width="{f.px(high) - f.px(low) - 1:.1f}"'
            parts.append(
                f'<rect class="bar {zone}" {box} height="{f.py(f.y[0]) - top:.1f}">'
                f"<title>{low:g} to {high:g}: {n:,} latents</title></rect>"
            )
    ticks = [(x, number(x)) for x in (0, 0.1, 0.4, 0.6, 0.9, 1)]
    parts.append(_x_axis(f, ticks, ""))
    for x, anchor, words in (
        (0, "start", "only base"),
        (0.5, "middle", "both alike"),
        (1, "end", "only tuned"),
    ):
        parts.append(_text(f.px(x), f.height - 26, words, f"note {anchor}"))
    parts.append(_text(f.px(0.5), f.height - 6, "Δ norm of the decoder", "label middle"))
    total = sum(counts.counts)
    return _svg(f, parts, f"Histogram of delta norm over {total:,} latents, from 0, only base, to 1, only tuned")


def scatter(run: Run, run_index: int) -> Markup:
    """ν_error against ν_reconstruction: shared latents a grey cloud, specific ones marked by their model."""
    f = _Frame(420, 310, (_NU_LOW, _NU_HIGH), (_NU_LOW, _NU_HIGH), bottom=44)
    limits = run.summary.thresholds
    x, y = run.latents.numbers("nu_error"), run.latents.numbers("nu_reconstruction")
    drawn = np.isfinite(x) & np.isfinite(y)
    px = np.array([f.px(v) for v in np.clip(x, *f.x)])
    py = np.array([f.py(v) for v in np.clip(y, *f.y)])
    specific = np.array(run.latents.text("specific"))
    cards = {card.latent for card in run.cards}

    a, b = f.px(-limits.nu_error_max), f.px(limits.nu_error_max)
    c, d = f.py(limits.nu_reconstruction_max), f.py(-limits.nu_reconstruction_max)
    c, d = max(c, f.top), min(d, f.height - f.bottom)
    parts = [f'<rect class="zone" x="{a:.1f}" y="{c:.1f}" width="{b - a:.1f}" height="{d - c:.1f}"/>']
    ticks = [(v, number(v)) for v in (0, 0.5, 1)]
    parts += [_y_axis(f, ticks, "ν reconstruction"), _x_axis(f, ticks, "ν error")]

    cloud = np.flatnonzero(drawn & (specific == ""))
    step = max(1, math.ceil(len(cloud) / _CLOUD_POINTS))
    dots = "".join(f"M{px[i]:.0f} {py[i]:.0f}h0" for i in cloud[::step])
    parts.append(f'<path class="cloud" d="{dots}"/>')
    for side, mark in (("base", _diamond), ("tuned", _disc)):
        chosen = np.flatnonzero(drawn & (specific == side)).tolist()
        plain = "".join(mark(px[i], py[i]) for i in chosen if i not in cards)
        if plain:
            parts.append(f'<path class="mark {side}" d="{plain}"/>')
        for i in chosen:
            if i in cards:
                label = run.labels[i].label if i in run.labels else "no label"
                parts.append(
                    f'<path class="mark {side} live" data-run="{run_index}" data-latent="{i}" '
                    f'd="{mark(px[i], py[i])}">'
                    f"<title>{side}, latent {i}: {escape(visible(label))}</title></path>"
                )
    n_base, n_tuned = int((specific == "base").sum()), int((specific == "tuned").sum())
    words = f"Scatter of nu error and nu reconstruction: {n_base:,} specific to base, {n_tuned:,} to tuned"
    return _svg(f, parts, words)


def forest_limit(rows: Iterable[Sequence[float | None]]) -> float:
    """A round number that no interval of the rows exceeds."""
    largest = max([abs(v) for row in rows for v in row if v is not None], default=1.0)
    return next((n for n in (1, 2, 5, 10, 15, 20, 30, 40, 50, 60, 80) if largest <= n), 100)


def nats_limit(values: Iterable[float | None]) -> float:
    """A round number of nats that no value exceeds; beyond 20, where they stand on the edge."""
    largest = max([abs(v) for v in values if v is not None], default=0.1)
    return next((n for n in (0.1, 0.2, 0.5, 1, 2, 5, 10) if largest <= n), 20)


def forest(
    point: float | None, low: float | None, high: float | None, limit: float, clear: bool, *, unit: str = "points"
) -> Markup:
    """One row of a forest plot: a point (filled when it is clear of zero) with its interval."""
    digits = 1 if unit == "points" else 3
    f = _Frame(200, 22, (-limit, limit), (0, 1), left=8, right=8, top=0, bottom=0)
    zero = f.px(0)
    parts = [f'<path class="zero" d="M{zero:.1f} 0V22"/>']
    words = "no estimate"
    if point is not None:
        words = f"{fixed(point, digits, True)} {unit}"
        if low is not None and high is not None:
            left, right = (f.px(max(-limit, min(limit, v))) for v in (low, high))
            parts.append(f'<path class="interval" d="M{left:.1f} 11H{right:.1f}M{left:.1f} 8v6M{right:.1f} 8v6"/>')
            words += f", interval {fixed(low, digits, True)} to {fixed(high, digits, True)}"
        x = f.px(max(-limit, min(limit, point)))
        parts.append(f'<circle class="{"point clear" if clear else "point"}" cx="{x:.1f}" cy="11" r="4"/>')
    return _svg(f, parts, words, "forest")


def forest_axis(limit: float, unit: str = "percentage points") -> Markup:
    """The head of a forest plot: its scale."""
    f = _Frame(200, 18, (-limit, limit), (0, 1), left=8, right=8, top=0, bottom=0)
    parts = [
        _text(8, 12, f"−{number(limit)}", "tick start"),
        _text(f.px(0), 12, "0", "tick middle"),
        _text(192, 12, f"+{number(limit)}", "tick end"),
    ]
    return _svg(f, parts, f"Scale from minus {limit:g} to plus {limit:g} {unit}", "forest")


def curves(points: list[Point]) -> list[tuple[str, Markup]]:
    """Loss, FVE, L0 and dead latents over the training steps, as far as they were logged."""
    wanted: list[tuple[str, list[tuple[str, Callable[[Point], float | None]]]]] = [
        ("Loss", [("", lambda p: p.loss)]),
        (
            "Fraction of variance explained",
            [("base", lambda p: _at(p.fve, 0)), ("tuned", lambda p: _at(p.fve, 1))],
        ),
        ("L0, latents per token", [("", lambda p: p.l0)]),
        ("Dead latents, share", [("", lambda p: p.dead)]),
    ]
    drawn = []
    for title, lines in wanted:
        series = [(name, [(p.step, v) for p in points if (v := value(p)) is not None]) for name, value in lines]
        series = [(name, line) for name, line in series if len(line) > 1]
        if series:
            drawn.append((title, _lines(title, series)))
    return drawn


def _lines(title: str, series: list[tuple[str, list[tuple[int, float]]]]) -> Markup:
    steps = [step for _, line in series for step, _ in line]
    values = np.array([v for _, line in series for _, v in line])
    low, high = float(values.min()), float(values.max())
    if title == "Loss":
        # the first steps fall from far above everything that follows
        high = min(high, float(np.quantile(values, 0.98)) * 1.1)
    elif title == "Fraction of variance explained":
        low, high = max(0.0, min(low, 0.5)), 1.0
    else:
        low = 0.0
    ticks = _round_ticks(low, high)
    low, high = ticks[0], ticks[-1]
    f = _Frame(340, 180, (min(steps), max(steps)), (low, high), right=44 if len(series) > 1 else 20, bottom=38)
    parts = [_y_axis(f, [(v, number(v)) for v in ticks], "")]
    parts.append(_x_axis(f, [(s, number(s)) for s in (min(steps), max(steps))], "step"))
    ends: list[float] = []
    for name, line in series:
        path = "L".join(f"{f.px(s):.1f} {f.py(max(low, min(high, v))):.1f}" for s, v in line)
        parts.append(f'<path class="line {name or "plain"}" d="M{path}"/>')
        if name:
            end = f.py(max(low, min(high, line[-1][1]))) + 4
            # two labels need a line's height between them
            end = end if all(abs(end - other) >= 13 for other in ends) else max(ends) + 13
            ends.append(end)
            parts.append(_text(f.width - f.right + 4, end, name, f"tick start {name}"))
    return _svg(f, parts, f"{title} over training steps {min(steps):,} to {max(steps):,}")


def _round_ticks(low: float, high: float) -> list[float]:
    """Two to six round values from at or below `low` to at or above `high`."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / 4
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def _at(values: list[float | None] | None, i: int) -> float | None:
    return values[i] if values is not None and len(values) > i else None


def _zone(delta: float) -> str:
    if delta < 0.1:
        return "base"
    if delta > 0.9:
        return "tuned"
    return "shared" if 0.4 <= delta <= 0.6 else "other"


def _disc(x: float, y: float) -> str:
    return f"M{x - 2.8:.1f} {y:.1f}a2.8 2.8 0 1 0 5.6 0a2.8 2.8 0 1 0-5.6 0z"


def _diamond(x: float, y: float) -> str:
    return f"M{x:.1f} {y - 4:.1f}l4 4l-4 4l-4-4z"


def _text(x: float, y: float, words: str, classes: str) -> str:
    return f'<text class="{classes}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def _x_axis(f: _Frame, ticks: list[tuple[float, str]], label: str) -> str:
    base = f.height - f.bottom
    parts = [f'<path class="axis" d="M{f.left} {base}H{f.width - f.right}"/>']
    for value, words in ticks:
        parts.append(f'<path class="axis" d="M{f.px(value):.1f} {base}v4"/>')
        # a long number at the right edge would be cut
        at_edge = value == f.x[1] and len(words) > 3
        parts.append(_text(f.px(value) + 8 * at_edge, base + 16, words, f"tick {'end' if at_edge else 'middle'}"))
    if label:
        parts.append(_text((f.left + f.width - f.right) / 2, f.height - 6, label, "label middle"))
    return "".join(parts)


def _y_axis(f: _Frame, ticks: list[tuple[float, str]], label: str) -> str:
    parts = []
    for value, words in ticks:
        y = f.py(value)
        parts.append(f'<path class="grid" d="M{f.left} {y:.1f}H{f.width - f.right}"/>')
        parts.append(_text(f.left - 6, y + 4, words, "tick end"))
    if label:
        middle = (f.top + f.height - f.bottom) / 2
        turn = f'transform="translate(12 {middle:.1f}) rotate(-90)"'
        parts.append(f'<text class="label middle" {turn}>{escape(label)}</text>')
    return "".join(parts)


def _svg(f: _Frame, parts: list[str], words: str, classes: str = "chart") -> Markup:
    box = f"0 0 {f.width:g} {f.height:g}"
    head = f'<svg class="{classes}" viewBox="{box}" role="img" aria-label="{escape(words)}">'
    return Markup(head + "".join(parts) + "</svg>")
