"""`python -m jobs` is `vecmill`."""

from jobs.cli import main

if __name__ == "__main__":
    main()
