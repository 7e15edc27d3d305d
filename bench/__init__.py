"""Measurements: one scenario in each file, one harness, targets beside the figures."""
