"""Bytes, rows and result formats: what was stored, never what a job means."""
