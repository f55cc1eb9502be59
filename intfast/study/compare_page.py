"""The page of a finished comparison: compare.json, and what its run folders add.

The estimates are those of compare.json; curves, tokens by purpose, settings and folders are read
from the runs of the arms.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from intfast import cli
from intfast.study import arms, compare_table
from intfast.study.charts import Line, Point, bar, chart, dotted, legend
from intfast.study.page_data import Section, origin, toml
from intfast.study.read import read_figures, read_json, read_rows
from intfast.study.results import NO_WIDTH, UNSCORED, pass_chart, pass_points, sampling
from intfast.study.sections import versions
from intfast.study.tables import Cell, Column, Table, element, fold, heads, note, reading
from intfast.study.training import CURVES

SERIES = ("reward", "zero_advantage", "all_wrong", "length", "truncated", "entropy_sampled")
"""The curves of RL that are shown, arm beside arm."""
PURPOSES = {
    "attempts": ("attempts", 0),
    "verify": ("verification", 4),
    "continue": ("continuations", 2),
    "guided": ("rewrites and hints", 5),
}
"""Part of the collection -> its name and colour."""
ROLLOUTS = ("rollouts of RL", 3)


def is_comparison(folder: Path) -> bool:
    """Whether a folder was made by intfast.study.compare."""
    return (folder / "compare.json").is_file() or any(folder.glob("seed-*/collection"))


def ours(folder: Path) -> dict[str, Path]:
    """Name -> run folder of our arm, one per seed, whose interventions the page shows."""
    found = read(folder)
    name = next((name for name in (arms.OURS, "int") if name in found["arms"]), "")
    folders = {
        f"seed {seed}": folder / f"seed-{seed}" / arms.run_of(name, list(found["arms"]))
        for seed in found["seeds"]
        if name
    }
    return {name: path for name, path in folders.items() if (path / "summary.json").is_file()}


def read(folder: Path) -> dict[str, Any]:
    """compare.json with its estimates.

    Raises ValueError where the comparison has not finished, or holds what this version does not
    know.
    """
    found = read_figures(folder / "compare.json")
    if found is None:
        raise ValueError(
            f"{folder} holds a comparison that has not finished: it has no compare.json; repeat "
            "its command, or name run folders in it"
        )
    if unknown := [name for name in found["arms"] if name not in arms.ARMS]:
        raise ValueError(f"{folder}/compare.json: this version knows no arm {', '.join(unknown)}")
    for row in found["arms"].values():
        row["pass_at_k"] = {int(k): estimate for k, estimate in row["pass_at_k"].items()}
    return found


class About:
    """A finished comparison, read whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found = read(folder)
        self.rows: dict[str, dict[str, Any]] = self.found["arms"]
        self.seeds: list[int] = self.found["seeds"]
        names = list(self.rows)
        self.runs = {name: arms.run_of(name, names) for name in names if name != "base"}
        self.standard = self.runs.get(arms.OURS, "collection")
        """The run whose settings the others are shown against."""
        first = folder / f"seed-{self.seeds[0]}"
        self.config = cli.load(first / self.standard / "config.toml")
        self.manifest = read_json(first / "collection" / "manifest.json") or {}
        self.cells = {
            name: {seed: compare_table.measure(folder, name, names, seed) for seed in self.seeds}
            for name in names
        }

    def evaluations(self, name: str, longer: bool = False) -> dict[int, Any]:
        """Seed -> evaluation of an arm; `longer`: after as many tokens as ours."""
        done = {seed: cells for seed, cells in self.cells[name].items() if cells}
        if longer:
            with_ours = self.cells.get(arms.OURS, {})
            done = {s: cells["longer"] or cells for s, cells in done.items() if with_ours.get(s)}
        return {seed: cells["evaluation"] for seed, cells in done.items()}

    def by_seed_tokens(self) -> dict[str, list[tuple[int, float]]]:
        """Arm with RL -> (seed, accuracy) at equal tokens."""
        names = [name for name, row in self.rows.items() if row["accuracy_tokens"]]
        return {n: compare_table.by_seed(self.evaluations(n, longer=True)) for n in names}


def header(about: About) -> list[Any]:
    """What this is a page of."""
    seeds = f"{'seed' if len(about.seeds) == 1 else 'seeds'} {', '.join(map(str, about.seeds))}"
    text: list[Any] = [f"{len(about.rows)} arms of a comparison, from "]
    text += [*origin(about.config, about.manifest), f", with {seeds}."]
    found = [element("h1", about.folder.resolve().name), element("p", text, class_="muted")]
    measured = [row["accuracy"] for row in about.rows.values() if row["accuracy"]]
    if measured:
        counted = (
            f"Measured: {measured[0].num_problems:,} held-out problems, "
            f"{about.config.evaluate.samples:,} samples of each and seed, {sampling(about.config)}"
        )
        found.append(element("p", counted))
    return found


def sections(about: About) -> tuple[list[Section], list[Section]]:
    """What stands before the interventions of our arm, and behind them."""
    before = [_results(about)]
    before += [_tokens(about)] if any(r["accuracy_tokens"] for r in about.rows.values()) else []
    return [*before, _training(about)], [_settings(about)]


# --- results -----------------------------------------------------------------------------------


def _results(about: About) -> Section:
    table = compare_table.steps_table(about.found)
    parts = [*_verdicts(about, "ahead", "equal steps"), table, _counted(about), *_pass(about)]
    return Section("results", "Equal steps", "At equal RL steps", parts)


def _verdicts(about: About, key: str, where: str) -> list[Any]:
    """What of it is ahead, behind, or neither, in words."""
    groups: dict[str, list[str]] = defaultdict(list)
    for row in about.rows.values():
        groups[reading(row[key], "clearly ahead of", "behind")].append(row["label"])
    words = {"not told apart": "not told apart from"}
    items = [
        element("li", element("b", words.get(word, word)), f": {'; '.join(groups[word])}.")
        for word in ("clearly ahead of", "not told apart", "behind")
        if groups[word]
    ]
    if not items:
        return []
    title = element("b", f"{compare_table.OURS} is, in accuracy at {where},")
    return [element("p", title), element("ul", items, class_="verdicts")]


def _counted(about: About) -> Markup:
    several = len(about.seeds) > 1
    over = "seeds and problems" if several else "problems"
    few = "; of few seeds an interval tells little more than their spread"
    ahead = (
        f"\u201c{compare_table.OURS} ahead by\u201d is its accuracy minus that of the arm, paired "
        "by seed and problem; \u201cnot told apart\u201d: the interval holds zero. Each interval "
        "stands alone; among many some exclude zero by chance. "
    )
    text = (
        f"In brackets: 95 % intervals, by drawing {over} again with replacement (bootstrap, 2,000 "
        f"times){few if several else '; they say nothing of another seed'}. Accuracy is the mean "
        "over seeds and problems of the share of right samples; pass@k the unbiased estimate that "
        f"one of k samples is right. {UNSCORED} {ahead if about.found['compared_with'] else ''}"
        "Arms without RL have no RL steps; those after RL had "
        f"{about.config.rl.steps or 'none'}. {NO_WIDTH}"
    )
    return fold("How these were counted", note(text), open=True)


def _pass(about: About) -> list[Any]:
    """pass@k of the arms before and after RL, at powers of two."""
    blocks = []
    for title, wanted in (
        ("pass@k before RL", lambda name: not arms.has_rl(name)),
        ("pass@k after RL, at equal steps", lambda name: name == "base" or arms.has_rl(name)),
    ):
        lines = []
        for name, row in about.rows.items():
            if wanted(name) and row["accuracy"]:
                curve = dict(compare_table.pass_curve(about.evaluations(name)))
                lines.append(_line(name, row, pass_points(curve), dots=True))
        if len(lines) > 1 and (figure := pass_chart(title, lines, "mean over seeds")):
            blocks.append(element("div", figure, _legend(lines)))
    title = element("h3", "What more samples would solve")
    return [title, element("div", blocks, class_="charts two")] if blocks else []


def _line(name: str, row: Mapping[str, Any], points: list[Point], dots: bool = False) -> Line:
    return Line(row["label"], arms.color(name), points, 1, dots, arms.is_dashed(name))


def _legend(lines: Sequence[Line]) -> Markup:
    return legend([(line.label, line.color) for line in lines])


def _tokens(about: About) -> Section:
    text = (
        f"RL of the others goes on until they have generated as many tokens as {compare_table.OURS}"
        ", with attempts, verifications, continuations, rewrites, hints and rollouts counted; "
        "evaluations only measure and are not in it."
    )
    table = compare_table.tokens_table(about.found, about.by_seed_tokens())
    parts = [note(text), *_verdicts(about, "ahead_tokens", "equal tokens"), table]
    return Section("tokens", "Equal tokens", "At equal generated tokens", [*parts, *_spent(about)])


def _spent(about: About) -> list[Any]:
    """Tokens of the arms with RL by what they were for."""
    rows = {name: row for name, row in about.rows.items() if row["accuracy_tokens"]}
    most = max(row["tokens_tokens"] for row in rows.values())
    named = [*PURPOSES.values(), ROLLOUTS]
    lines = []
    for name, row in rows.items():
        collected = sum(row["collection"].values())
        counts = [row["collection"].get(key, 0) for key in PURPOSES]
        counts.append(row["tokens_tokens"] - collected)
        split = [
            (f"{text}: {count:,.0f}", count, place)
            for (text, place), count in zip(named, counts, strict=True)
        ]
        cells = [f"{count:,.0f}" if count else "" for count in counts]
        whole = f"{row['tokens_tokens']:,.0f}"
        steps = f"{row['tokens'] - collected:,.0f}"
        lines.append([_name(name, row), whole, bar(split, most), *cells, steps])
    columns = heads("*arm", ">tokens", "split", *(f">{text}" for text, _ in named))
    columns += heads(">rollouts at equal steps")
    table = Table("", columns, lines, style="arms")
    text = "Means of seeds. What an arm collected is the same at equal steps; only rollouts grow."
    return [element("h3", "Tokens by purpose"), legend(named, "swatch"), table, note(text)]


def _name(name: str, row: Mapping[str, Any]) -> Cell:
    return dotted(row["label"], arms.color(name))


# --- training ----------------------------------------------------------------------------------


def _training(about: About) -> Section:
    rows = {name: row for name, row in about.rows.items() if row["training"]}
    if not rows:
        return Section("training", "Training", "Training", [note("No arm with RL.")])
    columns = heads("*arm", ">training reward", ">zero-advantage share of the groups")
    figures = [
        [_name(name, row), f"{found['reward']:.3f}", f"{found['zero_advantage']:.3f}"]
        for name, row in rows.items()
        for found in [row["training"]]
    ]
    drawn = {name: curves(about, name) for name in rows}
    charts = []
    for key in SERIES:
        lines = [_line(n, rows[n], found[key]) for n, found in drawn.items() if found.get(key)]
        if key == "truncated" and not any(p.y for line in lines for p in line.points):
            continue
        text = CURVES[key].about
        text = "mean of a step's rollouts without a hint" if key == "reward" else text
        charts.append(chart(CURVES[key].title, text, lines))
    text = (
        "Apart from the results, because it is measured on the training problems: it says nothing "
        f"of others. Last quarter of the steps up to {about.config.rl.steps:,}; means of seeds."
    )
    spread = (
        "Mean over the seeds; the band spans them. Where RL goes on for equal tokens, up to the "
        "last step that every seed has."
    )
    parts = [
        note(text),
        Table("", columns, figures, style="arms"),
        element("h3", "Step by step"),
        legend([(row["label"], arms.color(name)) for name, row in rows.items()]),
        note(spread),
        element("div", charts, class_="charts"),
    ]
    return Section("training", "Training", "Training", parts)


def curves(about: About, name: str) -> dict[str, list[Point]]:
    """Series -> mean over the seeds with lowest and highest, at steps that all of them have."""
    tables: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    with_rows = 0
    for seed in about.seeds:
        rows = read_rows(about.folder / f"seed-{seed}" / about.runs[name] / "metrics.jsonl")
        rows = [row for row in rows if row["stage"] == arms.ARMS[name].weights.key]
        with_rows += bool(rows)
        for row in rows:
            # Hinted rollouts are no measure of the bare problem.
            row["reward"] = row.get("reward_bare", row["reward"])
            for key in SERIES:
                if row.get(key) is not None:
                    tables[key][row["step"]].append(row[key])
    return {
        key: [
            Point(step, sum(values) / len(values), min(values), max(values))
            for step, values in sorted(steps.items())
            if len(values) == with_rows
        ]
        for key, steps in tables.items()
    }


# --- settings ----------------------------------------------------------------------------------


def _settings(about: About) -> Section:
    labels = {name: row["label"] for name, row in about.rows.items()}
    given = about.found.get("own_settings", {})
    parts: list[Any] = []
    if given:
        rows = [[labels.get(name, name), "  ".join(words)] for name, words in given.items()]
        parts += [element("h3", "Given to single arms"), _plain(rows, "arm", "settings")]
    first = about.folder / f"seed-{about.seeds[0]}"
    own = []
    for run in dict.fromkeys(about.runs.values()):
        rows = [labels[name] for name in about.runs if about.runs[name] == run]
        own.append([run, "; ".join(rows), "  ".join(_own(first / run, about.config)) or "none"])
    shared = [
        [key, *map(toml, pair)]
        for key, pair in cli.differences(about.config).items()
        if key not in ("run", "seed")
    ]
    folders = [
        _folder(about.folder, seed, run)
        for seed in about.seeds
        for run in ["collection", *dict.fromkeys(about.runs.values())]
    ]
    standard = element("code", about.standard)
    until = element("code", "rl.until_tokens")
    text = "Each is an ordinary run; a link opens its own page where it lies beside this one."
    parts += [
        element("h3", "What makes each arm"),
        note(
            "Settings in which a run differs from ",
            standard,
            ", with the first seed; ",
            until,
            " makes it go on for equal tokens.",
        ),
        _plain(own, "run", "rows", "settings"),
        fold(
            f"What all share: settings of {about.standard} that differ from the defaults",
            _plain(shared, "setting", "default", "here"),
        ),
        element("h3", "Run folders"),
        note(text),
        fold(f"{len(folders)} folders", _plain(folders, "folder", "state"), open=len(folders) < 10),
        *versions({"": {k: v for k, v in about.manifest.items() if k != "starts"}}),
    ]
    return Section("settings", "Settings", "Settings, run folders, versions", parts)


def _plain(rows: Sequence[Sequence[str]], *heads: str) -> Table:
    words = ("arm", "rows", "state")
    columns = [Column(name, "" if name in words else "code") for name in heads]
    return Table("", columns, rows, style="plain")


def _own(folder: Path, config: Any) -> list[str]:
    """The settings of a run that differ from `config`."""
    if not (folder / "config.toml").is_file():
        return []
    found = cli.differences(cli.load(folder / "config.toml"), config)
    return [f"{key}={toml(new)}" for key, (_, new) in found.items() if key != "run"]


def _folder(root: Path, seed: int, run: str) -> list[str]:
    """A run folder, with a link to its page where it has one, and how far it is."""
    folder, name = root / f"seed-{seed}" / run, f"seed-{seed}/{run}"
    if (folder / "skipped.json").is_file():
        return [name, "no example to learn from"]
    if run == "collection":
        return [name, "shared attempts and interventions"]
    if not (folder / "summary.json").is_file():
        return [name, "not finished"]
    link = element("a", name, href=f"seed-{seed}/{quote(run)}/report.html")
    return [Cell(name, link), "finished"]
