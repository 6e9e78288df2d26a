"""The trainer that the entries in examples/ start; `loop.py` is the place to begin reading."""
