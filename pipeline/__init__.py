"""The nouns of trivet: what the stages are made of. Knows no stage and no Prefect."""

__version__ = "0.1.0"
