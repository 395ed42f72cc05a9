"""`python -m minidpo demo`: see command.py."""

from minidpo.tools.demo.command import main
