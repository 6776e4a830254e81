"""A module for each signal, which puts together the parts of its runs: `assemble(config, accelerator) -> Parts`."""
