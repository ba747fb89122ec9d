"""Measuring: statistics and the machine they were taken on. Knows no model."""
