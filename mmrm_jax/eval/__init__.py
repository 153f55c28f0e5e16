"""Evaluation: accuracy, shortcut-failure degradation, the cross-distribution matrix and its report."""
