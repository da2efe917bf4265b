"""GPU code executed and examined on machines without a GPU; see README.md."""
