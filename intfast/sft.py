"""The SFT stage: the base model learns given sequences, token by token with their weights."""

from __future__ import annotations

from collections.abc import Sequence

from intfast import loss
from intfast.batch import pack, shuffled
from intfast.engine.protocol import derive_seed
from intfast.grading.watch import at_gates, cut_short
from intfast.intervene import REACHED_CONTINUATION
from intfast.records import Example, Intervention
from intfast.run import Run
from intfast.update import Stage, is_finished, update


class NoExamples(ValueError):
    """The data of the SFT stage came out empty."""


def sft(run: Run, name: str, examples: Sequence[Example]) -> None:
    """Fine-tune the base model on the examples; the result is the weights `name`."""
    config = run.config.sft
    # Asked first: a run that is already past this stage loads nothing for it.
    if is_finished(run, name):
        return
    if not examples:
        raise NoExamples(_why_no_examples(run))
    # The last step of an epoch may be smaller; none of its examples is dropped.
    steps_per_epoch = -(-len(examples) // config.batch_size)
    total_steps = config.epochs * steps_per_epoch
    with (
        Stage(run, name, "base", config.optim, total_steps) as stage,
        # SFT generates nothing, so the engine gives its KV memory to the whole stage.
        run.updating(),
        run.metrics.progress(name, total_steps) as advance,
    ):
        while stage.step < total_steps:
            epoch, place = divmod(stage.step, steps_per_epoch)
            # Drawn again from the seed at every step: a run that continues needs no state for it.
            order = shuffled(len(examples), derive_seed(run.config.seed, "sft", epoch))
            chosen = order[place * config.batch_size : (place + 1) * config.batch_size]
            with run.metrics.phase("train"):
                packed = pack([examples[i] for i in chosen], run.config.batch)
                # A mean over weighted tokens: a long example counts more than a short one.
                values = update(stage, packed, packed.weight_sum, loss.sft_loss)
            advance(1, packed.num_tokens)
            step = stage.step + 1
            skipped = f"  SKIPPED, not finite: {values['cause']}" if values["skipped"] else ""
            line = f"{name} {step}/{total_steps}  nll {values['nll_mean']:.4f}{skipped}"
            run.metrics.row(name, step, values, line)
            # A checkpoint an epoch: SFT is short beside the stages around it.
            stage.finish_step(save=place == steps_per_epoch - 1, finished=step == total_steps)


def _why_no_examples(run: Run) -> str:
    """What the records say, and what would help: a looser filter only where one held anything."""
    cut = cut_short(run.folder, run.config)
    if run.config.sft.data != "intervention":
        return (
            "sft.data gave no example: the model was right in none of the samples it could come "
            f"from; {cut or 'draw more of them, or take another sft.data'}"
        )
    gates, said = at_gates(run.folder.journal("interventions", Intervention))
    helps = "read the replies in interventions.jsonl; more attempts, or a stronger base model, help"
    if gates.keys() & set(REACHED_CONTINUATION):
        helps = 'draw more continuations, or set sft.target = "no_filter"; more attempts help too'
    # What was cut says nothing of the model: that comes before any other advice.
    helps = cut or helps
    return f"no intervention is left to fine-tune on ({said or 'none was drawn'}): {helps}"
