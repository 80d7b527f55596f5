"""Engines start processes. They know jobs and command lines, not steps."""
