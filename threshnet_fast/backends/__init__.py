"""Where the operators and the fused networks can run, and how one of the places is chosen."""
