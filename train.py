"""Training program of one rank, started by `cherry-launch ... train.py`: the same as `-m cherry.rank_main`."""

from cherry.rank_main import main

if __name__ == "__main__":
    main()
