"""Measuring: engines to compare with, timing, results, reports, rooflines, predictions."""
