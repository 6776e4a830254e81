"""One module per task; each has `run(backbone, options, out) -> Outcome`."""
