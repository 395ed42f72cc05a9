"""The commands behind `python -m minidpo`, one file each."""
