"""The harness: what a scenario is, how it is repeated, how its figures are judged and written.

A scenario is a module `bench/<name>.py` with a `SCENARIO`. Its `measure` gives samples for each
figure, one for every repetition; the harness takes the median and the spread (least to most).
A ratio compares two things of one run: figures of different runs, machines or hours do not compare.
"""

import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# The samples of each figure; one number stands for itself.
Measurement = Mapping[str, float | Sequence[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One row of a table. `at_most` or `at_least` is its target; the median is held against it."""

    name: str
    unit: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def target(self) -> str:
        """The target as it is printed, "" where there is none."""
        if self.at_most is not None:
            return f"≤ {_shown(self.at_most)}"
        return f"≥ {_shown(self.at_least)}" if self.at_least is not None else ""

    def is_met(self, value: float) -> bool | None:
        """None where there is no target."""
        if self.at_most is not None:
            return value <= self.at_most
        return value >= self.at_least if self.at_least is not None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """How often a scenario is to be repeated; `long`: what a target wants for a minute takes it."""

    repetitions: int = 5
    warm_ups: int = 1
    long: bool = False

    def repeat(self, once: Callable[[], Mapping[str, float]]) -> dict[str, list[float]]:
        """Run `once` for the warm-up, then for each repetition; the samples by figure."""
        for _ in range(self.warm_ups):
            once()
        samples: dict[str, list[float]] = {}
        for _ in range(self.repetitions):
            for name, value in once().items():
                samples.setdefault(name, []).append(value)
        return samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """`measure` may give more than `figures` names; what is not named is only in the JSON."""

    name: str
    what: str
    figures: tuple[Figure, ...]
    measure: Callable[[Context], Measurement]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A figure with what was found; `met` None where there is no target."""

    figure: Figure
    median: float
    least: float
    most: float
    samples: tuple[float, ...]

    @property
    def met(self) -> bool | None:
        return self.figure.is_met(self.median)


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """`above` for `below`, repetition by repetition. Errors: ValueError for unequal lengths."""
    return [one / other for one, other in zip(above, below, strict=True)]


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]


def run(scenario: Scenario, context: Context) -> tuple[list[Row], Measurement]:
    """Measure, and hold every named figure against its target. Errors: KeyError for a figure that
    the scenario names and does not give."""
    measurement = scenario.measure(context)
    return [_row(figure, measurement[figure.name]) for figure in scenario.figures], measurement


def _row(figure: Figure, found: float | Sequence[float]) -> Row:
    samples = (float(found),) if isinstance(found, int | float) else tuple(found)
    return Row(
        figure=figure,
        median=statistics.median(samples),
        least=min(samples),
        most=max(samples),
        samples=samples,
    )


def table(scenario: Scenario, rows: Sequence[Row]) -> str:
    """The Markdown section of one scenario."""
    lines = [
        f"## {scenario.name}",
        scenario.what,
        "",
        "| figure | median | spread | n | target | |",
        "|---|---:|---|---:|---|---|",
    ]
    for row in rows:
        verdict = {True: "met", False: "**missed**", None: ""}[row.met]
        cells = [
            row.figure.name,
            f"{_shown(row.median)} {row.figure.unit}".strip(),
            f"{_shown(row.least)} – {_shown(row.most)}",
            str(len(row.samples)),
            row.figure.target,
            verdict,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def machine() -> dict[str, str | int | float]:
    """What a reader needs to judge the figures; nothing that names the machine."""
    return {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cores": os.cpu_count() or 0,
        "load_1min": round(os.getloadavg()[0], 2),
    }


def write(
    folder: Path, stem: str, results: Mapping[str, tuple[Scenario, list[Row], Measurement]]
) -> Path:
    """Write `<stem>.json` and `<stem>.md` into the folder; returns the Markdown file."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = machine()
    document = {
        "machine": facts,
        "scenarios": {
            name: {
                "figures": [_as_json(row) for row in rows],
                "measurement": {key: _plain(value) for key, value in measurement.items()},
            }
            for name, (_, rows, measurement) in results.items()
        },
    }
    (folder / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")
    head = " · ".join(f"{key} {value}" for key, value in facts.items())
    sections = [table(scenario, rows) for scenario, rows, _ in results.values()]
    markdown = folder / f"{stem}.md"
    markdown.write_text("\n".join([head, "", *sections]))
    return markdown


def _as_json(row: Row) -> dict[str, str | float | bool | list[float] | None]:
    return {
        "name": row.figure.name,
        "unit": row.figure.unit,
        "target": row.figure.target,
        "median": row.median,
        "least": row.least,
        "most": row.most,
        "met": row.met,
        "samples": list(row.samples),
    }


def _plain(value: float | Sequence[float]) -> float | list[float]:
    return value if isinstance(value, int | float) else list(value)


def _shown(value: float) -> str:
    """Three digits that mean something; thousands apart."""
    if abs(value) >= 1_000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
