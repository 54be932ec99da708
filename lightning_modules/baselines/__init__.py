"""Methods to compare with, one file each while it is short."""
