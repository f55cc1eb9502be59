"""Settings of what is recorded for people; embedded in the tree of config.py."""

from __future__ import annotations

from intfast.settings import Settings, at_least


class MetricsConfig(Settings):
    """What is recorded for people. Nothing here changes a result."""

    example_logprobs: int = 64
    """SFT examples whose tokens the report colours by what SFT did to them; 0 is off."""

    def check(self) -> list[str]:
        return at_least(self, example_logprobs=0)
