"""Owns nothing: the program that `cherry-launch` and the flow start on every rank; see cherry/entry.py."""

from cherry.entry import main

if __name__ == "__main__":
    main()
