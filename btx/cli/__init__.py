"""The command line, one verb or group of verbs per file."""
