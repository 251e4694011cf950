"""Real programs that tests start on loopback: PostgreSQL, Redis, Prefect's server and workers, and more."""
