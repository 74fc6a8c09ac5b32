"""Times of kernels against the bytes or operations they cannot avoid."""
