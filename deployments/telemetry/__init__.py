"""Metrics: what each deployment knows, recorded in the series of `platform.metrics` through Ray's exporter."""
