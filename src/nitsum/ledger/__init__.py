"""What was served to whom, what it cost, and what was promised and kept."""
