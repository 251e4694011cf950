"""The commands of `capfilt`, by what they are about; `flows.cli` puts them together.

Flows and models are imported inside the commands, so that `capfilt --help` answers at once.
"""
