"""Goodput of static layouts and of ours under one mix: foreseen, served, set side by side."""
