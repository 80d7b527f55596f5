"""Who starts a process. Engines know command lines, not steps."""
