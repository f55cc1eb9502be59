"""The leaves of the config tree: each file holds the settings of one part of the trainer."""
