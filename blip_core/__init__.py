"""BLIP's method: MED, its objectives, CapFilt and the corpus. Knows nothing of Prefect."""
