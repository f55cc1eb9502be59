"""The stages of a run in plain sight: attempts, interventions, SFT, RL, evaluation, export."""

from __future__ import annotations

from intfast import collect, learn
from intfast.collect import Found
from intfast.methods import guided, sft_data
from intfast.model import weights
from intfast.run import Parts


def train(parts: Parts) -> Found:
    """Run all stages of a config; what was found on the way is in the run folder, too.

    Raises ValueError for what the user can change, RuntimeError for the environment.
    """
    config = parts.config
    collect.evaluation(parts, "base")
    found = collect.gather(parts, [config])

    if config.sft.epochs:
        found.supervised = sft_data.STAGES.get(config.sft.data, config.sft.data)
        found.examples = sft_data.examples(parts, found)
        learn.sft(parts, found.supervised, found.examples)
        collect.evaluation(parts, found.supervised)

    last = found.supervised
    if config.rl.steps:
        problems = found.rl_problems(config.rl.problems)
        hints = guided.hints(parts, problems)
        for name in (last, "base") if config.rl.from_base else (last,):
            learn.rl(parts, f"{name}_rl", name, problems, hints)
            collect.evaluation(parts, f"{name}_rl")
        last = f"{last}_rl"

    export(parts, last)
    return found


def export(parts: Parts, name: str) -> None:
    """Write the named weights as a Hugging Face folder, `export/` in the run folder."""
    target = parts.folder.path / "export"
    if not target.exists():  # it appears only when complete
        parts.hold(name)
        weights.save(parts.decoder, parts.model_path, target)
    parts.metrics.say(f"exported the weights {name} to {target}")
