"""Prefect tasks: thin wrappers over `blip_core`."""
