"""What the system can do without: each module is a command, run from the repository root."""
