"""Measurements and proofs: the real engine on real workers, beside what it is compared with."""
