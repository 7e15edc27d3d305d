"""`python -m rdev` is the `rdev` command."""

from rdev.cli import main

if __name__ == "__main__":
    main()
