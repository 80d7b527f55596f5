"""The commands, one verb or group of verbs a file."""
