"""The engines behind `protocol.Engine`: one module each, imported where chosen."""
