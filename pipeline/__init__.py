"""The nouns of trivet: what the stages are made of. Knows no stage and no Prefect."""
