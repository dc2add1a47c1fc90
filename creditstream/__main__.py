"""``python -m creditstream``."""

from creditstream.cli import main

main()
