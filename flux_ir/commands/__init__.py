"""The commands, one file per verb: an options dataclass, `run(options)` and `main()`. Start at `main.py`."""
