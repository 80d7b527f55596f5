"""Makes `python -m btx` the command; this is how the engine starts a job in the same environment."""

from btx.cli.main import main

if __name__ == "__main__":
    main()
