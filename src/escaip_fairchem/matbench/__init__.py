"""Matbench Discovery: files of predictions, their check, metrics, and the model's YAML.

Formats and corrections are those of github.com/janosh/matbench-discovery
at commit 2c7f9fc4 of July 2026.
"""
