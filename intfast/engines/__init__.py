"""The engines behind `intfast.rollout.Engine`: one module each, imported where chosen."""
