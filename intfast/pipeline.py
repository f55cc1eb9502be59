"""The stages of a run in plain sight: attempts, interventions, SFT, RL, evaluation, export."""

from __future__ import annotations

from intfast import collect, ranks
from intfast.collect import Found
from intfast.methods import guided, sft_data, table
from intfast.model import weights
from intfast.rl import rl
from intfast.run import Run
from intfast.sft import sft
from intfast.state import identity


def train(run: Run) -> Found:
    """Run all stages of a config; what was found on the way is in the run folder, too.

    Raises ValueError for what the user can change, RuntimeError for the environment.
    """
    config = table.check(run.config)
    # Before anything is trained: every table needs the base beside it.
    collect.evaluation(run, "base")
    # Attempts and interventions come from the base model alone. SFT starts from it too, so what is
    # trained on is what this very model wrote: the prefix, and the step that it proposed itself.
    found = collect.gather(run, [config])

    if config.sft.epochs:
        # InT is one choice of SFT data among others: rivals share everything else.
        found.supervised = sft_data.STAGES.get(config.sft.data, config.sft.data)
        found.examples = sft_data.examples(run, found)
        sft(run, found.supervised, found.examples)
        collect.evaluation(run, found.supervised)

    # RL continues from SFT. Without SFT it starts from the base, which is the plain GRPO arm.
    last = found.supervised
    if config.rl.steps:
        problems = found.rl_problems(config.rl.problems)
        # Empty unless rl.hint asks for them.
        hints = guided.hints(run, problems)
        # The same problems, seeds and steps from both starts: what differs is the start.
        for name in (last, "base") if config.rl.from_base else (last,):
            rl(run, f"{name}_rl", name, problems, hints)
            collect.evaluation(run, f"{name}_rl")
        last = f"{last}_rl"

    # The last weights of the run as an ordinary model folder.
    export(run, last)
    return found


def export(run: Run, name: str) -> None:
    """Write the named weights as a Hugging Face folder, `export/` in the run folder."""
    target = run.folder.path / "export"
    # Looked at again each time: somebody may have deleted or cut what is in it.
    if not ranks.now().first(lambda: identity.is_exported(run.folder, name, run.metrics.say)):
        run.hold(name)
        weights.save(run.decoder, run.model_path, target)  # it appears only when complete
        identity.keep_export(run.folder, name)
    run.metrics.say(f"exported the weights {name} to {target}")
