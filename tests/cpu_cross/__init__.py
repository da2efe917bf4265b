"""The CPU engine in a program of its own, without torch, for this machine or for 64-bit ARM."""
