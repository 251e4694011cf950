"""The corpus: schemas, selection by SQL, the DuckDB catalog."""
