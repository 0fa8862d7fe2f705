"""The program that `cherry-launch` and the train flow start on every rank; see cherry/rank_main.py."""

from cherry.rank_main import main

if __name__ == "__main__":
    main()
