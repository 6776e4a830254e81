"""The figures: each module has functions from arrays to arrays, and a plot function beside them."""
