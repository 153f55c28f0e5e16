"""Ablations: a grid of settings x objective x environment x seed, with its statistics, tables and report."""
