"""The verbs of trivet: one algorithm each, runnable alone under `accelerate launch`."""
