"""The `zeroflow` command: `python -m zeroflow.cli`."""

from zeroflow.cli.program import entry

if __name__ == "__main__":
    entry()
