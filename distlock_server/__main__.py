"""`python -m distlock_server` is the `distlock` command."""

from distlock_server.cli import main

if __name__ == "__main__":
    main(prog_name="distlock")
