"""Config files: strict, all mistakes at once, one source for defaults and help."""

import math
import re
from pathlib import Path

import pytest

from intfast import checks, cli
from intfast.config import (
    SAMPLED,
    Config,
    DataConfig,
    ModelConfig,
    RlConfig,
    RolloutConfig,
    SamplingConfig,
)
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
    assert "evaluate.ks: expected numbers from 1 to evaluate.samples = 128, got [1, 2000]" in text
    assert 'rl.policy.objective: expected one of "grpo"' in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl.group_size=1", "rl.group_size: expected a whole number >= 2, got 1"),
        ("rl.minibatches=7", "rl.minibatches: expected a divisor of"),
        ("rl.sampling.temperature=0", "rl.sampling.temperature: expected a number > 0"),
        (
            "attempts.wrong_per_problem=9",
            "expected <= attempts.samples = 4, got 9",
        ),
        (
            "intervene.continuations=0",
            'expected > 0, as sft.target = "recipe" needs',
        ),
        ("grade.mode=exact", 'grade.mode: expected "boxed", "stated" or "tail:WORD", got'),
        ("rl.policy.clip_low=0.9", None),
        ("rl.policy.correction_bounds=[0.5, 3]", 'no effect with rl.policy.correction = "off"'),
        (
            "rl.evaluate_every=5",
            "got 5; it has no effect with no data.test",
        ),
        ("batch.max_tokens=100", "batch.max_tokens: expected room for a prompt"),
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
    assert any("the full distribution" in line for line in lines)


def test_values_are_read_by_type():
    config = cli.load(
        None, [*MINIMAL, "run=5", "rl.optim.lr=3", "sft.target=suffix", "evaluate.ks=[1, 4]"]
    )
    assert (config.run, config.rl.optim.lr, config.sft.target) == ("5", 3.0, "suffix")
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


def test_every_stage_starts_from_the_sampling_of_the_run(tmp_path):
    words = [
        "sampling.temperature=0.5",
        "rl.sampling={max_new_tokens=9}",
        "evaluate.sampling.top_k=3",
    ]
    config = cli.load(None, [*MINIMAL, *words])
    assert (config.attempts.sampling.temperature, config.attempts.sampling.top_k) == (0.5, 20)
    assert (config.evaluate.sampling.temperature, config.evaluate.sampling.top_k) == (0.5, 3)
    # RL needs the full distribution, whatever the others do.
    assert config.rl.sampling == SamplingConfig(
        temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=9
    )
    assert config == Config(
        data=config.data,
        sampling=config.sampling,
        rl=config.rl,
        evaluate=config.evaluate,
    )
    file = tmp_path / "config.toml"
    file.write_text(cli.to_toml(config))
    assert cli.load(file) == config
    stages = file.read_text().split("[rl.sampling]")[1].split("[")[0]
    assert stages.strip() == "max_new_tokens = 9"
    own = cli.load(None, [*MINIMAL, "rl.sampling.temperature=absent"])
    assert own.rl.sampling.temperature == 0.7
    file.write_text(cli.to_toml(own))
    assert cli.load(file) == own


def test_a_difference_of_the_sampling_is_named_once():
    config = cli.load(None, [*MINIMAL, "sampling.top_k=5", "attempts.sampling.top_p=0.5"])
    found = cli.differences(config)
    del found["data.train"]
    assert found == {"sampling.top_k": (20, 5), "attempts.sampling.top_p": (0.8, 0.5)}


def test_every_number_has_a_range():
    ranged = {name for names, *_ in checks.RANGES for name in names.split()}
    ranged |= {f"{path}.{name}" for path in SAMPLED.split() for name, *_ in checks.SAMPLING}
    ranged |= {f"sampling.{name}" for name, *_ in checks.SAMPLING}
    numbers = {path for path, kind, *_ in cli.walk() if "number" in kind}
    # Any seed will do; the other two depend on further settings.
    assert numbers - ranged == {"seed", "rl.policy.dual_clip", "evaluate.ks"}


NUMBERS = [path for path, kind, *_ in cli.walk() if "number" in kind]
NO_NUMBERS = ["nan", "-nan", "inf", "-inf", "1e400", "true", '"1"', str(10**30), "9" * 5000]


@pytest.mark.parametrize("path", NUMBERS)
def test_what_is_no_number_is_refused_by_name_and_alone(path):
    for value in NO_NUMBERS:
        inside = (
            f"[{value}, 2]" if path in ("evaluate.ks", "rl.policy.correction_bounds") else value
        )
        lines = errors_of("data.test=t.jsonl", f"{path}={inside}")
        assert len(lines) == 2 and lines[1].startswith(f"  {path}: expected "), lines


@pytest.mark.parametrize(
    "override",
    [
        "sampling={temperature=nan}",
        "rl.sampling={top_p=inf}",
        "sampling.temperature=1e-9",
        "sampling.top_p=1e-320",
        "watchdog_s=1e12",
        "model.threads=100000",
    ],
)
def test_no_number_is_hidden_in_a_table_or_beyond_what_can_be_computed(override):
    (line,) = errors_of(override)[1:]
    assert line.startswith("  " + override.partition("=")[0])


def test_python_may_not_smuggle_infinity_in_either():
    config = Config(data=DataConfig(train="x.jsonl"), rollout=RolloutConfig(cache_gib=math.inf))
    assert [fault[:18] for fault in checks.faults(config)] == ["rollout.cache_gib:"]
    bad = SamplingConfig(temperature=math.nan, top_p=1.0, top_k=0, max_new_tokens=9)
    config = Config(data=DataConfig(train="x.jsonl"), sampling=bad)
    assert [fault[:21] for fault in checks.faults(config)] == ["sampling.temperature:"]


@pytest.mark.parametrize(
    ("overrides", "setting"),
    [
        (["attempts.sampling.temperature=0"], "attempts.sampling.temperature"),
        (["intervene.sampling.temperature=-0.0"], "intervene.sampling.temperature"),
        (["intervene.continuation.top_k=1"], "intervene.continuation.top_k"),
        (["rl.sampling.temperature=0"], "rl.sampling.temperature"),
        (["rl.sampling.top_k=1"], "rl.sampling.top_k"),
        (["evaluate.sampling={temperature=0}"], "evaluate.sampling.temperature"),
        (
            ["sft.data=star", "rl.problems=selected", "intervene.sampling.temperature=0"],
            "intervene.sampling.temperature",
        ),
    ],
)
def test_greedy_samples_of_one_prompt_would_be_equal(overrides, setting):
    (line,) = errors_of("data.test=t.jsonl", *overrides)[1:]
    assert line.startswith(f"  {setting}: expected ") and "would be equal" in line


def test_one_greedy_sample_is_sound():
    cli.load(
        None,
        [
            *MINIMAL,
            "data.test=t.jsonl",
            "evaluate.samples=1",
            "evaluate.ks=[1]",
            "evaluate.sampling.temperature=0",
        ],
    )
    # Nobody draws these.
    cli.load(None, [*MINIMAL, "evaluate.sampling.temperature=0"])
    cli.load(None, [*MINIMAL, "sft.data=reference", "rl.steps=0", "attempts.sampling.top_k=1"])


# --- paths -------------------------------------------------------------------------------------


def test_home_is_home_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    file = tmp_path / "c.toml"
    file.write_text(
        'run = "~/runs/x"\n[data]\ntrain = "~/a.jsonl"\ntest = "~"\n[model]\npath = "~/m"\n'
    )
    words = ["run=~/runs/x", "data.train=~/a.jsonl", "data.test=~", "model.path=~/m"]
    for config in (cli.load(file), cli.load(None, words)):
        assert config.run == "/home/someone/runs/x"
        assert (config.data.train, config.data.test) == ("/home/someone/a.jsonl", "/home/someone")
        assert config.model.path == "/home/someone/m"
    assert Config(run="~/x").run == "/home/someone/x"
    # Relative paths, names of the hub and tildes elsewhere stay as they are written.
    config = cli.load(None, ["run=./~/x", "data.train=a/b:c@train", "data.test=x~.jsonl"])
    assert (config.run, config.data.train) == ("./~/x", "a/b:c@train")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"error in the configuration\n.*data\.train"):
        cli.load("~/c.toml", ["data.train=absent"])
    assert cli.expanded("~/x") == tmp_path / "x"


def test_the_home_of_nobody_is_refused():
    (line,) = errors_of("run=~nobody_of_this_name/x")[1:]
    assert line.startswith("  run: expected a path, got '~nobody_of_this_name/x'; ~ is the home")
    assert [line[:26] for line in errors_of("run=", "model.path=")[1:]] == [
        "  run: expected a path, go",
        "  model.path: expected a p",
    ]


def test_a_run_folder_must_be_one(tmp_path):
    (tmp_path / "file").touch()
    for run, said in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "x", "is a file"),
        (tmp_path / ("x" * 300), "too long"),
    ):
        config = Config(run=str(run), model=ModelConfig(path="a/b"))
        with pytest.raises(ValueError, match=rf"^1 path cannot be used\n  run: .*{said}"):
            checks.check_paths(config)
    checks.check_paths(Config(run=str(tmp_path / "new" / "run")))


# --- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("SFT", "sft"),
        ("Rl", "rl"),
        ("modle", "model"),
        ("atempts", "attempts"),
        ("prompts", "prompt"),
        ("metric", "metrics"),
        *(
            (name, "")
            for name in ("sweep", "gradient", "dataset", "policy_config", "runs", "seeds")
        ),
    ],
)
def test_a_foreign_section_gets_a_near_one_or_the_list(tmp_path, name, near):
    file = tmp_path / "c.toml"
    file.write_text(f'[{name}]\nx = 1\n[data]\ntrain = "x.jsonl"\n')
    with pytest.raises(ValueError) as caught:
        cli.load(file)
    (line,) = str(caught.value).splitlines()[1:]
    sections = (
        "sampling, model, ranks, data, prompt, grade, rollout, attempts, intervene, batch, sft, rl"
    )
    remedy = f"did you mean {near}?" if near else f"known here: {sections}, parity, evaluate"
    assert line.startswith(f"  {name}: unknown setting; {remedy}")


def test_capitals_and_hyphens_are_spelling():
    assert "did you mean rl.group_size?" in errors_of("rl.Group-Size=4")[1]
    assert "did you mean watchdog_s?" in errors_of("Watchdog-S=4")[1]


@pytest.mark.parametrize(
    "override",
    [
        "rl=grpo",
        "sampling=hot",
        "sampling.max_new_tokens=many",
        "sampling.max_new_token=9",
        "evaluate=8",
        "batch=4",
        "batch.max_tokens=lots",
        "data=x.jsonl",
        "attempts.samples=few",
    ],
)
def test_a_setting_that_was_not_read_brings_no_second_error(override):
    """The default in its place breaks rules of the quickstart, which is not what was written."""
    with pytest.raises(ValueError) as caught:
        cli.load(ROOT / "configs" / "quickstart_short.toml", [override])
    (line,) = str(caught.value).splitlines()[1:]
    assert line.startswith(f"  {override.partition('=')[0]}: ")


def test_one_wrong_sampling_is_one_fault():
    assert len(errors_of("sampling.top_p=2")) == 2
    assert errors_of("sampling.top_k=absent")[1].startswith("  sampling.top_k: expected")
    (line,) = errors_of("evaluate.sampling.top_p=0")[1:]
    assert line.startswith("  evaluate.sampling.top_p: expected 0 < top_p <= 1, got 0")


@pytest.mark.parametrize(
    ("word", "instead"),
    [
        ("sft.filter=false", 'sft.target = "no_filter"'),
        ("rl.optim.beta1=0.9", "the constant BETAS of intfast/model/optim.py"),
        ("rl.policy.correction_high=3", "policy.correction_bounds"),
        ("weights.share=false", 'rollout.engine = "vllm_copy"'),
        ("rl.hint_shares=[0.5]", "rl.hint = 0.5"),
    ],
)
def test_a_setting_of_an_older_version_names_what_there_is_instead(word, instead):
    (line,) = errors_of(word)[1:]
    assert "no longer a setting" in line and instead in line


def test_what_replaced_old_settings_exists():
    known = {path for path, *_ in cli.walk()}
    assert not known & cli.GONE.keys()
    for text in cli.GONE.values():
        if found := re.search(r"constant (\w+) of ([\w/.]+)", text):
            assert re.search(rf"^{found[1]} = ", (ROOT / found[2]).read_text(), re.MULTILINE), text


def test_a_config_that_python_built_is_checked_by_type_and_by_rule():
    checks.check(Config(data=DataConfig(train="x.jsonl")))
    with pytest.raises(ValueError, match=r"rl\.group_size: expected a whole number >= 2"):
        checks.check(Config(data=DataConfig(train="x.jsonl"), rl=RlConfig(group_size=1)))
    with pytest.raises(ValueError, match=r"Expected `int`, got `str` - at `\$.seed`"):
        checks.check(Config(seed="1"))


def test_missing_and_broken_files_name_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"no config file .*quick\.toml.*quickstart\.toml"):
        cli.load(ROOT / "configs" / "quick.toml")
    with pytest.raises(ValueError, match=r"configs is a folder; .*configs/quickstart\.toml"):
        cli.load(ROOT / "configs")
    # The folder of the quickstart's files has none itself.
    with pytest.raises(ValueError, match=r"quickstart is a folder; .*configs/quickstart\.toml"):
        cli.load(ROOT / "configs" / "quickstart")
    broken = tmp_path / "broken.toml"
    for text in ("seed = = 1", "seed = " + "1" * 5000, "seed = " + "[" * 5000):
        broken.write_text(text)
        with pytest.raises(ValueError, match=r"broken\.toml is not valid TOML.*; correct it"):
            cli.load(broken)


def test_help_explains_every_setting():
    explained = {path: text for path, _, _, text in cli.settings()}
    assert 60 < len(explained) <= 115
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
    assert sorted(noted) == sorted(checks.MAY_CHANGE)


def test_every_setting_is_read_somewhere():
    code = "".join(
        path.read_text()
        for path in (ROOT / "intfast").rglob("*.py")
        if path.name not in ("config.py", "cli.py", "checks.py")
    )
    unread = [path for path, *_ in cli.walk() if f".{path.rsplit('.', 1)[-1]}" not in code]
    assert unread == []
