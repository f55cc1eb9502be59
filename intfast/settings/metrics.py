"""Settings of what is recorded for people; embedded in the tree of config.py."""

from __future__ import annotations

from typing import Literal

from msgspec import field

from intfast.settings.numerics import Settings, at_least


class MetricsConfig(Settings):
    """What is recorded for people. Nothing here changes a result."""

    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    """Also send the rows of metrics.jsonl to these; one that fails is dropped, not the run."""
    project: str = "intfast"
    """Project in wandb and trackio; the run has the name of its folder there."""
    example_logprobs: int = 64
    """SFT examples whose tokens the report colours by what SFT did to them; 0 is off."""

    def check(self) -> list[str]:
        errors = at_least(self, example_logprobs=0)
        if len(set(self.trackers)) < len(self.trackers):
            errors.append(f"trackers must differ from each other, got {self.trackers}")
        if self.project != "intfast" and not {"wandb", "trackio"} & set(self.trackers):
            errors.append("project has no effect without the tracker wandb or trackio; remove it")
        return errors
