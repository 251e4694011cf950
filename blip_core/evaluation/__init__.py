"""Retrieval, captioning, the audit against known truth, and the report."""
