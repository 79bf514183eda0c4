"""`python -m moefy` is the command `moefy`."""

from moefy.cli import main

if __name__ == "__main__":
    main()
