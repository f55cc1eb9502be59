"""The page of a finished comparison: compare.json, and what its run folders add.

The estimates are those of compare.json; curves, tokens by purpose, settings and folders are read
from the runs of the arms.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from intfast import cli
from intfast.state.files import read_json
from intfast.study import arms, compare_table
from intfast.study.charts import Line, Point, bar, chart, dotted, legend, percent
from intfast.study.page_data import Section, origin, toml
from intfast.study.read import read_figures, read_rows
from intfast.study.results import PASS, TOLD_APART, counted, sampling
from intfast.study.sections import code_table, figures_of, versions
from intfast.study.tables import Cell, Table, element, fold, heads, note, reading

SERIES = ("reward", "zero_advantage", "all_wrong", "length", "truncated", "entropy_sampled")
"""The curves of RL that are shown, arm beside arm."""
PURPOSES = {
    "attempts": ("attempts", 0),
    "verify": ("verification", 4),
    "continue": ("continuations", 2),
    "guided": ("rewrites and hints", 5),
    "rollouts": ("rollouts of RL", 3),
}
"""Part of the generated tokens -> its name and colour."""


def is_comparison(folder: Path) -> bool:
    """Whether a folder was made by intfast.study.compare."""
    return (folder / "compare.json").is_file() or any(folder.glob("seed-*/collection"))


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
        self.with_tokens = {n: row for n, row in self.rows.items() if row["accuracy_tokens"]}
        """The arms that are also compared at equal tokens."""

    def ours(self) -> dict[str, Path]:
        """Name -> run folder of our arm, one per seed, whose interventions the page shows."""
        run = self.runs.get(arms.OURS) or self.runs.get("int")
        folders = {f"seed {s}": self.folder / f"seed-{s}" / run for s in self.seeds if run}
        return {name: path for name, path in folders.items() if (path / "summary.json").is_file()}

    def evaluations(self, name: str, longer: bool = False) -> dict[int, Any]:
        """Seed -> evaluation of an arm; `longer`: after as many tokens as ours."""
        done, more = compare_table.compared(self.cells[name], self.cells.get(arms.OURS))
        return {seed: cells["evaluation"] for seed, cells in (more if longer else done).items()}

    def line(self, name: str, points: Sequence[Point], dots: bool = False) -> Line:
        """A line of a chart, of an arm."""
        label, color = self.rows[name]["label"], arms.ARMS[name].color
        return Line(label, color, points, dots=dots, dashed=arms.is_dashed(name))

    def name(self, name: str) -> Cell:
        """The label of an arm with its colour."""
        return dotted(self.rows[name]["label"], arms.ARMS[name].color)


def header(about: About) -> list[Any]:
    """What this is a page of."""
    seeds = f"{'seed' if len(about.seeds) == 1 else 'seeds'} {', '.join(map(str, about.seeds))}"
    text: list[Any] = [f"{len(about.rows)} arms of a comparison, from "]
    text += [*origin(about.config, about.manifest), f", with {seeds}."]
    found = [element("h1", about.folder.resolve().name), element("p", text, class_="muted")]
    measured = [row["accuracy"] for row in about.rows.values() if row["accuracy"]]
    if measured:
        text = (
            f"Measured: {measured[0].num_problems:,} held-out problems, "
            f"{about.config.evaluate.samples:,} samples of each and seed, {sampling(about.config)}"
        )
        found.append(element("p", text))
    if said := about.found.get("about"):
        found.append(assumed(said))
    return found


def assumed(text: str) -> Markup:
    """What the author of a config says of its task, as compare.json keeps it."""
    return element("p", element("b", "What the config says of its task. "), text)


def sections(about: About) -> tuple[list[Section], list[Section]]:
    """What stands before the interventions of our arm, and behind them."""
    table = compare_table.steps_table(about.found)
    parts = [*_verdicts(about, "ahead", "equal steps"), table, _counted(about), *_pass(about)]
    before = [Section("results", "Equal steps", "At equal RL steps", parts)]
    before += [_tokens(about)] if about.with_tokens else []
    return [*before, _training(about)], [_settings(about)]


# --- results -----------------------------------------------------------------------------------


def _verdicts(about: About, key: str, where: str) -> list[Any]:
    """What of it is ahead, behind, or neither, in words."""
    groups: dict[str, list[str]] = {"clearly ahead of": [], "not told apart": [], "behind": []}
    for row in about.rows.values():
        if said := reading(row[key], "clearly ahead of", "behind"):
            groups[said].append(row["label"])
    items = [
        element("li", element("b", f"{said} from" if "not" in said else said), f": {names}.")
        for said, labels in groups.items()
        if (names := "; ".join(labels))
    ]
    title = element("b", f"{compare_table.OURS} is, in accuracy at {where},")
    return [element("p", title), element("ul", items, class_="verdicts")] if items else []


def _counted(about: About) -> Markup:
    ahead = (
        f"\u201c{compare_table.OURS} ahead by\u201d is its accuracy minus that of the arm, paired "
        f"by seed and problem. {TOLD_APART} "
    )
    return counted(
        "seeds and problems" if len(about.seeds) > 1 else "problems",
        f"{ahead if about.found['compared_with'] else ''}Arms without RL have no RL steps; those "
        f"after RL had {about.config.rl.steps or 'none'}.",
    )


def _pass(about: About) -> list[Any]:
    """pass@k of the arms before and after RL, at powers of two."""
    blocks = []
    measured = [name for name, row in about.rows.items() if row["accuracy"]]
    before = [name for name in measured if not arms.has_rl(name)]
    after = [name for name in measured if name == "base" or arms.has_rl(name)]
    for title, names in (("before RL", before), ("after RL, at equal steps", after)):
        curves = {name: compare_table.pass_curve(about.evaluations(name)) for name in names}
        lines = [about.line(n, [percent(*pair) for pair in c], True) for n, c in curves.items()]
        kind = PASS.format("mean over seeds")
        figure = chart(f"pass@k {title}", kind, lines, unit=" %", log_k=True)
        if figure and len(lines) > 1:
            blocks.append(element("div", figure, legend(lines)))
    title = element("h3", "What more samples would solve")
    return [title, element("div", blocks, class_="charts two")] if blocks else []


def _tokens(about: About) -> Section:
    """The arms with RL after as many tokens as ours, and what these were for."""
    text = (
        f"RL of the others goes on until they have generated as many tokens as {compare_table.OURS}"
        ", with attempts, verifications, continuations, rewrites, hints and rollouts counted; "
        "evaluations only measure and are not in it."
    )
    rows = about.with_tokens
    seeds = {n: compare_table.by_seed(about.evaluations(n, longer=True)) for n in rows}
    most = max(row["tokens_tokens"] for row in rows.values())
    lines = []
    for name, row in rows.items():
        collected = sum(row["collection"].values())
        spent = row["collection"] | {"rollouts": row["tokens_tokens"] - collected}
        counts = [spent.get(key, 0) for key in PURPOSES]
        cells = [f"{count:,.0f}" for count in counts]
        split = [
            (f"{purpose}: {cell}", count, place)
            for (purpose, place), cell, count in zip(PURPOSES.values(), cells, counts, strict=True)
        ]
        cells = [cell if count else "" for cell, count in zip(cells, counts, strict=True)]
        whole, steps = f"{row['tokens_tokens']:,.0f}", f"{row['tokens'] - collected:,.0f}"
        lines.append([about.name(name), whole, bar(split, most), *cells, steps])
    columns = heads("*arm", ">tokens", "split", *(f">{text}" for text, _ in PURPOSES.values()))
    columns += heads(">rollouts at equal steps")
    means = "Means of seeds. What an arm collected is the same at equal steps; only rollouts grow."
    parts = [
        note(text),
        *_verdicts(about, "ahead_tokens", "equal tokens"),
        compare_table.tokens_table(about.found, seeds),
        element("h3", "Tokens by purpose"),
        legend(list(PURPOSES.values()), "swatch"),
        Table("", columns, lines, style="arms"),
        note(means),
    ]
    return Section("tokens", "Equal tokens", "At equal generated tokens", parts)


# --- training ----------------------------------------------------------------------------------


def _training(about: About) -> Section:
    trained = {name: row["training"] for name, row in about.rows.items() if row["training"]}
    if not trained:
        return Section("training", "Training", "Training", [note("No arm with RL.")])
    columns = heads("*arm", ">training reward", ">zero-advantage share of the groups")
    figures = [
        [about.name(name), f"{found['reward']:.3f}", f"{found['zero_advantage']:.3f}"]
        for name, found in trained.items()
    ]
    drawn = {name: curves(about, name) for name in trained}
    lines = {
        key: [about.line(n, found.get(key, [])) for n, found in drawn.items()] for key in SERIES
    }
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
        legend(lines["reward"]),
        note(spread),
        figures_of(lines, reward="mean of a step's rollouts without a hint"),
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
    runs = list(dict.fromkeys(about.runs.values()))
    parts: list[Any] = []
    if given := about.found.get("own_settings"):
        rows = [[labels.get(name, name), "  ".join(words)] for name, words in given.items()]
        title = element("h3", "Given to single arms")
        parts += [title, code_table(["arm", "settings"], rows, "arm")]
    own = []
    for run in runs:
        rows = "; ".join(labels[name] for name in about.runs if about.runs[name] == run)
        own.append([run, rows, _own(about, run)])
    differences = cli.differences(about.config).items()
    shared = [[key, *map(toml, pair)] for key, pair in differences if key not in ("run", "seed")]
    folders = [_folder(about.folder, s, run) for s in about.seeds for run in ["collection", *runs]]
    about_runs = Markup(
        "Settings in which a run differs from <code>{}</code>, with the first seed; "
        "<code>rl.until_tokens</code> makes it go on for equal tokens."
    )
    common = f"What all share: settings of {about.standard} that differ from the defaults"
    listed = code_table(["folder", "state"], folders, "state")
    parts += [
        element("h3", "What makes each arm"),
        note(about_runs.format(about.standard)),
        code_table(["run", "rows", "settings"], own, "rows"),
        fold(common, code_table(["setting", "default", "here"], shared)),
        element("h3", "Run folders"),
        note("Each is an ordinary run; a link opens its own page where it lies beside this one."),
        fold(f"{len(folders)} folders", listed, open=len(folders) < 10),
        *versions({"": {k: v for k, v in about.manifest.items() if k != "starts"}}),
    ]
    return Section("settings", "Settings", "Settings, run folders, versions", parts)


def _own(about: About, run: str) -> str:
    """The settings of a run that differ from the standard, with the first seed."""
    path = about.folder / f"seed-{about.seeds[0]}" / run / "config.toml"
    found = cli.differences(cli.load(path), about.config) if path.is_file() else {}
    return "  ".join(f"{k}={toml(new)}" for k, (_, new) in found.items() if k != "run") or "none"


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
