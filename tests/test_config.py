"""Config files: strict, all mistakes at once, one source for defaults and help."""

import re
from pathlib import Path

import pytest

from intfast import cli
from intfast.config import Config
from intfast.state.runfolder import MAY_CHANGE
from intfast.train import main

ROOT = Path(__file__).parents[1]
MINIMAL = ['data.train="x.jsonl"']


def errors_of(*overrides: str) -> list[str]:
    with pytest.raises(ValueError) as caught:
        cli.load(None, [*MINIMAL, *overrides])
    return str(caught.value).splitlines()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_every_shipped_config_loads_and_survives_a_round_trip(path, tmp_path):
    config = cli.load(path, MINIMAL)
    copy = tmp_path / "copy.toml"
    copy.write_text(cli.to_toml(config))
    assert cli.load(copy) == config


def test_defaults_are_the_papers():
    config = Config()
    assert (config.attempts.samples, config.attempts.sampling.temperature) == (4, 0.7)
    assert (config.intervene.samples, config.intervene.continuations) == (4, 32)
    assert (config.sft.epochs, config.sft.batch_size, config.sft.optim.lr) == (4, 64, 1e-6)
    assert (config.rl.steps, config.rl.problems_per_step, config.rl.group_size) == (400, 32, 8)
    assert (config.rl.credit.scale, config.rl.policy.kl) == ("none", 0.0)
    assert (config.rl.sampling.temperature, config.rl.sampling.top_p) == (1.0, 1.0)


def test_all_mistakes_are_reported_at_once_with_suggestions():
    lines = errors_of(
        "rl.grop_size=4", "seed=x", "sft.lr=1", "evaluate.ks=[1,2000]", "rl.policy.objective=grpoo"
    )
    assert lines[0].startswith("5 errors")
    text = "\n".join(lines)
    assert "rl.grop_size: unknown setting; did you mean rl.group_size?" in text
    assert "seed: expected whole number, got 'x'" in text
    assert "sft.lr: unknown setting; did you mean sft.optim.lr" in text
    assert "evaluate.ks must lie in 1..samples (128), got [2000]" in text
    assert 'rl.policy.objective: expected one of "grpo"' in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl.group_size=1", "rl.group_size must be >= 2"),
        ("rl.minibatches=7", "rl.minibatches (7) must divide"),
        ("rl.sampling.temperature=0", "rl.sampling.temperature must be > 0"),
        ("attempts.wrong_per_problem=9", "attempts.wrong_per_problem (9) must be <= samples"),
        ("intervene.continuations=0", "sft.filter = true needs intervene.continuations > 0"),
        ("grade.mode=exact", 'grade.mode must be "boxed", "stated" or "tail:WORD"'),
        ("rl.policy.clip_low=0.9", None),
        ("rl.policy.correction_high=3", "has no effect with correction='off'"),
        ("rl.evaluate_every=5", "rl.evaluate_every has no effect without data.test"),
        ("batch.max_tokens=100", "batch.max_tokens (100) must hold"),
        ("rl", "expected key=value"),
        ("seed.deep=1", "seed: expected whole number"),
    ],
)
def test_impossible_and_ineffective_settings_are_refused(override, message):
    if message is None:
        cli.load(None, [*MINIMAL, override])
    else:
        assert any(message in line for line in errors_of(override))


def test_truncated_sampling_needs_the_correction_off():
    lines = errors_of("rl.sampling.top_p=0.8", "rl.policy.correction=truncate")
    assert any("needs the full distribution" in line for line in lines)


def test_values_are_read_by_type():
    config = cli.load(
        None, [*MINIMAL, "run=5", "rl.optim.lr=3", "sft.filter=false", "evaluate.ks=[1, 4]"]
    )
    assert (config.run, config.rl.optim.lr, config.sft.filter) == ("5", 3.0, False)
    assert config.evaluate.ks == [1, 4]


def test_an_optional_setting_is_unset_as_help_shows_it(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('[data]\ntrain = "p.jsonl"\ntest = "t.jsonl"\ntrain_limit = 5\n')
    config = cli.load(file, ["data.test=absent", "data.train_limit=absent"])
    assert (config.data.train, config.data.test, config.data.train_limit) == ("p.jsonl", None, None)
    assert any(
        "rl.group_size: expected whole number" in e for e in errors_of("rl.group_size=absent")
    )
    assert cli.load(None, [*MINIMAL, "run=absent"]).run == "absent"


def test_an_unknown_option_is_called_one():
    assert errors_of("--dryrun")[1] == "  unknown option --dryrun; did you mean --dry-run?"
    assert errors_of("--dry-run", "-v")[1:] == ["  unknown option --dry-run", "  unknown option -v"]
    with pytest.raises(ValueError, match=r"^unknown option --dryrun; did you mean --dry-run\?$"):
        cli.load("--dryrun", MINIMAL)


def test_a_section_keeps_the_defaults_its_parent_gives_it():
    config = cli.load(None, [*MINIMAL, "rl.sampling.max_new_tokens=99"])
    assert config.rl.sampling.temperature == 1.0
    assert config.attempts.sampling.temperature == 0.7


def test_missing_and_broken_files_name_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"no config file .*quick\.toml.*quickstart\.toml"):
        cli.load(ROOT / "configs" / "quick.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("seed = = 1")
    with pytest.raises(ValueError, match="not valid TOML"):
        cli.load(broken)


def test_help_explains_every_setting():
    explained = {path: text for path, _, _, text in cli.walk()}
    assert len(explained) > 60
    assert [path for path, text in explained.items() if not text] == []
    text = cli.explain()
    assert all(f"  {path} = " in text for path in explained)
    assert "continued run" not in text


def test_help_says_what_a_continued_run_may_change(capsys):
    assert main(["--help"]) == 0
    entries = re.split(r"\n  (?=[\w.]+ = )", capsys.readouterr().out)
    noted = [
        e.split()[0] for e in entries if "A continued run may change it." in " ".join(e.split())
    ]
    assert sorted(noted) == sorted(MAY_CHANGE)


def test_every_setting_is_read_somewhere():
    code = "".join(
        path.read_text()
        for path in (ROOT / "intfast").rglob("*.py")
        if path.name not in ("config.py", "cli.py")
    )
    unread = [path for path, *_ in cli.walk() if f".{path.rsplit('.', 1)[-1]}" not in code]
    assert unread == []
